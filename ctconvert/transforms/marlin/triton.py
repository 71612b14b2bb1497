"""Triton kernels of :mod:`ctconvert.transforms.marlin`, which describes the layouts.

Before: words i32 [N, K/f], K-packed codes of b = 4 or 8 bits, f = 32/b codes a word.
After: Marlin tiles i32 [K/16, N*16/f].

A program takes one run of 64 n over ``TILES`` K tiles of 16. The rows are read in 64-bit units (a
row's 4-bit codes of one tile, or half its 8-bit ones), consecutive tiles by consecutive lanes. Four
words that lie in one thread make four output words: steps trade a bit of the word's number for a
bit of the code's place in the word, with shifts and masks alone. Then the compiler turns the block
round through shared memory and whole runs of 512 or 1024 bytes are stored.

Before: rows [groups, N] of scales or of zero points' codes.
After: every run of 64 columns in another order; zero points i32 [groups, N/f], packed as well.

Each of the orders permutes the six bits of a column's number in its run, so a kernel takes a run as
a tensor of six dimensions of 2 and permutes those.

Padding, words i32 [n, ceil(k/f)] to i32 [n_padded, k_padded/f], is a copy with a fill. Each of
these reads a byte once and writes it once. Act-order, whose columns change places within the words,
takes two passes: both are the transpose of :mod:`ctconvert.transforms.packed.triton`.

The launchers also take CPU tensors where Triton's interpreter runs the kernels.
"""

# In a kernel a name may hold tuples of several lengths, one after the other.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ctconvert.transforms.device import on_device
from ctconvert.transforms.packed.triton import (
    is_set,
    new_flag,
    swap_fields,
    transpose_packed_triton,
)


@triton.jit
def _halves(units):
    """The low and the high word of 64-bit units."""
    return units.to(tl.int32), (units >> 32).to(tl.int32)


@triton.jit
def _units(low, high):
    """The inverse of :func:`_halves`."""
    return (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)


# In both kernels below the numbers at a word are bits of k, as in the layout's description: word k3
# of a tile (4 bits), words k3 k2 (8 bits) before; words k2 k1 after.


@triton.jit
def _pack_kernel(units_ptr, tiles_ptr, row_units, tiles, BITS: tl.constexpr, TILES: tl.constexpr):
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    run = tl.program_id(0).to(tl.int64)
    WORDS: tl.constexpr = 32 * BITS  # words of a run in one row of tiles
    GROUPS: tl.constexpr = BITS  # of 8 rows that share their words, j or j and blk

    if BITS == 4:
        row = tl.arange(0, 32)  # j, a: rows n of blk = 0; those of blk = 1 are 8 further
        row = run * 64 + row // 8 * 16 + row % 8
        at = units_ptr + row[:, None] * row_units + tile[None, :]
        inside = tile[None, :] < tiles
        low0, high0 = _halves(tl.load(at, mask=inside, other=0))  # blk 0: k3 = 0, 1
        low1, high1 = _halves(tl.load(at + 8 * row_units, mask=inside, other=0))  # blk 1
        low0, high0 = swap_fields(low0, high0, 4)  # k3, k0
        low1, high1 = swap_fields(low1, high1, 4)
        low0, low1 = swap_fields(low0, low1, 8)  # blk, k1
        high0, high1 = swap_fields(high0, high1, 8)
        w00, w10 = swap_fields(low0, high0, 16)  # k0, k2
        w01, w11 = swap_fields(low1, high1, 16)
    else:
        row = run * 64 + tl.arange(0, 64)  # j, blk, a
        unit = tl.program_id(1) * 2 * TILES + tl.arange(0, 2 * TILES)  # tile, k3
        at = units_ptr + row[:, None] * row_units + unit[None, :]
        units = tl.load(at, mask=unit[None, :] < row_units, other=0)
        first, second = tl.split(units.reshape(64, TILES, 2))  # k3 = 0, 1
        w00, w10 = _halves(first)
        w01, w11 = _halves(second)
        w00, w01 = swap_fields(w00, w01, 8)  # k3, k0
        w10, w11 = swap_fields(w10, w11, 8)
        w00, w01 = swap_fields(w00, w01, 16)  # k0, k1
        w10, w11 = swap_fields(w10, w11, 16)

    words = tl.join(tl.join(w00, w10), tl.join(w01, w11))  # [group * a, tile, k2, k1]
    words = words.reshape(GROUPS, 8, TILES, 4).permute(2, 1, 3, 0).reshape(TILES, WORDS)
    word = tl.arange(0, WORDS)
    row_words = tl.num_programs(0).to(tl.int64) * WORDS
    at = tile[:, None] * row_words + (run * WORDS + word)[None, :]
    tl.store(tiles_ptr + at, words, mask=(tile < tiles)[:, None])


