"""Shared by all tests: Triton's interpreter where there is no GPU, and the ``gpu`` marker."""

from __future__ import annotations

import os

import pytest
import torch
from support.paths import CHECKPOINTS, EXAMPLE, ROOT

__all__ = ["CHECKPOINTS", "EXAMPLE", "GPU", "ROOT"]

GPU = torch.cuda.is_available()
if not GPU:  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # tensors are small: a second thread costs more than it gives


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not GPU:
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
