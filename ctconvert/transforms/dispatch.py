"""Which path a transform takes."""

from __future__ import annotations

import torch

from ctconvert.transforms.device import ACCELERATORS


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels take the tensor; the torch code of ``cpu.py`` does otherwise."""
    return tensor.device.type in ACCELERATORS
