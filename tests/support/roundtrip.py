"""Whole conversions, there and back, against the source's own tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import ctconvert
from ctconvert.records import Report
from support.reference import equal, load_tensors


def dense24(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """The dense weight of a bitmask module, one row at a time, zeros positive."""
    n, k = tensors[f"{module}.shape"].flatten().tolist()
    values, mask = tensors[f"{module}.compressed"], tensors[f"{module}.bitmask"]
    raw = values.view(torch.int16 if values.element_size() == 2 else torch.int8)
    dense = torch.zeros((n, k), dtype=raw.dtype)
    for row in range(n):
        kept = (mask[row].unsqueeze(-1) >> torch.arange(8)).bitwise_and(1).flatten()[:k].bool()
        dense[row, kept] = raw[row]
    if values.element_size() == 2:
        dense[dense == -(1 << 15)] = 0
    return dense


def check_restored(source: Path, restored: Path) -> None:
    """Every tensor is the source's, 2:4 sparse modules as dense; config.json to the byte."""
    before, after = load_tensors(source), load_tensors(restored)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        module, _, local = name.rpartition(".")
        assert after[name].dtype == tensor.dtype
        assert after[name].shape == tensor.shape
        if local == "compressed":
            assert torch.equal(dense24(before, module), dense24(after, module)), module
        elif local != "bitmask":
            assert equal(after[name], tensor), name
    assert (restored / "config.json").read_bytes() == (source / "config.json").read_bytes()


def convert_and_back(source: Path, folder: Path, target: str, **options: Any) -> Report:
    """Converts, verifies against the source, restores and compares with it.

    The output is ``folder/TARGET-out``.
    """
    out, back = folder / f"{target}-out", folder / f"{target}-back"
    report = ctconvert.repack(source, out, target=target, device="cpu", **options)
    ctconvert.verify(out, against=source)
    ctconvert.restore(out, back, device="cpu")
    check_restored(source, back)
    return report
