"""Small converted checkpoints for the tests of the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ctconvert
from ctconvert.runtime import kernels
from support.builders import write_checkpoint
from support.paths import CHECKPOINTS


def converted(name: str, target: str, folder: Path, **options: Any) -> Path:
    """The output for a checkpoint of ``tests/checkpoints``."""
    out = folder / "out"
    ctconvert.repack(CHECKPOINTS / name, out, target=target, device="cpu", **options)
    return out


def converted_module(
    made: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    target: str,
    folder: Path,
    name: str = "model.down_proj",
    **options: Any,
) -> Path:
    """The output for a checkpoint of one module, ``made`` being its tensors by local name."""
    tensors = {f"{name}.{local}": value for local, value in made.items()}
    source = write_checkpoint(folder / "in", tensors, config)
    ctconvert.repack(source, folder / "out", target=target, device="cpu", **options)
    return folder / "out"


def put_kernel(monkeypatch: pytest.MonkeyPatch, layout: str, run: Any = None, **more: Any) -> None:
    """Makes ``run`` the kernel of a layout, or changes more of its record."""
    changes = more if run is None else {"run": run, **more}
    changed = tuple(
        replace(kernel, **changes) if kernel.layout == layout else kernel
        for kernel in kernels.KERNELS
    )
    monkeypatch.setattr(kernels, "KERNELS", changed)
