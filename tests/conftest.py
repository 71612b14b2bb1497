"""Shared by all tests: Triton's interpreter where there is no GPU, and the ``gpu`` marker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.paths import CHECKPOINTS, EXAMPLE, ROOT

__all__ = ["CHECKPOINTS", "EXAMPLE", "GPU", "ROOT"]

GPU = torch.cuda.is_available()
if not GPU:  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("COLUMNS", None)  # tables are as wide as they are
torch.set_num_threads(1)  # tensors are small: a second thread costs more than it gives


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not GPU:
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What torch allocates is filled, integers with their greatest value: unwritten bytes show."""
    torch.use_deterministic_algorithms(True)
    assert (torch.empty(8, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path that transforms of CPU tensors take: torch's, or the kernels, interpreted."""
    if request.param == "triton":
        if GPU:
            pytest.skip("the kernels are compiled here")
        from ctconvert.transforms import dispatch

        monkeypatch.setattr(dispatch, "has_kernels", lambda tensor: True)
    return request.param


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
