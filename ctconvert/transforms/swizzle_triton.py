"""The Triton kernels of :mod:`ctconvert.transforms.swizzle`, which describes the layout.

A program takes 128 rows by ``TILES`` tiles of four groups: it loads rows and stores the tiles, 512
bytes each, one after another; or the other way.

The launchers also take CPU tensors where Triton's interpreter runs the kernels.
"""

# Kernel arguments have Triton's types, not Python's.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ctconvert.transforms.device import on_device

# Tiles of a program, and its warps.
_TILES = (16, 4)


@triton.jit
def _swizzle_kernel(src, dst, n, groups, tiles, TILES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    group = tl.program_id(1) * (TILES * 4) + tl.arange(0, TILES * 4)
    inside = (row < n)[:, None] & (group < groups)[None, :]
    x = tl.load(src + row[:, None] * groups + group[None, :], mask=inside, other=0)
    x = x.reshape(4, 32, TILES, 4).permute(2, 1, 0, 3).reshape(TILES, 512)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    at = (tl.program_id(0).to(tl.int64) * tiles + tile)[:, None] * 512 + tl.arange(0, 512)[None, :]
    tl.store(dst + at, x, mask=(tile < tiles)[:, None])


@triton.jit
def _unswizzle_kernel(src, dst, n, groups, tiles, TILES: tl.constexpr):
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    at = (tl.program_id(0).to(tl.int64) * tiles + tile)[:, None] * 512 + tl.arange(0, 512)[None, :]
    x = tl.load(src + at, mask=(tile < tiles)[:, None], other=0)
    x = x.reshape(TILES, 32, 4, 4).permute(2, 1, 0, 3).reshape(128, TILES * 4)
    row = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    group = tl.program_id(1) * (TILES * 4) + tl.arange(0, TILES * 4)
    inside = (row < n)[:, None] & (group < groups)[None, :]
    tl.store(dst + row[:, None] * groups + group[None, :], x, mask=inside)


def swizzle(raw: torch.Tensor) -> torch.Tensor:
    """u8 [N, G], contiguous, to u8 [Np, Q]."""
    n, groups = raw.shape
    made = raw.new_empty((-(-n // 128) * 128, -(-groups // 4) * 4))
    _launch(_swizzle_kernel, raw, made, n, groups, *made.shape)
    return made


def unswizzle(raw: torch.Tensor, n: int, groups: int) -> torch.Tensor:
    """u8 [Np, Q], contiguous, to u8 [N, G]; what was added is not looked at."""
    made = raw.new_empty((n, groups))
    _launch(_unswizzle_kernel, raw, made, n, groups, *raw.shape)
    return made


def _launch(
    kernel: triton.JITFunction,
    source: torch.Tensor,
    made: torch.Tensor,
    n: int,
    groups: int,
    height: int,
    width: int,
) -> None:
    if not source.numel():
        return
    block, warps = _TILES
    tiles = width // 4
    with on_device(source.device):
        kernel[(height // 128, triton.cdiv(tiles, block))](
            source, made, n, groups, tiles, TILES=block, num_warps=warps
        )