@triton.jit
def _unpack_kernel(units_ptr, tiles_ptr, row_units, tiles, BITS: tl.constexpr, TILES: tl.constexpr):
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    run = tl.program_id(0).to(tl.int64)
    WORDS: tl.constexpr = 32 * BITS
    GROUPS: tl.constexpr = BITS

    word = tl.arange(0, WORDS)
    row_words = tl.num_programs(0).to(tl.int64) * WORDS
    at = tile[:, None] * row_words + (run * WORDS + word)[None, :]
    words = tl.load(tiles_ptr + at, mask=(tile < tiles)[:, None], other=0)
    words = words.reshape(TILES, 8, 4, GROUPS).permute(3, 1, 0, 2)
    even, odd = tl.split(words.reshape(GROUPS * 8, TILES, 2, 2))  # k1 = 0, 1
    w00, w10 = tl.split(even)
    w01, w11 = tl.split(odd)

    if BITS == 4:
        low0, high0 = swap_fields(w00, w10, 16)
        low1, high1 = swap_fields(w01, w11, 16)
        low0, low1 = swap_fields(low0, low1, 8)
        high0, high1 = swap_fields(high0, high1, 8)
        low0, high0 = swap_fields(low0, high0, 4)
        low1, high1 = swap_fields(low1, high1, 4)
        row = tl.arange(0, 32)
        row = run * 64 + row // 8 * 16 + row % 8
        at = units_ptr + row[:, None] * row_units + tile[None, :]
        inside = tile[None, :] < tiles
        tl.store(at, _units(low0, high0), mask=inside)
        tl.store(at + 8 * row_units, _units(low1, high1), mask=inside)
    else:
        w00, w01 = swap_fields(w00, w01, 16)
        w10, w11 = swap_fields(w10, w11, 16)
        w00, w01 = swap_fields(w00, w01, 8)
        w10, w11 = swap_fields(w10, w11, 8)
        row = run * 64 + tl.arange(0, 64)
        unit = tl.program_id(1) * 2 * TILES + tl.arange(0, 2 * TILES)
        at = units_ptr + row[:, None] * row_units + unit[None, :]
        units = tl.join(_units(w00, w10), _units(w01, w11)).reshape(64, 2 * TILES)
        tl.store(at, units, mask=unit[None, :] < row_units)


