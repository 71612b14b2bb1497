"""Triton kernels of :mod:`ctconvert.transforms.marlin`: each word is read once and written once.

Before: words i32 [N, K/f], K-packed codes of b = 4 or 8 bits, f = 32/b codes a word.
After: Marlin tiles i32 [K/16, N*16/f], as :mod:`ctconvert.transforms.marlin` describes them.

A program takes one run of 64 n over ``TILES`` K tiles of 16. The rows are read in 64-bit units (a
row's 4-bit codes of one tile, or half its 8-bit ones), consecutive tiles by consecutive lanes. Four
words that lie in one thread make four output words: steps trade a bit of the word's number for a
bit of the code's place in the word, with shifts and masks alone. Then the compiler turns the block
round through shared memory and whole runs of 512 or 1024 bytes are stored.

The launchers also take CPU tensors where Triton's interpreter runs the kernels.
"""

# In a kernel a name may hold tuples of several lengths, one after the other.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl


@triton.jit
def _exchange(low, high, shift: tl.constexpr, mask: tl.constexpr):
    """Swaps the upper fields of ``low`` with the lower fields of ``high``."""
    # The shift is arithmetic; the mask is zero where it brings in copies of the sign.
    swap = ((low >> shift) ^ high) & mask
    return low ^ (swap << shift), high ^ swap


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
        low0, high0 = _exchange(low0, high0, 4, 0x0F0F0F0F)  # k3, k0
        low1, high1 = _exchange(low1, high1, 4, 0x0F0F0F0F)
        low0, low1 = _exchange(low0, low1, 8, 0x00FF00FF)  # blk, k1
        high0, high1 = _exchange(high0, high1, 8, 0x00FF00FF)
        w00, w10 = _exchange(low0, high0, 16, 0x0000FFFF)  # k0, k2
        w01, w11 = _exchange(low1, high1, 16, 0x0000FFFF)
    else:
        row = run * 64 + tl.arange(0, 64)  # j, blk, a
        unit = tl.program_id(1) * 2 * TILES + tl.arange(0, 2 * TILES)  # tile, k3
        at = units_ptr + row[:, None] * row_units + unit[None, :]
        units = tl.load(at, mask=unit[None, :] < row_units, other=0)
        first, second = tl.split(units.reshape(64, TILES, 2))  # k3 = 0, 1
        w00, w10 = _halves(first)
        w01, w11 = _halves(second)
        w00, w01 = _exchange(w00, w01, 8, 0x00FF00FF)  # k3, k0
        w10, w11 = _exchange(w10, w11, 8, 0x00FF00FF)
        w00, w01 = _exchange(w00, w01, 16, 0x0000FFFF)  # k0, k1
        w10, w11 = _exchange(w10, w11, 16, 0x0000FFFF)

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
        low0, high0 = _exchange(w00, w10, 16, 0x0000FFFF)
        low1, high1 = _exchange(w01, w11, 16, 0x0000FFFF)
        low0, low1 = _exchange(low0, low1, 8, 0x00FF00FF)
        high0, high1 = _exchange(high0, high1, 8, 0x00FF00FF)
        low0, high0 = _exchange(low0, high0, 4, 0x0F0F0F0F)
        low1, high1 = _exchange(low1, high1, 4, 0x0F0F0F0F)
        row = tl.arange(0, 32)
        row = run * 64 + row // 8 * 16 + row % 8
        at = units_ptr + row[:, None] * row_units + tile[None, :]
        inside = tile[None, :] < tiles
        tl.store(at, _units(low0, high0), mask=inside)
        tl.store(at + 8 * row_units, _units(low1, high1), mask=inside)
    else:
        w00, w01 = _exchange(w00, w01, 16, 0x0000FFFF)
        w10, w11 = _exchange(w10, w11, 16, 0x0000FFFF)
        w00, w01 = _exchange(w00, w01, 8, 0x00FF00FF)
        w10, w11 = _exchange(w10, w11, 8, 0x00FF00FF)
        row = run * 64 + tl.arange(0, 64)
        unit = tl.program_id(1) * 2 * TILES + tl.arange(0, 2 * TILES)
        at = units_ptr + row[:, None] * row_units + unit[None, :]
        units = tl.join(_units(w00, w10), _units(w01, w11)).reshape(64, 2 * TILES)
        tl.store(at, units, mask=unit[None, :] < row_units)


