"""Triton kernels of the 8-bit quantisation of activations; the steps are in ``kernel.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ctconvert.runtime.nvcc import KernelUnavailableError
from ctconvert.transforms.device import on_device


@triton.jit
def _to_int8(value, zero):
    """clamp(round(value) + zero), half to even; NaN counts as 0."""
    value = tl.where(value != value, 0.0, value)
    value = tl.minimum(tl.maximum(value, -512.0), 512.0)
    # Adding 1.5 * 2**23 leaves no fraction bits, so the addition itself rounds.
    value = (value + 12582912.0) - 12582912.0
    value = tl.minimum(tl.maximum(value + zero, -128.0), 127.0)
    return value.to(tl.int8)


@triton.jit
def _to_fp8(value, INTERPRET: tl.constexpr):
    """The nearest e4m3, ties to even, no larger than 448; a NaN stays one."""
    value = tl.where(value > 448.0, 448.0, tl.where(value < -448.0, -448.0, value))
    if INTERPRET:
        # Triton's interpreter does not carry a mantissa that rounds up into the exponent: leave
        # it nothing to round. Below 2**-6 the e4m3 are the multiples of 2**-9.
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        small = (value + 24576.0) - 24576.0
        normal = bits.to(tl.float32, bitcast=True)
        value = tl.where(tl.abs(value) < 0.015625, small, normal)
    return value.to(tl.float8e4nv)


@triton.jit
def _quantize_per_token(
    x_ptr,
    q_ptr,
    scale_ptr,
    units,  # tokens x groups
    columns,
    groups,
    size,  # columns of a group
    INT8: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # a group fits in one block
    INTERPRET: tl.constexpr,
):
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    row = (unit // groups).to(tl.int64)
    start = unit % groups * size
    end = tl.minimum(start + size, columns)
    inside = unit < units
    base = (row * columns + start)[:, None]
    width = tl.where(inside, end - start, 0)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    LARGEST: tl.constexpr = 127.0 if INT8 else 448.0

    largest = tl.zeros([UNITS], tl.float32)
    if WHOLE:
        x = tl.load(x_ptr + base + column, mask=column < width, other=0.0).to(tl.float32)
        size_of = tl.where(x != x, float("inf"), tl.abs(x))
        largest = tl.max(size_of, axis=1)
    else:
        for at in range(0, size, BLOCK):
            part = tl.load(x_ptr + base + at + column, mask=at + column < width, other=0.0)
            part = part.to(tl.float32)
            size_of = tl.where(part != part, float("inf"), tl.abs(part))
            largest = tl.maximum(largest, tl.max(size_of, axis=1))
    scale = tl.div_rn(largest, tl.full([UNITS], LARGEST, tl.float32))
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(scale_ptr + unit, scale, mask=inside)

    divisor = tl.broadcast_to(scale[:, None], [UNITS, BLOCK])
    if WHOLE:
        value = tl.div_rn(x, divisor)
        if INT8:
            q = _to_int8(value, 0.0)
        else:
            q = _to_fp8(value, INTERPRET)
        tl.store(q_ptr + base + column, q, mask=column < width)
    else:
        for at in range(0, size, BLOCK):
            part = tl.load(x_ptr + base + at + column, mask=at + column < width, other=0.0)
            value = tl.div_rn(part.to(tl.float32), divisor)
            if INT8:
                q = _to_int8(value, 0.0)
            else:
                q = _to_fp8(value, INTERPRET)
            tl.store(q_ptr + base + at + column, q, mask=at + column < width)


@triton.jit
def _quantize_static(
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_ptr,
    total,
    INT8: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    scale = tl.full([BLOCK], 0.0, tl.float32) + tl.load(scale_ptr)
    value = tl.div_rn(tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32), scale)
    if INT8:
        zero = 0.0
        if HAS_ZERO:
            zero = tl.load(zero_ptr).to(tl.float32)
        q = _to_int8(value, zero)
    else:
        q = _to_fp8(value, INTERPRET)
    tl.store(q_ptr + at, q, mask=mask)


def check_device(dtype: torch.dtype, device: torch.device) -> None:
    """Raises KernelUnavailableError on an NVIDIA GPU that has no f8: one before SM89."""
    if dtype == torch.int8 or device.type != "cuda" or torch.version.hip is not None:
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise KernelUnavailableError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; f8 "
            "needs 8.9: the reference runs with device cpu"
        )


def quantize_per_token(
    x: torch.Tensor, dtype: torch.dtype, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_per_token`` on arguments already checked."""
    check_device(dtype, x.device)
    k = x.shape[-1]
    size = min(group_size or k, k)
    groups = triton.cdiv(k, size)
    q = torch.empty_like(x, dtype=dtype)
    scale = torch.empty((*x.shape[:-1], groups), dtype=torch.float32, device=x.device)
    units = scale.numel()
    if units == 0:
        return q, scale
    whole = size <= 8192
    block = triton.next_power_of_2(size) if whole else 2048
    together = max(1, 1024 // block)
    with on_device(x.device):
        _quantize_per_token[(triton.cdiv(units, together),)](
            x,
            q,
            scale,
            units,
            k,
            groups,
            size,
            INT8=dtype == torch.int8,
            UNITS=together,
            BLOCK=block,
            WHOLE=whole,
            INTERPRET=x.device.type == "cpu",
            num_warps=4 if block <= 4096 else 8,
        )
    return q, scale


def quantize_static(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    dtype: torch.dtype = torch.int8,
) -> torch.Tensor:
    """``quantize_static`` on arguments already checked."""
    check_device(dtype, x.device)
    q = torch.empty_like(x, dtype=dtype)
    if x.numel() == 0:
        return q
    block = 2048
    with on_device(x.device):
        _quantize_static[(triton.cdiv(x.numel(), block),)](
            x,
            q,
            scale,
            zero_point if zero_point is not None else scale,
            x.numel(),
            INT8=dtype == torch.int8,
            HAS_ZERO=zero_point is not None,
            BLOCK=block,
            INTERPRET=x.device.type == "cpu",
            num_warps=4,
        )
    return q
