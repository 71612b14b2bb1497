"""Whole conversions on a GPU: the same bytes as on the CPU, for every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import CHECKPOINTS
from test_schemes import REAL

import ctconvert

CASES = [
    (name, target) for name, targets in REAL.items() for target, made in targets.items() if made
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "target"), CASES)
@pytest.mark.parametrize("fuse", [False, True])
def test_the_gpu_writes_the_cpus_bytes(name: str, target: str, fuse: bool, tmp_path: Path) -> None:
    source = CHECKPOINTS / name
    for device in ("cpu", "cuda"):
        ctconvert.repack(source, tmp_path / device, target=target, device=device, fuse=fuse)
        ctconvert.restore(tmp_path / device, tmp_path / f"{device}-back", device=device)
    for folder in ("", "-back"):
        names = {path.name for path in (tmp_path / f"cpu{folder}").iterdir()}
        assert names == {path.name for path in (tmp_path / f"cuda{folder}").iterdir()}
        for file in names:
            made = (tmp_path / f"cuda{folder}" / file).read_bytes()
            assert made == (tmp_path / f"cpu{folder}" / file).read_bytes(), file