@triton.jit
def _reordered(x, DIMS: tl.constexpr):
    """Runs of 64 elements, their dimensions of 2 in another order."""
    x = x.reshape(x.numel // 64, 2, 2, 2, 2, 2, 2)
    return x.permute(0, DIMS[0], DIMS[1], DIMS[2], DIMS[3], DIMS[4], DIMS[5]).reshape(x.numel)


@triton.jit
def _reorder_kernel(src, dst, count, DIMS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    inside = at < count - start
    x = tl.load(src + start + at, mask=inside, other=0)
    tl.store(dst + start + at, _reordered(x, DIMS), mask=inside)


@triton.jit
def _pack_zero_points_kernel(
    codes_ptr, words_ptr, bad, count, ORDER: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Word by word, since codes that lie in many threads would have to meet in one. ``bad`` becomes
    1 where a code has more than BITS bits.
    """
    FACTOR: tl.constexpr = 32 // BITS
    start = tl.program_id(0).to(tl.int64) * BLOCK
    word = tl.arange(0, BLOCK)
    inside = word < count - start
    # The order permutes bits: the column at position p is the sum of those at p's bits.
    column = word * FACTOR // 64 * 64
    for bit in tl.static_range(3 if BITS == 4 else 4):
        column += ((word >> bit) & 1) * ORDER[FACTOR << bit]
    out = tl.zeros([BLOCK], tl.int32)
    outside = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(FACTOR):
        at = codes_ptr + start * FACTOR + column + ORDER[i]
        code = tl.load(at, mask=inside, other=0).to(tl.int32)
        out |= code << (i * BITS)
        outside |= code >> BITS
    if BITS < 8:
        tl.store(bad + tl.zeros_like(word), 1, mask=outside != 0)
    tl.store(words_ptr + start + word, out, mask=inside)


@triton.jit
def _unpack_zero_points_kernel(
    words_ptr, codes_ptr, count, DIMS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    FACTOR: tl.constexpr = 32 // BITS
    start = tl.program_id(0).to(tl.int64) * BLOCK
    word = tl.arange(0, BLOCK // FACTOR)
    inside = word < (count - start) // FACTOR
    words = tl.load(words_ptr + start // FACTOR + word, mask=inside, other=0)
    x = (words[:, None] >> (tl.arange(0, FACTOR) * BITS)[None, :]) & ((1 << BITS) - 1)
    x = _reordered(x.to(tl.uint8).reshape(BLOCK), DIMS)
    at = tl.arange(0, BLOCK)
    tl.store(codes_ptr + start + at, x, mask=at < count - start)


@triton.jit
def _pad_kernel(
    src,
    dst,
    n,
    width,
    n_padded,
    padded_width,
    last,  # the word of a row that holds codes and padding, if any does
    held,  # its bits that hold codes
    fill,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    tiles = tl.cdiv(padded_width, COLS)
    pid = tl.program_id(0)
    row = (pid // tiles * ROWS + tl.arange(0, ROWS))[:, None]
    word = (pid % tiles * COLS + tl.arange(0, COLS))[None, :]
    x = tl.load(src + row.to(tl.int64) * width + word, mask=(row < n) & (word < width), other=fill)
    x = tl.where(word == last, (x & held) | (fill & ~held), x)
    at = dst + row.to(tl.int64) * padded_width + word
    tl.store(at, x, mask=(row < n_padded) & (word < padded_width))


# K tiles a program and warps, by bits.
_PACK = {4: (32, 4), 8: (16, 4)}
_UNPACK = {4: (32, 4), 8: (16, 4)}
# Elements of one program of the kernels of runs of 64, and its warps.
_RUNS = (4096, 4)
# Words of one program of the kernel that packs zero points.
_ZERO_POINTS = 512
# Rows and words of one program of the padding kernel, and its warps.
_PAD = (8, 256, 4)
# What the act-order path puts between its two passes: most of it is still in the L2 cache when the
# second reads it, and each launch fills the device.
_SCRATCH_BYTES = 32 << 20


def marlin_pack_triton(units: torch.Tensor, bits: int) -> torch.Tensor:
    """What :func:`ctconvert.transforms.marlin.marlin_pack` launches after its checks.

    ``units``: the words as i64 [N, K*b/64], contiguous, K % 16 == N % 64 == 0.
    """
    n, row_units = units.shape
    shape = row_units * 4 // bits, n * bits // 2
    tiles = torch.empty(shape, dtype=torch.int32, device=units.device)
    _launch(_pack_kernel, units, tiles, bits, _PACK[bits])
    return tiles


def marlin_unpack_triton(tiles: torch.Tensor, bits: int, n: int, k: int) -> torch.Tensor:
    """What :func:`ctconvert.transforms.marlin.marlin_unpack` launches after its checks.

    ``tiles`` i32 [K/16, N*16/f], contiguous.
    """
    words = torch.empty((n, k * bits // 32), dtype=torch.int32, device=tiles.device)
    _launch(_unpack_kernel, words.view(torch.int64), tiles, bits, _UNPACK[bits])
    return words


def _launch(
    kernel: triton.JITFunction,
    units: torch.Tensor,
    tiles: torch.Tensor,
    bits: int,
    block: tuple[int, int],
) -> None:
    (n, row_units), (size, warps) = units.shape, block
    grid = n // 64, triton.cdiv(tiles.shape[0], size)
    with on_device(units.device):
        kernel[grid](
            units, tiles, row_units, tiles.shape[0], BITS=bits, TILES=size, num_warps=warps
        )


def reorder_triton(rows: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Position p of every run of 64 takes what is at order[p] of it: [groups, N], N % 64 == 0.

    ``order`` is 64 numbers that permute the bits of p. Integers of 1, 2, 4 or 8 bytes, contiguous.
    """
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    block, warps = _RUNS
    with on_device(rows.device):
        _reorder_kernel[(triton.cdiv(rows.numel(), block),)](
            rows,
            out,
            rows.numel(),
            DIMS=_dims(order),
            BLOCK=block,
            num_warps=warps,
        )
    return out


def pack_zero_points_triton(
    codes: torch.Tensor, order: list[int], bits: int
) -> tuple[torch.Tensor, bool]:
    """u8 codes [groups, N] in ``order``, packed to i32 [groups, N/f]; whether all were in range.

    ``order`` and N as for :func:`reorder_triton`. Where a code was not in range, the words are not
    to be used. Waits for the device unless ``bits`` is 8.
    """
    n = codes.shape[1]
    out = torch.empty((codes.shape[0], n * bits // 32), dtype=torch.int32, device=codes.device)
    if out.numel() == 0:
        return out, True
    bad = out if bits == 8 else new_flag(codes.device)
    with on_device(codes.device):
        _pack_zero_points_kernel[(triton.cdiv(out.numel(), _ZERO_POINTS),)](
            codes.contiguous(),
            out,
            bad,
            out.numel(),
            ORDER=tuple(order),
            BITS=bits,
            BLOCK=_ZERO_POINTS,
        )
    return out, bits == 8 or not is_set(bad, codes.device)


def unpack_zero_points_triton(words: torch.Tensor, order: list[int], bits: int) -> torch.Tensor:
    """i32 [groups, N/f] to u8 [groups, N], whose position p of a run is code order[p] of it."""
    n = words.shape[1] * 32 // bits
    out = torch.empty((words.shape[0], n), dtype=torch.uint8, device=words.device)
    if out.numel() == 0:
        return out
    block, warps = _RUNS
    with on_device(words.device):
        _unpack_zero_points_kernel[(triton.cdiv(out.numel(), block),)](
            words.contiguous(),
            out,
            out.numel(),
            DIMS=_dims(order),
            BITS=bits,
            BLOCK=block,
            num_warps=warps,
        )
    return out


def _dims(order: list[int]) -> tuple[int, ...]:
    """The order of the dimensions of [runs, 2, 2, 2, 2, 2, 2] that has this effect."""
    return tuple(7 - order[1 << bit].bit_length() for bit in reversed(range(6)))


def take_columns_triton(words: torch.Tensor, perm: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of column ``perm[j]`` at column j: words i32 [N, K/f], perm i32 [K], contiguous.

    A block of rows is transposed, so that its columns become rows, and transposed back with the
    rows taken in the order ``perm``: two passes, with 32 MiB (or 128 rows) of scratch between them.
    """
    n, row_words = words.shape
    out = torch.empty_like(words)
    rows = max(_SCRATCH_BYTES // (4 * row_words) // 128, 1) * 128
    for start in range(0, n, rows):
        part = words[start : start + rows]
        transpose_packed_triton(
            transpose_packed_triton(part, bits, perm.shape[0]),
            bits,
            part.shape[0],
            order=perm,
            out=out[start : start + rows],
        )
    return out


def pad_words_triton(
    words: torch.Tensor, bits: int, n: int, k: int, n_padded: int, k_padded: int, fill: int
) -> torch.Tensor:
    """What :func:`ctconvert.transforms.marlin.pad_words` launches after its checks.

    ``words`` i32 [n, ceil(k/f)], contiguous; ``fill``, signed, is a word of codes to fill with.
    """
    width, padded_width = words.shape[1], k_padded * bits // 32
    out = torch.empty((n_padded, padded_width), dtype=torch.int32, device=words.device)
    if out.numel() == 0:
        return out
    used = k * bits % 32
    rows, cols, warps = _PAD
    with on_device(words.device):
        _pad_kernel[(triton.cdiv(n_padded, rows) * triton.cdiv(padded_width, cols),)](
            words,
            out,
            n,
            width,
            n_padded,
            padded_width,
            k * bits // 32 if used else -1,
            (1 << used) - 1,
            fill,
            ROWS=rows,
            COLS=cols,
            num_warps=warps,
        )
    return out
