"""Triton kernels of the ``scaled-mm`` layout; the layout is in ``kernel.py``.

Before: x_q [M, K] and weight [N, K] i8 or f8_e4m3, both with K contiguous.
After: out [M, N] = x_q @ weight.T, scaled.

Where a small M gives too few tiles to fill the device, K is split: the parts go to a workspace
[splits, M, N] (int32 or float32) and one more kernel adds them in a fixed order and scales them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ctconvert.runtime.kernels.hardware import has_large_shared_memory, multiprocessors
from ctconvert.runtime.kernels.quantize.triton import check_device
from ctconvert.runtime.kernels.scaled_mm.reference import is_blockwise
from ctconvert.transforms.device import on_device


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
    *,
    x_zero_point: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> torch.Tensor:
    """``scaled_mm`` on arguments already checked.

    ``config`` forces the Triton kernel and its tile.
    """
    check_device(weight.dtype, x_q.device)
    m, k = x_q.shape
    n = weight.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=x_q.device)
    if out.numel() == 0:
        return out
    int8 = weight.dtype == torch.int8
    blockwise = is_blockwise(weight, weight_scale)
    if x_zero_point is not None and weight_sum is None:
        weight_sum = weight.sum(dim=1, dtype=torch.int32)
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
