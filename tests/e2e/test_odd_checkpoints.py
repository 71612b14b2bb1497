"""Checkpoints with unusual data: converted exactly, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import (
    STATIC_INT8,
    config_of,
    experts,
    group_config,
    module,
    quantised,
    sparse24,
    weight_args,
    write_checkpoint,
)
from support.reference import equal, load_tensors, triton_wna16
from support.roundtrip import convert_and_back
from support.schemes import fp8

import ctconvert
from ctconvert.errors import BadInputError
from ctconvert.layouts import TARGETS

W4 = group_config(weight_args(4, 32))
W4_ASYM = group_config(weight_args(4, 32, symmetric=False))
NAME = "a.down_proj"


def one_module(folder: Path, made: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    return write_checkpoint(folder, module(NAME, made), config)


def refused(source: Path, target: str, says: str) -> None:
    """Converting fails with that message and leaves nothing."""
    out = source.parent / "out"
    with pytest.raises(BadInputError, match=rf"module {NAME}: .*{says}") as error:
        ctconvert.repack(source, out, target=target, device="cpu")
    assert "\n" not in str(error.value)
    assert not out.exists() and not out.with_name("out.partial").exists()


def test_stacked_experts_are_each_the_reference(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = experts(name, 48, 96, W4_ASYM)
    source = write_checkpoint(tmp_path / "in", tensors, config_of(W4_ASYM))
    for target in ("triton", "cuda"):
        convert_and_back(source, tmp_path, target)
    after = load_tensors(tmp_path / "triton-out")
    for expert in range(3):
        made = module("m", quantised(48, 96, W4_ASYM, expert))
        for local, tensor in triton_wna16(made, "m", 4).items():
            assert equal(after[f"{name}.{local}"][expert], tensor)


def test_stacked_experts_are_fused_one_by_one(tmp_path: Path) -> None:
    tensors = {}
    for leaf in ("gate_proj", "up_proj"):
        tensors |= experts(f"m.mlp.experts.{leaf}", 64, 96, W4_ASYM)
    source = write_checkpoint(tmp_path / "in", tensors, config_of(W4_ASYM))
    convert_and_back(source, tmp_path, "triton", fuse=True)
    made = load_tensors(tmp_path / "triton-out")
    assert made["m.mlp.experts.gate_up_proj.qweight"].shape == (3, 96, 16)


def test_stacked_experts_keep_their_biases(tmp_path: Path) -> None:
    tensors = experts("m.mlp.experts.up_proj", 64, 96, W4)
    tensors["m.mlp.experts.up_proj.bias"] = torch.randn(3, 64)
    source = write_checkpoint(tmp_path / "in", tensors, config_of(W4))
    convert_and_back(source, tmp_path, "triton")
    bias = "m.mlp.experts.up_proj.bias"
    assert torch.equal(load_tensors(tmp_path / "triton-out")[bias], tensors[bias])


@pytest.mark.parametrize("target", TARGETS)
def test_activation_scales_ride_along(target: str, tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32), inputs=STATIC_INT8, outputs=STATIC_INT8)
    before = quantised(64, 96, group, 1) | {"input_zero_point": torch.zeros(1, dtype=torch.int8)}
    convert_and_back(one_module(tmp_path / "in", before, config_of(group)), tmp_path, target)
    made = load_tensors(tmp_path / f"{target}-out")
    for local in ("input_scale", "output_scale"):
        assert made[f"{NAME}.{local}"].dtype == torch.float32
        assert torch.equal(made[f"{NAME}.{local}"], before[local].float())
    assert f"{NAME}.input_zero_point" not in made


def test_a_scale_of_zero_comes_back(tmp_path: Path) -> None:
    """It was never calibrated: no kernel gets it, and the source's checkpoint has it again."""
    group = group_config(weight_args(4, 32), inputs=STATIC_INT8, outputs=STATIC_INT8)
    made = quantised(64, 96, group, 1) | {"output_scale": torch.zeros(1).bfloat16()}
    convert_and_back(one_module(tmp_path / "in", made, config_of(group)), tmp_path, "triton")
    assert f"{NAME}.output_scale" not in load_tensors(tmp_path / "triton-out")


def test_asymmetric_activations_keep_their_zero_point(tmp_path: Path) -> None:
    inputs = STATIC_INT8 | {"symmetric": False}
    group = group_config(weight_args(8, None), format="int-quantized", inputs=inputs)
    made = quantised(64, 96, group, 1) | {"input_zero_point": torch.tensor([-7], dtype=torch.int8)}
    convert_and_back(one_module(tmp_path / "in", made, config_of(group)), tmp_path, "cuda")
    assert load_tensors(tmp_path / "cuda-out")[f"{NAME}.input_zero_point"].tolist() == [-7]


def test_a_zero_point_of_fp8_is_dropped_where_it_is_zero(tmp_path: Path) -> None:
    group = group_config(
        weight_args(8, None, kind="float"), format="float-quantized", inputs=fp8(False)
    )
    made = quantised(64, 96, group, 1) | {"input_zero_point": torch.zeros(1)}
    convert_and_back(one_module(tmp_path / "in", made, config_of(group)), tmp_path, "cuda")
    assert f"{NAME}.input_zero_point" not in load_tensors(tmp_path / "cuda-out")


def test_bits_behind_the_last_code_are_not_lost_in_silence(tmp_path: Path) -> None:
    group = group_config(weight_args(4, None))
    made = quantised(24, 44, group, 1)
    made["weight_packed"][5, -1] |= 1 << 20
    refused(one_module(tmp_path / "in", made, config_of(group)), "triton", "row 5")


def test_bits_behind_the_last_zero_point_are_found(tmp_path: Path) -> None:
    made = quantised(68, 128, W4_ASYM, 1)
    convert_and_back(one_module(tmp_path / "in", made, config_of(W4_ASYM)), tmp_path, "cuda")
    made["weight_zero_point"][-1, 0] |= 1 << 28
    source = one_module(tmp_path / "bad", made, config_of(W4_ASYM))
    refused(source, "cuda", "weight_zero_point holds bits")


@pytest.mark.parametrize(
    ("value", "says"), [(1 << 32, "outside the 4 scale groups"), (None, "never applied")]
)
def test_group_indices_are_checked_as_stored(value: int | None, says: str, tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32, actorder="group"))
    made = quantised(64, 128, W4, 1)
    made["weight_g_idx"] = torch.arange(128) // 32
    convert_and_back(one_module(tmp_path / "in", made, config_of(group)), tmp_path, "cuda")
    if value is None:
        made["weight_g_idx"].fill_(-1)
    else:
        made["weight_g_idx"][5] = value
    refused(one_module(tmp_path / "bad", made, config_of(group)), "cuda", says)


@pytest.mark.parametrize("count", [3, 1])
def test_a_mask_that_does_not_keep_two_of_four(count: int, tmp_path: Path) -> None:
    made = sparse24(64, 128, {"weights": None}, 1)
    made["bitmask"][5, 3] = 0b0111_0011 if count == 3 else 0b0100_0011
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"]}
    config = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    refused(one_module(tmp_path / "in", made, config), "cuda", rf"row 5.*{count} of 4")


def test_a_config_inside_text_config(tmp_path: Path) -> None:
    tensors = module("m.down_proj", quantised(64, 96, W4, 1))
    text = {"hidden_size": 96, "quantization_config": config_of(W4)}
    source = write_checkpoint(tmp_path / "in", tensors, None, text_config=text)
    convert_and_back(source, tmp_path, "triton")
