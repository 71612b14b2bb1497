"""Shared by all tests: Triton's interpreter where there is no GPU, and the ``gpu`` marker."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "tests" / "checkpoints"
EXAMPLE = ROOT / "examples" / "smollm2-w4a16-g64"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not GPU:
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch allocates, so that an element nobody writes shows."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)

        def poison(*args: Any, plain: Any = plain, **options: Any) -> torch.Tensor:
            tensor: torch.Tensor = plain(*args, **options)
            return tensor.copy_(torch.tensor(torch.nan if tensor.is_floating_point() else 77))

        monkeypatch.setattr(torch, name, poison)


@pytest.fixture(scope="session")
def cutlass() -> None:
    """The 2:4 kernels of every element type, compiled side by side; skips where they cannot be."""
    from ctconvert.runtime import nvcc
    from ctconvert.runtime.kernels.sparse24.cutlass import library

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the 2:4 kernels need compute capability 9.0")
    try:
        nvcc.find_nvcc()
        nvcc.cutlass_include()
    except nvcc.KernelUnavailableError as missing:
        pytest.skip(str(missing))
    f16, bf16 = torch.float16, torch.bfloat16
    types = ((f16, f16), (bf16, bf16), (torch.int8, f16), (torch.float8_e4m3fn, bf16))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda pair: library(*pair), types))
