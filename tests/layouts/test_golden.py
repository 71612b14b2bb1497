"""Layouts hold what the kernels' own libraries make, by vectors that those have made."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.builders import config_of, group_config, module, weight_args
from support.memory import converted
from support.paths import GOLDEN
from support.reference import equal, marlin_qweight, marlin_scales, mxfp4_scales, unsigned_codes

MARLIN = ["w4.K128.N64", "w4.K256.N128", "w8.K128.N64", "w8.K256.N128"]


@pytest.mark.parametrize("key", MARLIN)
def test_marlin(key: str) -> None:
    vectors = load_file(GOLDEN / "marlin_repack.safetensors")
    words = vectors[f"marlin_repack.{key}.in"].t().contiguous()  # [K/f, N] to the source's [N, K/f]
    bits = int(key[1])
    n, k = words.shape[0], words.shape[1] * 32 // bits
    source = module(
        "a.up_proj",
        {
            "weight_packed": words,
            "weight_scale": torch.rand(n, k // 64, dtype=torch.float16),
            "weight_shape": torch.tensor([n, k]),
        },
    )
    _, made = converted(source, config_of(group_config(weight_args(bits, 64))), "cuda")
    want = vectors[f"marlin_repack.{key}.out"]
    assert torch.equal(made["a.up_proj.qweight"], want)
    scales = made["a.up_proj.scales"].reshape(k // 64, n // 64, 8, 8).transpose(2, 3)
    assert torch.equal(scales.reshape(k // 64, n).t(), source["a.up_proj.weight_scale"])
    # so that the plain references, which other tests use for other shapes, are right as well
    assert torch.equal(marlin_qweight(unsigned_codes(source, "a.up_proj", bits), bits), want)
    assert torch.equal(marlin_scales(source["a.up_proj.weight_scale"]), made["a.up_proj.scales"])


def test_marlin_mxfp4() -> None:
    vectors = load_file(GOLDEN / "marlin_mxfp4.safetensors")
    source = {name: vectors[f"mxfp4_marlin.{name}"] for name in ("weight_packed", "weight_scale")}
    group = group_config(weight_args(4, 32, kind="float"), format="mxfp4-pack-quantized")
    _, made = converted(module("a.up_proj", source), config_of(group), "cuda")
    assert torch.equal(made["a.up_proj.weight"], vectors["mxfp4_marlin.out_weight"])
    want = vectors["mxfp4_marlin.out_scale_u8"]
    assert torch.equal(made["a.up_proj.weight_scale"].view(torch.uint8), want)
    assert torch.equal(mxfp4_scales(source["weight_scale"]), want)


def test_cutlass() -> None:
    vectors = load_file(GOLDEN / "cutlass_sparse24.safetensors")
    names = [key.removesuffix(".dense") for key in vectors if key.endswith(".dense")]
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        if ".F8." in name or ".S8." in name:
            continue  # they need a scheme; the transforms' own tests hold them
        dense = vectors[f"{name}.dense"]
        n, k = dense.shape
        raw = dense.view(torch.int16)
        # keep the nonzero columns and fill each group up to two from the left
        nonzero = (raw.reshape(n, -1, 4) != 0).int()
        order = (nonzero * 8 - torch.arange(4)).argsort(-1, descending=True)[..., :2]
        kept = torch.zeros(n, k // 4, 4, dtype=torch.bool).scatter_(-1, order, True).reshape(n, k)
        bits = kept.reshape(n, -1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
        made = {
            "compressed": raw[kept].reshape(n, k // 2).view(dense.dtype),
            "bitmask": bits.sum(-1).to(torch.uint8),
            "shape": torch.tensor([[n], [k]]),
        }
        tensors |= module(f"m{len(tensors)}.{name.replace('.', '_')}", made)
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": []}
    config = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    plan, made = converted(tensors, config, "cuda")
    for item in plan.modules:
        name = item.name.partition(".")[2].replace("_", ".")
        assert equal(made[f"{item.name}.weight"], vectors[f"{name}.nzs"]), name
        assert torch.equal(made[f"{item.name}.meta"], vectors[f"{name}.meta"]), name
    assert len(plan.modules) == 12
