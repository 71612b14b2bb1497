"""Gates of one row or four, and other N that fill no word and no tile, for every layout.

Whole conversions: repack, verify, restore. A layout that is not here has no use for padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.block_floats import FP8, fp8_group, mxfp8, mxfp8_group, nvfp4, nvfp4_group
from support.builders import (
    DYNAMIC_INT8,
    config_of,
    group_config,
    module,
    quantised,
    weight_args,
    write_checkpoint,
)
from support.reference import framed, load_tensors, pack_last, unsigned_codes
from support.roundtrip import convert_and_back

import ctconvert
from ctconvert.assembly import Pad
from ctconvert.layouts import LAYOUTS
from ctconvert.output import Output

ROWS, K = (1, 4, 12, 100), 256
FP4 = weight_args(4, 32, kind="float")
W4A8_FP8 = DYNAMIC_INT8 | {"type": "float"}
#: What each layout is tried with.
GROUPS: dict[str, list[dict[str, Any]]] = {
    "triton-wna16": [group_config(weight_args(bits, 32, False)) for bits in (2, 4, 8)]
    + [group_config(weight_args(4, None), format="int-quantized")],
    "marlin": [group_config(weight_args(bits, 32, False)) for bits in (4, 8)],
    "marlin-mxfp4": [group_config(FP4, format="mxfp4-pack-quantized")],
    "scaled-mm": [group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8)],
    "xpu-w4a8": [group_config(weight_args(4, 32), inputs=DYNAMIC_INT8)],
    "xpu-w4a16": [group_config(weight_args(4, 64)), group_config(weight_args(4, None))],
    "machete": [group_config(weight_args(bits, 64, False)) for bits in (4, 8)],
    "humming": [group_config(weight_args(4, 32, False)), group_config(weight_args(8, 32))],
    "humming-nvfp4": [nvfp4_group()],
    "marlin-nvfp4": [nvfp4_group(False)],
    "marlin-nvfp4-f16": [nvfp4_group()],
    "marlin-fp8": [
        fp8_group(),
        fp8_group("tensor"),
        fp8_group("block", block_structure=[128, 128]),
        fp8_group("block", block_structure=[2, 64]),
    ],
    "marlin-fp8-f16": [fp8_group(inputs=FP8)],
    "marlin-mxfp8": [mxfp8_group()],
    "nvfp4-cutlass": [nvfp4_group()],
    "mxfp8-swizzled": [mxfp8_group(True)],
    "mxfp4-swizzled": [
        group_config(FP4, format="mxfp4-pack-quantized", inputs=FP4 | {"dynamic": True})
    ],
    "w4a8-fp8": [
        group_config(weight_args(4, 128), format=format, inputs=W4A8_FP8)
        for format in ("int-quantized", "pack-quantized")
    ],
    "cpu-w4a16": [group_config(weight_args(4, 32, False))],
    "cpu-w4a8": [group_config(weight_args(4, None, False), inputs=DYNAMIC_INT8)],
    "cpu-int8": [group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8)],
}
#: A 2:4 kernel copies eight rows at a time; a look-up has no tiles.
WITHOUT = {"cutlass-sparse24", "gather"}
CASES = [(name, index) for name, groups in GROUPS.items() for index in range(len(groups))]


def checkpoint(folder: Path, group: dict[str, Any]) -> tuple[Path, dict[str, torch.Tensor]]:
    """Modules ``n1.down_proj``, ... of each number of rows."""
    tensors: dict[str, torch.Tensor] = {}
    for n in ROWS:
        if group["format"] == "nvfp4-pack-quantized":
            made = nvfp4(n, K, n, inputs=bool(group["input_activations"]))
        elif group["format"] == "mxfp8-quantized":
            made = mxfp8(n, K, n)
        else:
            made = quantised(n, K, group, n)
        tensors |= module(f"n{n}.down_proj", made)
    return write_checkpoint(folder / "in", tensors, config_of(group)), tensors


def test_every_layout_is_tried() -> None:
    assert GROUPS.keys() == {layout.name for layout in LAYOUTS} - WITHOUT


@pytest.mark.parametrize(("layout", "index"), CASES)
def test_few_rows(layout: str, index: int, tmp_path: Path) -> None:
    source, _ = checkpoint(tmp_path, GROUPS[layout][index])
    convert_and_back(source, tmp_path, "cuda", layout={"*": layout})
    modules = Output.open(tmp_path / "cuda-out").plan.modules
    assert [item.logical.n for item in modules] == sorted(ROWS, key=str)
    for item in modules:
        assert item.recipe.layout == layout
        assert isinstance(item.recipe.assembly, Pad) or layout in ("scaled-mm", "triton-wna16")
        assert item.recipe.weight.k == item.logical.k == K


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_padded_triton_words(bits: int, tmp_path: Path) -> None:
    group = group_config(weight_args(bits, 32, False))
    source, tensors = checkpoint(tmp_path, group)
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    made = load_tensors(tmp_path / "out")
    for n in ROWS:
        name, f = f"n{n}.down_proj", 32 // bits
        wide = -(-n // f) * f
        codes = framed(unsigned_codes(tensors, name, bits), wide, K)
        assert torch.equal(made[f"{name}.qweight"], pack_last(codes.T, bits))
        assert made[f"{name}.scales"].shape == (K // 32, wide)
        assert not made[f"{name}.scales"][:, n:].any()
        assert made[f"{name}.scales"][:, :n].all()


@pytest.mark.parametrize(
    ("target", "group"),
    [
        ("triton", group_config(weight_args(2, 32, False))),
        ("triton", group_config(weight_args(4, None))),
        ("xpu", group_config(weight_args(4, 32))),
        ("xpu", group_config(weight_args(4, 32), inputs=DYNAMIC_INT8)),
    ],
)
def test_the_kernels_give_only_the_rows_there_are(
    target: str, group: dict[str, Any], tmp_path: Path
) -> None:
    _, tensors = checkpoint(tmp_path, group)
    for n in ROWS:
        tensors[f"n{n}.down_proj.bias"] = torch.randn(n).bfloat16()
    source = write_checkpoint(tmp_path / "biased", tensors, config_of(group))
    ctconvert.repack(source, tmp_path / "out", target=target, device="cpu")
    found = ctconvert.verify(tmp_path / "out", kernels=True, device="cpu")
    assert sum(run.modules for run in found.kernels.values()) == len(ROWS)
