"""Triton kernels of the ``scaled-mm`` layout; the layout is in ``scaled_mm.py``.

Before: x f16, bf16 or f32 [M, K]; x_q and weight [N, K] i8 or f8_e4m3, both with K contiguous.
After: x_q and its scale; out [M, N] = x_q @ weight.T, scaled.

Where a small M gives too few tiles to fill the device, K is split: the parts go to a workspace
[splits, M, N] (int32 or float32) and one more kernel adds them in a fixed order and scales them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ctconvert.device import on_device
from ctconvert.runtime.kernels._common import (
    has_large_shared_memory,
    multiprocessors,
)
from ctconvert.runtime.nvcc import KernelUnavailableError


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


@triton.jit
def _gemm(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    zero_ptr,
    w_sum_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    steps,  # of BK columns that one program takes
    x_scale_row,
    x_scale_block,
    w_scale_row,
    INT8: tl.constexpr,
    BLOCKWISE: tl.constexpr,  # scales for 128 x 128 blocks; BK is 128
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,  # store unscaled sums (block-wise: scaled ones) to [splits, M, N]
    EVEN: tl.constexpr,  # K is a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,  # tiles of M that run side by side and share the weight's cache lines
):
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    panel = pid // (GROUP_M * tiles_n)
    panel_m = tl.minimum(tiles_m - panel * GROUP_M, GROUP_M)
    pid_m = panel * GROUP_M + pid % (GROUP_M * tiles_n) % panel_m
    pid_n = pid % (GROUP_M * tiles_n) // panel_m
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, tl.cdiv(K, BK))

    m = pid_m * BM + tl.arange(0, BM)
    n = pid_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Rows past the end read the last one again; they are not stored.
    m_safe = tl.minimum(m, M - 1)
    n_safe = tl.minimum(n, N - 1)
    x_ptrs = x_ptr + m_safe.to(tl.int64)[:, None] * K + (first * BK + k)[None, :]
    w_ptrs = w_ptr + n_safe.to(tl.int64)[None, :] * K + (first * BK + k)[:, None]
    KIND: tl.constexpr = tl.int32 if INT8 else tl.float32
    acc = tl.zeros([BM, BN], KIND)
    for step in range(first, last):
        if EVEN:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(step * BK + k < K)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(step * BK + k < K)[:, None], other=0.0)
        if INT8:
            acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        elif BLOCKWISE:
            x_scale = tl.load(x_scale_ptr + m_safe * x_scale_row + step * x_scale_block)
            w_scale = tl.load(w_scale_ptr + n_safe // 128 * w_scale_row + step)
            acc += tl.dot(x, w, max_num_imprecise_acc=BK) * x_scale[:, None] * w_scale[None, :]
        else:
            # Hopper adds f8 products in fewer bits than float32: empty that sum every BK.
            acc = tl.dot(x, w, acc, max_num_imprecise_acc=BK)
        x_ptrs += BK
        w_ptrs += BK

    mask = (m < M)[:, None] & (n < N)[None, :]
    offsets = m.to(tl.int64)[:, None] * N + n[None, :]
    if SPLIT:
        offsets += tl.program_id(1).to(tl.int64) * M * N
        tl.store(out_ptr + offsets, acc, mask=mask)
    else:
        if HAS_ZERO:
            acc -= tl.load(zero_ptr).to(tl.int32) * tl.load(w_sum_ptr + n_safe)[None, :]
        out = acc.to(tl.float32)
        if not BLOCKWISE:
            out *= tl.load(x_scale_ptr + m_safe * x_scale_row)[:, None]
            out *= tl.load(w_scale_ptr + n_safe * w_scale_row)[None, :]
        if HAS_BIAS:
            out += tl.load(bias_ptr + n_safe).to(tl.float32)[None, :]
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish(
    part_ptr,
    x_scale_ptr,
    w_scale_ptr,
    zero_ptr,
    w_sum_ptr,
    bias_ptr,
    out_ptr,
    total,
    N,
    x_scale_row,
    w_scale_row,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,  # the parts are scaled already
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = (sum of part [splits, M, N] - zero * weight_sum) * scales + bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    m = at // N
    n = at % N
    acc = tl.load(part_ptr + at, mask=mask, other=0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(part_ptr + split * total + at, mask=mask, other=0)
    if HAS_ZERO:
        acc -= tl.load(zero_ptr).to(tl.int32) * tl.load(w_sum_ptr + n, mask=mask, other=0)
    out = acc.to(tl.float32)
    if not SCALED:
        out *= tl.load(x_scale_ptr + m * x_scale_row, mask=mask, other=0.0)
        out *= tl.load(w_scale_ptr + n * w_scale_row, mask=mask, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def _check_device(dtype: torch.dtype, device: torch.device) -> None:
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
    x: torch.Tensor, dtype: torch.dtype, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`ctconvert.runtime.kernels.scaled_mm.quantize_per_token`, arguments checked."""
    _check_device(dtype, x.device)
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
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """:func:`ctconvert.runtime.kernels.scaled_mm.quantize_static`, arguments checked."""
    _check_device(dtype, x.device)
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


