"""Gates of one row or four, and other N that fill no word and no tile, for every layout.

Whole conversions: repack, verify, restore. A layout that is not here has no use for padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import (
    DYNAMIC_INT8,
    config_of,
    group_config,
    module,
    weight_args,
    write_checkpoint,
)
from support.reference import framed, load_tensors, pack_last, unsigned_codes
from support.roundtrip import convert_and_back
from support.schemes import LAYOUT_GROUPS, module_of

import ctconvert
from ctconvert.assembly import Pad
from ctconvert.layouts import LAYOUTS
from ctconvert.output import Output

ROWS, K = (1, 4, 12, 100), 256
#: A 2:4 kernel copies eight rows at a time; a look-up has no tiles.
WITHOUT = {"cutlass-sparse24", "gather"}
CASES = [(name, index) for name, groups in LAYOUT_GROUPS.items() for index in range(len(groups))]


def checkpoint(folder: Path, group: dict[str, Any]) -> tuple[Path, dict[str, torch.Tensor]]:
    """Modules ``n1.down_proj``, ... of each number of rows."""
    tensors: dict[str, torch.Tensor] = {}
    for n in ROWS:
        tensors |= module(f"n{n}.down_proj", module_of(n, K, group, n))
    return write_checkpoint(folder / "in", tensors, config_of(group)), tensors


def test_every_layout_is_tried() -> None:
    assert LAYOUT_GROUPS.keys() == {layout.name for layout in LAYOUTS} - WITHOUT


@pytest.mark.parametrize(("layout", "index"), CASES)
def test_few_rows(layout: str, index: int, tmp_path: Path) -> None:
    source, _ = checkpoint(tmp_path, LAYOUT_GROUPS[layout][index])
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