@triton.jit
def _take_columns_kernel(
    words_ptr,
    perm_ptr,
    out_ptr,
    n,
    row_words,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Whole rows, which the L1 cache holds while their codes are gathered."""
    FACTOR: tl.constexpr = 32 // BITS
    first = tl.program_id(0).to(tl.int64) * ROWS
    for start in range(0, row_words, WORDS):
        word = start + tl.arange(0, WORDS)
        inside = word < row_words
        columns = ()
        for i in tl.static_range(FACTOR):
            columns += (tl.load(perm_ptr + word * FACTOR + i, mask=inside, other=0),)
        for row in tl.static_range(ROWS):
            # Rows past the end do the last row again, with the same result.
            at = tl.minimum(first + row, n - 1) * row_words
            out = tl.zeros([WORDS], tl.int32)
            for i in tl.static_range(FACTOR):
                source = tl.load(words_ptr + at + columns[i] // FACTOR, mask=inside, other=0)
                code = (source >> (columns[i] % FACTOR * BITS)) & ((1 << BITS) - 1)
                out |= code << (i * BITS)
            tl.store(out_ptr + at + word, out, mask=inside)


# K tiles a program and warps, by bits.
_PACK = {4: (32, 4), 8: (16, 4)}
_UNPACK = {4: (32, 4), 8: (16, 4)}
# Rows of a program of the column kernel, the words it does at a time, and its warps.
_COLUMNS = (4, 256, 8)


def marlin_pack_triton(words: torch.Tensor, bits: int) -> torch.Tensor:
    """What :func:`ctconvert.transforms.marlin.marlin_pack` launches after its checks.

    ``words`` i32 [N, K/f], contiguous, at an even storage offset, K % 16 == N % 64 == 0.
    """
    n, row_words = words.shape
    tiles = row_words * 2 // bits
    out = words.new_empty((tiles, n * bits // 2))
    _launch(_pack_kernel, words, out, tiles, n, bits, _PACK[bits])
    return out


def marlin_unpack_triton(tiles: torch.Tensor, bits: int, n: int, k: int) -> torch.Tensor:
    """What :func:`ctconvert.transforms.marlin.marlin_unpack` launches after its checks.

    ``tiles`` i32 [K/16, N*16/f], contiguous.
    """
    out = tiles.new_empty((n, k * bits // 32))
    _launch(_unpack_kernel, out, tiles, k // 16, n, bits, _UNPACK[bits])
    return out


def _launch(
    kernel: triton.JITFunction,
    words: torch.Tensor,
    tiles: torch.Tensor,
    rows: int,
    n: int,
    bits: int,
    block: tuple[int, int],
) -> None:
    size, warps = block
    units = words.view(torch.int64)
    with _on_device(words):
        kernel[(n // 64, triton.cdiv(rows, size))](
            units, tiles, units.shape[1], rows, BITS=bits, TILES=size, num_warps=warps
        )


def take_columns_triton(words: torch.Tensor, perm: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of column ``perm[j]`` at column j: words i32 [N, K/f], perm i32 [K], contiguous."""
    out = torch.empty_like(words)
    n, row_words = words.shape
    rows, block, warps = _COLUMNS
    with _on_device(words):
        _take_columns_kernel[(triton.cdiv(n, rows),)](
            words, perm, out, n, row_words, BITS=bits, ROWS=rows, WORDS=block, num_warps=warps
        )
    return out


def _on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """A kernel is launched on the current device, which need not be the tensor's."""
    if tensor.device.type == "cpu":
        return nullcontext()
    device: AbstractContextManager[object] = torch.get_device_module(tensor.device).device(
        tensor.device
    )
    return device