class Config(NamedTuple):
    """Tile of one program (tokens, columns, K a step) and how it is run."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    splits: int


def _choose(m: int, n: int, k: int, int8: bool, blockwise: bool, device: torch.device) -> Config:
    """Tile and splits for [m, k] x [n, k], measured on an H200 (tests/bench/bench_scaled_mm.py)."""
    block_k = 128 if blockwise else 256
    if m <= 32:
        config = Config(16 if m <= 16 else 32, 64, block_k, 4, 4, 1)
    elif m <= 64:
        config = Config(64, 64, block_k, 4, 3, 1)
    elif m <= 256:
        config = Config(64, 128, 128, 4, 4, 1)
    elif int8 or blockwise:
        config = Config(128, 128, 128, 8, 3, 1)
    else:
        config = Config(256, 128, 128, 8, 3, 1)
    if not has_large_shared_memory(device):
        config = Config(min(config.block_m, 64), 64, 128, 4, 2, 1)
    sms = multiprocessors(device)
    steps = triton.cdiv(k, config.block_k)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    splits = max(1, min(steps // 2, 2 * sms // tiles, 8))
    return config._replace(splits=splits)


def _torch_is_faster(
    x_q: torch.Tensor, weight: torch.Tensor, blockwise: bool, out_dtype: torch.dtype
) -> bool:
    """Whether torch's own product takes these operands and was measured faster (on an H200).

    f8 of more than 64 tokens: ``torch._scaled_mm`` with scales for rows and columns, which gives
    bf16 and wants multiples of 16. ``torch._int_mm`` leaves the int32 product to be scaled by
    another kernel, and the Triton kernel is as fast or faster before that.
    """
    if x_q.device.type != "cuda" or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(x_q.device) < (9, 0):
        return False
    if weight.dtype == torch.int8 or blockwise or out_dtype != torch.bfloat16:
        return False
    return x_q.shape[0] > 64 and weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0


def scaled_mm(
    x_q: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> torch.Tensor:
    """:func:`ctconvert.runtime.kernels.scaled_mm.scaled_mm` on arguments already checked.

    ``config`` forces the Triton kernel and its tile.
    """
    _check_device(weight.dtype, x_q.device)
    m, k = x_q.shape
    n = weight.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=x_q.device)
    if out.numel() == 0:
        return out
    int8 = weight.dtype == torch.int8
    blockwise = weight_scale.dim() == 2 and tuple(weight_scale.shape) != (n, 1)
    if config is None and _torch_is_faster(x_q, weight, blockwise, out_dtype):
        return torch._scaled_mm(
            x_q,
            weight.t(),
            scale_a=x_scale.expand(m, 1).contiguous() if x_scale.numel() == 1 else x_scale,
            scale_b=weight_scale.reshape(1, -1).expand(1, n).contiguous(),
            bias=None if bias is None else bias.to(out_dtype),
            out_dtype=out_dtype,
            use_fast_accum=False,
        )
    if config is None:
        config = _choose(m, n, k, int8, blockwise, x_q.device)
    steps = triton.cdiv(triton.cdiv(k, config.block_k), config.splits)
    splits = triton.cdiv(triton.cdiv(k, config.block_k), steps)
    x_scale_row = x_scale.stride(0) if x_scale.numel() > 1 else 0
    x_scale_block = 1 if x_scale.dim() == 2 and x_scale.shape[1] > 1 else 0
    w_scale_row = weight_scale.stride(0) if weight_scale.numel() > 1 else 0
    unused = weight_scale
    scales = (
        x_scale,
        weight_scale,
        x_zero_point if x_zero_point is not None else unused,
        weight_sum if weight_sum is not None else unused,
        bias if bias is not None else unused,
    )
    target = out
    if splits > 1:
        kind = torch.int32 if int8 else torch.float32
        target = torch.empty((splits, m, n), dtype=kind, device=x_q.device)
    with on_device(x_q.device):
        grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n), splits)
        _gemm[grid](
            x_q,
            weight,
            *scales,
            target,
            m,
            n,
            k,
            steps,
            x_scale_row,
            x_scale_block,
            w_scale_row,
            INT8=int8,
            BLOCKWISE=blockwise,
            HAS_ZERO=x_zero_point is not None,
            HAS_BIAS=bias is not None,
            SPLIT=splits > 1,
            EVEN=k % config.block_k == 0,
            BM=config.block_m,
            BN=config.block_n,
            BK=config.block_k,
            GROUP_M=8,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        if splits > 1:
            block = 512
            _finish[(triton.cdiv(m * n, block),)](
                target,
                *scales,
                out,
                m * n,
                n,
                x_scale_row,
                w_scale_row,
                SPLITS=splits,
                SCALED=blockwise,
                HAS_ZERO=x_zero_point is not None,
                HAS_BIAS=bias is not None,
                BLOCK=block,
                num_warps=4,
            )
    return out
