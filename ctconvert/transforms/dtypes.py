"""safetensors dtype names and torch dtypes, and raw bytes as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ctconvert import memory
from ctconvert.specs import Dtype, TensorSpec

_TORCH: Mapping[Dtype, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
_NAMES: Mapping[torch.dtype, Dtype] = {dtype: name for name, dtype in _TORCH.items()}


def torch_dtype(name: Dtype) -> torch.dtype:
    """The torch dtype of a safetensors dtype name."""
    return _TORCH[name]


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """The spec a tensor has in a safetensors header."""
    return TensorSpec(_NAMES[tensor.dtype], tuple(tensor.shape))


def from_bytes(data: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """A flat u8 tensor as a tensor of ``spec``, sharing memory."""
    return data.view(torch_dtype(spec.dtype)).view(spec.shape)


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """A contiguous tensor of any content; on the CPU a large one is in memory that was used before.

    Raises:
        MemoryError, RuntimeError: there is no memory left.
    """
    shape, count = tuple(shape), math.prod(shape)
    if count * dtype.itemsize < memory.LEAST or (device is not None and device.type != "cpu"):
        return torch.empty(shape, dtype=dtype, device=device)
    data = memory.POOL.take(count * dtype.itemsize)
    return torch.frombuffer(data, dtype=dtype, count=count).view(shape)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, sharing memory.

    Raises:
        ValueError: the tensor is not contiguous or not on the CPU.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("only contiguous CPU tensors have bytes to write")
    return _flat(tensor).numpy().data


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, u8 1-D."""
    flat = tensor.reshape(-1)
    if flat.stride(0) != 1:  # one element can have any stride, and torch calls it contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, shape and bit pattern (NaN and -0.0 included)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = _flat(a), _flat(b)
    if left.data_ptr() == right.data_ptr() and left.device == right.device:
        return True  # one memory: a layout that keeps a tensor as it is
    # Words first: torch compares eight bytes in the time of one.
    whole = left.numel() & -8
    aligned = all(side.data_ptr() % 8 == side.storage_offset() % 8 == 0 for side in (left, right))
    if whole and aligned:
        if not torch.equal(left[:whole].view(torch.int64), right[:whole].view(torch.int64)):
            return False
        left, right = left[whole:], right[whole:]
    return torch.equal(left, right)
