"""``scaled-mm``: the sums that asymmetric dynamic activations need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.builders import (
    DYNAMIC_INT8,
    config_of,
    group_config,
    module,
    quantised,
    weight_args,
    write_checkpoint,
)
from support.reference import load_tensors
from support.roundtrip import convert_and_back
from support.tamper import flip_bit

import ctconvert
from ctconvert.errors import UsageError, VerificationError
from ctconvert.runtime import load

PARTS = {"m.gate_proj": (72, 160), "m.up_proj": (40, 160), "m.down_proj": (36, 90)}


def asymmetric(format: str, symmetric: bool = True) -> dict[str, object]:
    inputs = DYNAMIC_INT8 | {"symmetric": False}
    return group_config(weight_args(8, None, symmetric), format=format, inputs=inputs)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("format", ["int-quantized", "pack-quantized"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_azp_adj_is_the_sum_of_the_codes(
    format: str, symmetric: bool, fuse: bool, tmp_path: Path
) -> None:
    group, plain = asymmetric(format, symmetric), asymmetric("int-quantized", symmetric)
    tensors, codes = {}, {}
    for seed, (name, shape) in enumerate(PARTS.items()):
        tensors |= module(name, quantised(*shape, group, seed))
        codes[name] = quantised(*shape, plain, seed)["weight"]  # the same, one a byte
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    report = convert_and_back(source, tmp_path, "cuda", fuse=fuse)
    assert set(report.layouts) == {"scaled-mm"}
    made = load_tensors(tmp_path / "cuda-out")
    joined = torch.cat([codes["m.gate_proj"], codes["m.up_proj"]])
    want = {"m.gate_up_proj": joined} if fuse else {name: codes[name] for name in list(PARTS)[:2]}
    for name, weight in (want | {"m.down_proj": codes["m.down_proj"]}).items():
        sums = [sum(row) for row in weight.tolist()]
        assert any(value < 0 for value in sums)
        found = made[f"{name}.azp_adj"]
        assert found.dtype == torch.int32 and found.tolist() == [sums]


def test_wrong_sums_are_found(tmp_path: Path) -> None:
    group = asymmetric("int-quantized")
    tensors = module("m.down_proj", quantised(72, 160, group, 1))
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")
    with flip_bit(tmp_path / "out", "m.down_proj.azp_adj", 5, bit=0):  # the hashes match
        ctconvert.verify(tmp_path / "out")
        with pytest.raises(VerificationError, match="azp_adj are not the sums of weight"):
            ctconvert.verify(tmp_path / "out", against=source)
    with pytest.raises(
        UsageError, match="no kernel for layout scaled-mm with activations int8 asym"
    ):
        load(tmp_path / "out", device="cpu")
