"""The Triton kernels of :mod:`ctconvert.transforms.nvfp4`, which describes the layout.

A program takes a run of 64 rows by ``GROUPS`` groups: it loads the rows, changes the bytes where
they hold scales, turns the block round and stores whole runs of 64 bytes; or the other way.

The launchers also take CPU tensors where Triton's interpreter runs the kernels.
"""

# Kernel arguments have Triton's types, not Python's.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ctconvert.transforms.device import on_device

# Groups of a program, and its warps.
_GROUPS = (64, 4)


@triton.jit
def _log2(value):
    """floor(log2) of 1 .. 7, 0 for 0."""
    return (value >= 2).to(tl.int32) + (value >= 4).to(tl.int32)


@triton.jit
def _pack_kernel(
    src,
    dst,
    lost,
    n,
    groups,
    lost_width,
    POWER: tl.constexpr,
    BYTES: tl.constexpr,  # whether they stay what they are
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * 64 + tl.arange(0, 64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = src + row[:, None] * groups + group[None, :]
    x = tl.load(at, mask=(group < groups)[None, :], other=0).to(tl.int32)
    if not BYTES:
        log2 = _log2(x)
        kept = (log2 + POWER >= 3) & (x > 0)
        small = ((log2 + 13 + POWER) << 3) | ((x << (3 - log2)) & 7)
        flushed = tl.where((x < 8) & ~kept, x, 0)
        x = tl.where(x >= 8, x + (15 + POWER) * 8, tl.where(kept, small, 0))
        even, odd = tl.split(flushed.reshape(64, GROUPS // 2, 2))
        pair = tl.program_id(1) * (GROUPS // 2) + tl.arange(0, GROUPS // 2)
        at = lost + row[:, None] * lost_width + pair[None, :]
        tl.store(at, (even | (odd << 4)).to(tl.uint8), mask=(pair < lost_width)[None, :])
    x = x.to(tl.uint8).reshape(2, 2, 2, 8, GROUPS).permute(4, 3, 0, 2, 1).reshape(GROUPS, 64)
    column = tl.program_id(0) * 64 + tl.arange(0, 64)
    at = dst + group.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(at, x, mask=(group < groups)[:, None])


@triton.jit
def _unpack_kernel(
    src,
    dst,
    lost,
    n,
    groups,
    lost_width,
    POWER: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * 64 + tl.arange(0, 64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = tl.program_id(0) * 64 + tl.arange(0, 64)
    at = src + group.to(tl.int64)[:, None] * n + column[None, :]
    y = tl.load(at, mask=(group < groups)[:, None], other=0)
    y = y.reshape(GROUPS, 8, 2, 2, 2).permute(2, 4, 3, 1, 0).reshape(64, GROUPS)
    if not BYTES:
        y = y.to(tl.int32)
        pair = tl.program_id(1) * (GROUPS // 2) + tl.arange(0, GROUPS // 2)
        at = lost + row[:, None] * lost_width + pair[None, :]
        nibbles = tl.load(at, mask=(pair < lost_width)[None, :], other=0).to(tl.int32)
        flushed = tl.join(nibbles & 15, nibbles >> 4).reshape(64, GROUPS)
        log2 = (y >> 3) - 13 - POWER
        exact = (log2 >= 0) & (log2 < 3) & (y >= 128)
        small = (8 | (y & 7)) >> (3 - tl.where(exact, log2, 0))
        normal = y >= (16 + POWER) * 8
        y = tl.where(normal, y - (15 + POWER) * 8, tl.where(exact, small, 0)) | flushed
    at = dst + row[:, None] * groups + group[None, :]
    tl.store(at, y.to(tl.uint8), mask=(group < groups)[None, :])


def pack_scales(raw: torch.Tensor, power: int) -> tuple[torch.Tensor, torch.Tensor]:
    """u8 [N, G], contiguous, every byte checked, to (u8 [G, N], lost u8 [N, ceil(G/2)])."""
    n, groups = raw.shape
    made, lost = raw.new_empty((groups, n)), raw.new_empty((n, -(-groups // 2)))
    _launch(_pack_kernel, raw, made, lost, n, groups, power, False)
    return made, lost


def unpack_scales(packed: torch.Tensor, lost: torch.Tensor, power: int) -> torch.Tensor:
    """u8 [G, N] and lost u8 [N, ceil(G/2)], contiguous, to u8 [N, G]."""
    groups, n = packed.shape
    made = packed.new_empty((n, groups))
    _launch(_unpack_kernel, packed, made, lost, n, groups, power, False)
    return made


def tile_scales(raw: torch.Tensor) -> torch.Tensor:
    """u8 [N, G], contiguous, to u8 [G, N]."""
    n, groups = raw.shape
    made = raw.new_empty((groups, n))
    _launch(_pack_kernel, raw, made, raw, n, groups, 0, True)
    return made


def untile_scales(tiled: torch.Tensor) -> torch.Tensor:
    """u8 [G, N], contiguous, to u8 [N, G]."""
    groups, n = tiled.shape
    made = tiled.new_empty((n, groups))
    _launch(_unpack_kernel, tiled, made, tiled, n, groups, 0, True)
    return made


def _launch(
    kernel: triton.JITFunction,
    source: torch.Tensor,
    made: torch.Tensor,
    lost: torch.Tensor,
    n: int,
    groups: int,
    power: int,
    raw: bool,
) -> None:
    if not source.numel():
        return
    block, warps = _GROUPS
    with on_device(source.device):
        kernel[(n // 64, triton.cdiv(groups, block))](
            source,
            made,
            lost,
            n,
            groups,
            -(-groups // 2),
            POWER=power,
            BYTES=raw,
            GROUPS=block,
            num_warps=warps,
        )
