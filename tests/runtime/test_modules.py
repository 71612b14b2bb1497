"""The modules of a converted checkpoint, as a model calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import (
    STATIC_INT8,
    config_of,
    group_config,
    quantised,
    weight_args,
    write_checkpoint,
)
from support.conversion import converted, converted_module

import ctconvert
from ctconvert.runtime import KernelLinear, load, modules


@pytest.mark.parametrize("fuse", [False, True])
def test_modules_compute_the_layer(fuse: bool, tmp_path: Path) -> None:
    out = converted("smol-w4a16-g32-asym", "triton", tmp_path, fuse=fuse)
    loaded = load(out, "cpu")
    name = "model.layers.0.self_attn." + ("qkv_proj" if fuse else "k_proj")
    module = loaded[name]
    assert isinstance(module, KernelLinear)
    assert (module.out_features, module.in_features) == (960 if fuse else 192, 576)
    assert module.widths == ((576, 192, 192) if fuse else (192,))
    x = torch.randn(3, 5, 576, dtype=torch.bfloat16)
    expected = x.float() @ module.dequantize().t()
    torch.testing.assert_close(module(x).float(), expected, rtol=0.02, atol=0.05)


def test_experts_are_loaded_one_by_one(tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32), ["re:.*experts.*"])
    name = "model.layers.0.mlp.experts.down_proj"
    each = [quantised(64, 96, group, seed) for seed in range(3)]
    tensors = {
        f"{name}.{local}": torch.stack([made[local] for made in each])
        for local in ("weight_packed", "weight_scale")
    }
    tensors[f"{name}.weight_shape"] = torch.tensor([3, 64, 96])
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    loaded = load(tmp_path / "out", "cpu")
    assert list(loaded) == [f"{name}.{index}" for index in range(3)]
    ctconvert.verify(tmp_path / "out", kernels=True, device="cpu")


def test_an_asymmetric_input_brings_the_sums_of_the_weight(tmp_path: Path) -> None:
    """Summed once, not on every call: what the GPU's kernel takes the zero point out with."""
    inputs = STATIC_INT8 | {"symmetric": False}
    group = group_config(
        weight_args(8, None, False), format="int-quantized", inputs=inputs, outputs=None
    )
    made = quantised(48, 64, group, 1) | {"input_zero_point": torch.tensor([-7], dtype=torch.int8)}
    out = converted_module(made, config_of(group), "triton", tmp_path)
    module = load(out, "cpu")["model.down_proj"]
    assert "input_zero_point" in module.tensors() and "weight_sum" not in module.tensors()
    assert module.get_buffer("weight_sum").tolist() == made["weight"].long().sum(1).tolist()
    ctconvert.verify(out, kernels=True, device="cpu")


def test_stacked_experts_without_a_kernel_for_stacks(tmp_path: Path) -> None:
    """Each by itself, with what is derived of its own weight, also where that came later."""
    inputs = STATIC_INT8 | {"symmetric": False}
    group = group_config(
        weight_args(8, None, False), format="int-quantized", inputs=inputs, outputs=None
    )
    singles = []
    for seed in range(3):
        zero = {"input_zero_point": torch.tensor([seed - 7], dtype=torch.int8)}
        made = quantised(48, 64, group, seed) | zero
        out = converted_module(made, config_of(group), "triton", tmp_path / str(seed))
        singles.append(load(out, "cpu")["model.down_proj"])
    each = [single.tensors() for single in singles]
    stacked = {local: torch.stack([one[local] for one in each]) for local in each[0]}
    empty = {local: tensor.to("meta") for local, tensor in stacked.items()}
    experts = modules.KernelExperts(singles[0].binding, empty)
    for local, tensor in stacked.items():
        setattr(experts, local, tensor)
    experts.refresh()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = torch.tensor([3, 0, 2, 2, 1], dtype=torch.int32)  # the second has none
    made = experts(x, rows, torch.tensor([0, 2, 2, 5], dtype=torch.int32))
    assert torch.equal(made, torch.cat([singles[0](x[[3, 0]]), singles[2](x[[2, 2, 1]])]))


def test_the_parts_of_a_fused_module_share_one_product(tmp_path: Path) -> None:
    out = converted("smol-w4a16-g64-sym", "triton", tmp_path, fuse=True)
    whole = load(out, "cpu")["model.layers.0.self_attn.qkv_proj"]
    assert isinstance(whole, KernelLinear)
    shared: dict[str, Any] = {}
    parts = [modules.FusedPart(whole, index, shared) for index in range(3)]
    x = torch.randn(2, 576, dtype=torch.bfloat16)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    whole.register_forward_hook(count)
    for order in ((0, 1, 2), (2, 0, 1)):
        made = {index: parts[index](x) for index in order}
        assert torch.equal(torch.cat([made[0], made[1], made[2]], -1), whole(x))
        assert not shared  # nothing is kept once all parts have been served
    assert calls == 4
    before = parts[0](x)
    x.copy_(torch.randn(2, 576))
    assert not torch.equal(parts[0](x), before)  # asked twice: x may have changed in place
