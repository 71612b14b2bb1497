"""Checkpoints that compressed-tensors' own compressors made, for every scheme and every target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import (
    DYNAMIC_INT8,
    LAYER,
    config_of,
    group_config,
    layer,
    quantised,
    sparse24,
    weight_args,
    write_checkpoint,
)
from support.reference import (
    check_against_reference,
    equal,
    load_tensors,
    read_json,
    triton_wna16,
)
from support.roundtrip import convert_and_back
from support.schemes import FRESH, fp8
from support.versions import INSTALLED, JUDGE

import ctconvert
from ctconvert.errors import UnsupportedError
from ctconvert.layouts import TARGETS


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weight_only_is_the_reference(
    bits: int, group: int | None, symmetric: bool, tmp_path: Path
) -> None:
    dtype = torch.float16 if symmetric == (bits == 4) else torch.bfloat16
    scheme = group_config(weight_args(bits, group, symmetric))
    tensors = layer(scheme, dtype, seed=bits)
    source = write_checkpoint(tmp_path / "in", tensors, config_of(scheme), shards=5)
    for out, shard_size in (("one", 5_000_000_000), ("many", 60_000)):
        ctconvert.repack(
            source, tmp_path / out, target="triton", device="cpu", max_shard_size=shard_size
        )
        check_against_reference(source, tmp_path / out, {name: bits for name, _, _ in LAYER})
    ctconvert.verify(tmp_path / "many", against=source)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    index = read_json(tmp_path / "many" / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) > 3
    assert index["weight_map"].keys() == load_tensors(tmp_path / "many").keys()


def test_columns_that_do_not_fill_a_word(tmp_path: Path) -> None:
    scheme = group_config(weight_args(4, None, symmetric=False))
    made = quantised(24, 44, scheme, seed=1)
    tensors = {f"a.down_proj.{local}": tensor for local, tensor in made.items()}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(scheme))
    convert_and_back(source, tmp_path, "triton")
    check_against_reference(source, tmp_path / "triton-out", {"a.down_proj": 4})


def test_int_quantized_codes_are_packed(tmp_path: Path) -> None:
    scheme = group_config(weight_args(4, 32), format="int-quantized", inputs=DYNAMIC_INT8)
    source = write_checkpoint(tmp_path / "in", layer(scheme), config_of(scheme))
    convert_and_back(source, tmp_path, "triton")
    check_against_reference(source, tmp_path / "triton-out", {name: 4 for name, _, _ in LAYER})


def test_fused_modules_stack_in_order(tmp_path: Path) -> None:
    scheme = group_config(weight_args(4, 64, symmetric=False))
    tensors = layer(scheme)
    attention = "model.layers.0.self_attn"
    for part, n in (("k", 64), ("v", 64)):
        tensors[f"{attention}.{part}_proj.bias"] = torch.randn(n, dtype=torch.bfloat16)
    source = write_checkpoint(tmp_path / "in", tensors, config_of(scheme), shards=3)
    convert_and_back(source, tmp_path, "triton", fuse=True)
    after = load_tensors(tmp_path / "triton-out")
    parts = [f"{attention}.{part}_proj" for part in "qkv"]
    separate = [triton_wna16(tensors, part, 4) for part in parts]
    for local in ("qweight", "scales", "qzeros"):
        joined = torch.cat([made[local] for made in separate], dim=1)
        assert equal(after[f"{attention}.qkv_proj.{local}"], joined)
    bias = torch.cat([tensors[f"{part}.bias"] for part in parts])
    assert equal(after[f"{attention}.qkv_proj.bias"], bias)
    assert not any(name.startswith(tuple(parts)) for name in after)
    assert "model.layers.0.mlp.gate_up_proj.qweight" in after


@pytest.mark.parametrize("name", FRESH)
@pytest.mark.parametrize("fuse", [False, True])
def test_every_scheme(name: str, fuse: bool, tmp_path: Path) -> None:
    group, layouts = FRESH[name]
    tensors = layer(group)
    for module in ("q", "k", "v"):  # so that static scales allow the parts to be fused
        for end in ("input", "output"):
            key = f"model.layers.0.self_attn.{module}_proj.{end}_scale"
            if key in tensors:
                tensors[key] = tensors[f"model.layers.0.self_attn.q_proj.{end}_scale"].clone()
    tensors.pop("model.layers.0.self_attn.q_proj.bias")
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group), shards=3)
    for target in TARGETS:
        if target not in layouts:
            with pytest.raises(UnsupportedError):
                ctconvert.repack(source, tmp_path / target, target=target, device="cpu")
            continue
        report = convert_and_back(source, tmp_path, target, fuse=fuse, max_shard_size=100_000)
        assert set(report.layouts) == layouts[target]
        names = load_tensors(tmp_path / f"{target}-out")
        fused = any(".qkv_proj." in tensor for tensor in names)
        assert fused == (fuse and name != "fp8 block-wise"), report.notes


SPARSE: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "fp16": None,
    "fp8 channel": group_config(
        weight_args(8, None, kind="float"), format="float-quantized", inputs=fp8(True)
    ),
    "fp8 tensor static": group_config(
        weight_args(8, kind="float", strategy="tensor"),
        format="float-quantized",
        inputs=fp8(False),
    ),
    "int8": group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8),
}


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("fuse", [False, True])
def test_every_sparse_scheme(kind: str, fuse: bool, tmp_path: Path) -> None:
    group = SPARSE[kind]
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    tensors = {"model.norm.weight": torch.ones(256, dtype=dtype)}
    shapes = (("q_proj", 72, 192), ("k_proj", 40, 192), ("v_proj", 40, 192), ("o_proj", 96, 96))
    for seed, (leaf, n, k) in enumerate(shapes):
        made = sparse24(n, k, group or {"weights": None}, seed, dtype)
        if "input_scale" in made:
            made["input_scale"] = torch.full((1,), 0.03, dtype=torch.bfloat16)
        tensors |= {f"model.layers.0.self_attn.{leaf}.{local}": t for local, t in made.items()}
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": ["lm_head"]}
    config: dict[str, Any] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    if group:
        config |= config_of(group)
    source = write_checkpoint(tmp_path / "in", tensors, config, shards=2)
    convert_and_back(source, tmp_path, "cuda", fuse=fuse)
    made = load_tensors(tmp_path / "cuda-out")
    name = "model.layers.0.self_attn." + ("qkv_proj" if fuse else "q_proj")
    rows = 152 if fuse else 72
    assert made[f"{name}.weight"].shape == (rows, 96)
    assert made[f"{name}.meta"].shape == (192 if fuse else 128, 256 // 8)
    scale = made[f"{name}.weight_scale"]
    assert scale.dtype == torch.float32
    if group is None:
        assert scale.tolist() == [1.0]
        assert made[f"{name}.input_scale"].tolist() == [1.0]
    else:
        assert scale.shape == (rows, 1)
        first = tensors["model.layers.0.self_attn.q_proj.weight_scale"].float().flatten()
        assert torch.equal(scale[:72, 0], first.expand(72))
        assert (f"{name}.input_scale" in made) == (kind == "fp8 tensor static")


def test_partially_sparse(tmp_path: Path) -> None:
    group = SPARSE["fp8 channel"]
    assert group is not None
    tensors = {}
    for leaf, made in (
        ("q_proj", sparse24(64, 128, group, 1)),
        ("o_proj", quantised(64, 128, group, 2)),
    ):
        tensors |= {f"model.layers.0.self_attn.{leaf}.{local}": t for local, t in made.items()}
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": ["re:.*o_proj"]}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group, sparsity_config=sparsity))
    report = convert_and_back(source, tmp_path, "cuda")
    assert report.layouts == {"cutlass-sparse24": 1, "scaled-mm": 1}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("packing", ["dense", "padded"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_embeddings_of_every_width(
    bits: int, packing: str, symmetric: bool, tmp_path: Path
) -> None:
    if 32 % bits and INSTALLED < JUDGE:
        pytest.skip("this compressed-tensors packs such widths the other way")
    group = group_config(weight_args(bits, 32, symmetric), ["Embedding"])
    made = quantised(48, 96, group, bits)
    if packing == "padded" and 32 % bits:
        from ctconvert.transforms.packed import pack, unpack

        codes = unpack(made["weight_packed"], bits, 96)
        made["weight_packed"] = pack(codes, bits, "padded")
        if not symmetric:
            zero = unpack(made["weight_zero_point"].t().contiguous(), bits, 48)
            made["weight_zero_point"] = pack(zero, bits, "padded").t().contiguous()
    tensors = {f"model.embed_tokens.{local}": tensor for local, tensor in made.items()}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    report = convert_and_back(source, tmp_path, "cuda")
    assert report.layouts == {"gather": 1}
    table = load_tensors(tmp_path / "cuda-out")["model.embed_tokens.weight_packed"]
    assert torch.equal(table, made["weight_packed"])
    for target in TARGETS:
        (module,) = ctconvert.plan(source, target=target).modules
        assert module.recipe.layout == "gather"
        assert module.recipe.weight.packing == (packing if 32 % bits else "dense")


def test_a_quantised_head_is_a_linear(tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32), ["Linear", "Embedding"])
    tensors = {}
    for name in ("model.embed_tokens", "lm_head"):
        made = quantised(128, 64, group, len(name))
        tensors |= {f"{name}.{local}": tensor for local, tensor in made.items()}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group, ignore=[]))
    report = convert_and_back(source, tmp_path, "triton")
    assert report.layouts == {"gather": 1, "triton-wna16": 1}


def test_kv_cache_scales_are_copied(tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32))
    tensors = {
        f"model.layers.0.self_attn.k_proj.{local}": tensor
        for local, tensor in quantised(64, 96, group, 1).items()
    }
    for name in ("k_scale", "v_scale"):
        tensors[f"model.layers.0.self_attn.{name}"] = torch.rand(1, dtype=torch.bfloat16)
    config = config_of(group, kv_cache_scheme=fp8(False))
    source = write_checkpoint(tmp_path / "in", tensors, config)
    convert_and_back(source, tmp_path, "triton")
    made = read_json(tmp_path / "triton-out" / "config.json")
    assert made["quantization_config"]["source"]["kv_cache_scheme"] == fp8(False)
