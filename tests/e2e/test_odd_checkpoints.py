"""Checkpoints with something unusual in them: converted exactly, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    DYNAMIC_INT8,
    STATIC_INT8,
    config_of,
    group_config,
    quantised,
    sparse24,
    weight_args,
    write_checkpoint,
)
from reference import load_tensors, read_json
from test_schemes import convert_and_back, fp8

import ctconvert
from ctconvert.errors import BadInputError, UnsupportedError

W4 = group_config(weight_args(4, 32))
W4_ASYM = group_config(weight_args(4, 32, symmetric=False))


def one_module(
    folder: Path, made: dict[str, torch.Tensor], config: dict[str, Any], name: str = "a.down_proj"
) -> Path:
    tensors = {f"{name}.{local}": tensor for local, tensor in made.items()}
    return write_checkpoint(folder, tensors, config)


def experts(
    name: str, n: int, k: int, group: dict[str, Any], count: int = 3
) -> dict[str, torch.Tensor]:
    each = [quantised(n, k, group, seed) for seed in range(count)]
    found = {
        f"{name}.{local}": torch.stack([made[local] for made in each])
        for local in each[0]
        if local != "weight_shape"
    }
    if "weight_shape" in each[0]:
        found[f"{name}.weight_shape"] = torch.tensor([count, n, k])
    return found


def test_stacked_experts_with_biases_are_not_fused(tmp_path: Path) -> None:
    tensors = {}
    for leaf in ("gate_proj", "up_proj"):
        name = f"model.layers.0.mlp.experts.{leaf}"
        tensors |= experts(name, 64, 96, W4)
        tensors[f"{name}.bias"] = torch.randn(3, 64)
    source = write_checkpoint(tmp_path / "in", tensors, config_of(W4))
    report = convert_and_back(source, tmp_path, "triton", fuse=True)
    assert any("not fused" in note and "bias" in note for note in report["notes"])
    bias = "model.layers.0.mlp.experts.up_proj.bias"
    assert torch.equal(load_tensors(tmp_path / "triton-out")[bias], tensors[bias])


def test_stacked_experts_are_fused_one_by_one(tmp_path: Path) -> None:
    tensors = {}
    for leaf in ("gate_proj", "up_proj"):
        tensors |= experts(f"model.layers.0.mlp.experts.{leaf}", 64, 96, W4_ASYM)
    source = write_checkpoint(tmp_path / "in", tensors, config_of(W4_ASYM))
    convert_and_back(source, tmp_path, "triton", fuse=True)
    made = load_tensors(tmp_path / "triton-out")
    assert made["model.layers.0.mlp.experts.gate_up_proj.qweight"].shape == (3, 96, 16)


@pytest.mark.parametrize("shape", [(1,), ()])
def test_experts_that_share_a_scale_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    group = group_config(
        weight_args(8, kind="float", strategy="tensor"), format="float-quantized", inputs=fp8(True)
    )
    tensors = experts("m.experts.down_proj", 64, 96, group)
    tensors["m.experts.down_proj.weight_scale"] = torch.full(shape, 0.5)
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    with pytest.raises(UnsupportedError, match="experts share weight_scale"):
        ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")


def test_metadata_of_many_elements_is_refused(tmp_path: Path) -> None:
    tensors = experts("m.experts.down_proj", 64, 96, W4, count=8)
    tensors["m.experts.down_proj.weight_shape"] = torch.tensor([[64, 96]] * 8)
    source = write_checkpoint(tmp_path / "in", tensors, config_of(W4))
    with pytest.raises(UnsupportedError, match=r"weight_shape is I64 \[8, 2\]"):
        ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")


def test_a_sparse_modules_zero_point_is_not_ignored(tmp_path: Path) -> None:
    group = group_config(weight_args(8, None), format="int-quantized", inputs=STATIC_INT8)
    made = sparse24(64, 128, group, 1)
    made["input_zero_point"] = torch.tensor([7], dtype=torch.int8)
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"]}
    source = one_module(tmp_path / "in", made, config_of(group, sparsity_config=sparsity))
    with pytest.raises(UnsupportedError, match="input_zero_point is 7"):
        ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")


@pytest.mark.parametrize(("value", "message"), [(0.75, "whole number"), (1.0, "no zero point")])
def test_fp8_zero_points(value: float, message: str, tmp_path: Path) -> None:
    group = group_config(
        weight_args(8, None, kind="float"), format="float-quantized", inputs=fp8(False)
    )
    made = quantised(64, 96, group, 1) | {"input_zero_point": torch.tensor([value])}
    source = one_module(tmp_path / "bad", made, config_of(group))
    with pytest.raises(BadInputError, match=message):
        ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")
    made["input_zero_point"] = torch.zeros(1)
    source = one_module(tmp_path / "in", made, config_of(group))
    convert_and_back(source, tmp_path, "cuda")
    assert "a.down_proj.input_zero_point" not in load_tensors(tmp_path / "cuda-out")
    ctconvert.verify(tmp_path / "cuda-out", kernels=True, device="cpu")


def test_asymmetric_dynamic_activations_are_refused(tmp_path: Path) -> None:
    inputs = DYNAMIC_INT8 | {"symmetric": False}
    group = group_config(weight_args(8, None), format="int-quantized", inputs=inputs)
    source = one_module(tmp_path / "in", quantised(64, 96, group, 1), config_of(group))
    with pytest.raises(UnsupportedError, match="asymmetric dynamic"):
        ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")


def test_bits_behind_the_last_zero_point_are_found(tmp_path: Path) -> None:
    made = quantised(68, 128, W4_ASYM, 1)
    convert_and_back(one_module(tmp_path / "in", made, config_of(W4_ASYM)), tmp_path, "cuda")
    made["weight_zero_point"][-1, 0] |= 1 << 28
    source = one_module(tmp_path / "bad", made, config_of(W4_ASYM))
    with pytest.raises(BadInputError, match="weight_zero_point holds bits"):
        ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")


@pytest.mark.parametrize(
    ("value", "message"), [(1 << 32, "outside the 4 scale groups"), (None, "never applied")]
)
def test_group_indices_are_checked_as_stored(
    value: int | None, message: str, tmp_path: Path
) -> None:
    group = group_config(weight_args(4, 32, actorder="group"))
    made = quantised(64, 128, W4, 1)
    made["weight_g_idx"] = torch.arange(128) // 32
    convert_and_back(one_module(tmp_path / "in", made, config_of(group)), tmp_path, "cuda")
    if value is None:
        made["weight_g_idx"].fill_(-1)
    else:
        made["weight_g_idx"][5] = value
    source = one_module(tmp_path / "bad", made, config_of(group))
    with pytest.raises(BadInputError, match=message):
        ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "lm_head"])
def test_a_linear_is_never_made_a_table(name: str, tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32), ["Embedding", "re:.*q_proj"])
    config = config_of(group, ignore=[])
    source = one_module(tmp_path / "in", quantised(64, 96, group, 1), config, name)
    with pytest.raises(BadInputError, match=name):
        ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")


@pytest.mark.parametrize("target", ["re:.*self_attn$", "LlamaAttention", "re:.*lm_head"])
def test_rotations_beyond_quantised_modules_refuse_everything(target: str, tmp_path: Path) -> None:
    apply = [{"targets": [target], "location": "input", "ignore": []}]
    transform = {"config_groups": {"u": {"type": "hadamard", "apply": apply}}}
    made = quantised(64, 64, W4, 1)
    tensors = {f"m.layers.0.self_attn.q_proj.{local}": t for local, t in made.items()}
    tensors["lm_head.weight"] = torch.randn(32, 64)
    config = config_of(W4, transform_config=transform)
    source = write_checkpoint(tmp_path / "in", tensors, config)
    with pytest.raises(UnsupportedError, match=r"q_proj.*transform_config"):
        ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")


def test_packed_codes_of_another_convention_are_an_error(tmp_path: Path) -> None:
    made = {f"m.down_proj.{local}": t for local, t in quantised(64, 96, W4, 1).items()}
    made["m.experts.gate_up_proj_packed"] = torch.zeros(3, 64, 12, dtype=torch.int32)
    source = write_checkpoint(tmp_path / "in", made, config_of(W4))
    with pytest.raises(BadInputError, match=r"experts\.gate_up_proj_packed"):
        ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")


def test_empty_weights_are_bad_input(tmp_path: Path) -> None:
    group = group_config(weight_args(4, None), format="int-quantized", inputs=DYNAMIC_INT8)
    made = {"weight": torch.zeros(64, 0, dtype=torch.int8), "weight_scale": torch.ones(64, 1)}
    source = one_module(tmp_path / "in", made, config_of(group))
    with pytest.raises(BadInputError, match="no elements"):
        ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")


def test_a_config_inside_text_config(tmp_path: Path) -> None:
    made = {f"m.down_proj.{local}": t for local, t in quantised(64, 96, W4, 1).items()}
    text = {"hidden_size": 96, "quantization_config": config_of(W4)}
    source = write_checkpoint(tmp_path / "in", made, None, text_config=text)
    convert_and_back(source, tmp_path, "triton")
    config = read_json(tmp_path / "triton-out" / "config.json")
    ours = config["text_config"]["quantization_config"]
    assert ours["quant_method"] == "ctconvert"
    assert ours["source"] == text["quantization_config"]
    assert "quantization_config" not in config
