"""Loops that Numba compiles, for :mod:`ctconvert.transforms.compiled`, and how they are kept.

Each takes C-contiguous arrays and the range of the work that it does, so that threads can share it.
"""

from __future__ import annotations

import functools
import logging
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import config, njit
from numba.core.caching import FunctionCache

if config.DISABLE_JIT:
    raise ImportError("Numba is told not to compile")

U = np.uint64


#: What reading a damaged cache raises: pickles, and what is looked for in what they hold.
_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, LookupError, AttributeError, ImportError, MemoryError),
    *(ValueError, TypeError, ArithmeticError, RuntimeError, AssertionError, OSError),
)


class _Kept(FunctionCache):
    """Numba's cache of a loop; where it is damaged or cannot be written, the loop is compiled."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except _DAMAGE as error:
            _tell(type(error).__name__)
        try:
            self.flush()
        except OSError:
            self.disable()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError:
            self.disable()


@functools.cache
def _tell(what: str) -> None:
    logging.getLogger("ctconvert").warning(
        "the compiled loops that Numba keeps are damaged (%s): they are compiled anew", what
    )


def loop(function: Callable[..., Any]) -> Any:
    """Compiled at its first call, and kept in Numba's cache.

    Raises:
        RuntimeError: there is no place for the cache.
    """
    made = njit(nogil=True)(function)
    made._cache = _Kept(function)  # as njit(cache=True) has it
    return made


@njit(inline="always")
def _swap(low, high, shift, mask):
    """The block-swap step of ``words.exchange``."""
    swap = ((low >> shift) ^ high) & mask
    return low ^ (swap << shift), high ^ swap


#: Words of a source row that are transposed together.
_RUN = 256


@njit(inline="always")
def _join_halves(block, size, height, count):
    """Of every two groups of ``size`` rows: the low halves of the words together, and the high."""
    for pair in range(height // 2):
        for code in range(size):
            line = pair * 2 * size + code
            for w in range(count):
                low, high = _swap(block[line, w], block[line + size, w], U(32), U(0xFFFFFFFF))
                block[line, w] = low
                block[line + size, w] = high


@loop
def transpose4(source, rows, target, first, last):
    """u64 [*, W], rows ``rows``, R % 16 == 0 of them, to u64 [16*W, R/16]: int4 codes, columns
    ``first`` to ``last``.

    Eight rows are transposed as 8 x 8 codes in every half of a word, the halves of two such groups
    joined, words side by side, into a block in the L2 cache, of which the words are transposed
    then. Long runs of a source row matter more than a block in the L1 cache.
    """
    groups = len(rows) // 8
    block = np.empty((128, _RUN + 1), np.uint64)  # rows a power of two apart share cache sets
    for begin in range(first, last, _RUN):
        count = min(_RUN, last - begin)
        for start in range(0, groups, 16):
            height = min(16, groups - start)
            for group in range(height):
                row, line = (start + group) * 8, group * 8
                r0, r1, r2, r3 = rows[row], rows[row + 1], rows[row + 2], rows[row + 3]
                r4, r5, r6, r7 = rows[row + 4], rows[row + 5], rows[row + 6], rows[row + 7]
                for w in range(count):
                    a = source[r0, begin + w]
                    b = source[r1, begin + w]
                    c = source[r2, begin + w]
                    d = source[r3, begin + w]
                    e = source[r4, begin + w]
                    f = source[r5, begin + w]
                    g = source[r6, begin + w]
                    h = source[r7, begin + w]
                    a, e = _swap(a, e, U(16), U(0x0000FFFF0000FFFF))
                    b, f = _swap(b, f, U(16), U(0x0000FFFF0000FFFF))
                    c, g = _swap(c, g, U(16), U(0x0000FFFF0000FFFF))
                    d, h = _swap(d, h, U(16), U(0x0000FFFF0000FFFF))
                    a, c = _swap(a, c, U(8), U(0x00FF00FF00FF00FF))
                    b, d = _swap(b, d, U(8), U(0x00FF00FF00FF00FF))
                    e, g = _swap(e, g, U(8), U(0x00FF00FF00FF00FF))
                    f, h = _swap(f, h, U(8), U(0x00FF00FF00FF00FF))
                    a, b = _swap(a, b, U(4), U(0x0F0F0F0F0F0F0F0F))
                    c, d = _swap(c, d, U(4), U(0x0F0F0F0F0F0F0F0F))
                    e, f = _swap(e, f, U(4), U(0x0F0F0F0F0F0F0F0F))
                    g, h = _swap(g, h, U(4), U(0x0F0F0F0F0F0F0F0F))
                    block[line, w] = a
                    block[line + 1, w] = b
                    block[line + 2, w] = c
                    block[line + 3, w] = d
                    block[line + 4, w] = e
                    block[line + 5, w] = f
                    block[line + 6, w] = g
                    block[line + 7, w] = h
            _join_halves(block, 8, height, count)
            for w in range(count):
                for code in range(16):
                    out = target[(begin + w) * 16 + code]
                    if height == 16:
                        for pair in range(8):
                            out[start // 2 + pair] = block[pair * 16 + code, w]
                    else:
                        for pair in range(height // 2):
                            out[start // 2 + pair] = block[pair * 16 + code, w]


@loop
def transpose8(source, rows, target, first, last):
    """u64 [*, W], R % 8 == 0, to u64 [8*W, R/8]: as :func:`transpose4`, of 8-bit codes."""
    groups = len(rows) // 4
    block = np.empty((64, _RUN + 1), np.uint64)  # rows a power of two apart share cache sets
    for begin in range(first, last, _RUN):
        count = min(_RUN, last - begin)
        for start in range(0, groups, 16):
            height = min(16, groups - start)
            for group in range(height):
                row, line = (start + group) * 4, group * 4
                r0, r1, r2, r3 = rows[row], rows[row + 1], rows[row + 2], rows[row + 3]
                for w in range(count):
                    a = source[r0, begin + w]
                    b = source[r1, begin + w]
                    c = source[r2, begin + w]
                    d = source[r3, begin + w]
                    a, c = _swap(a, c, U(16), U(0x0000FFFF0000FFFF))
                    b, d = _swap(b, d, U(16), U(0x0000FFFF0000FFFF))
                    a, b = _swap(a, b, U(8), U(0x00FF00FF00FF00FF))
                    c, d = _swap(c, d, U(8), U(0x00FF00FF00FF00FF))
                    block[line, w] = a
                    block[line + 1, w] = b
                    block[line + 2, w] = c
                    block[line + 3, w] = d
            _join_halves(block, 4, height, count)
            for w in range(count):
                for code in range(8):
                    out = target[(begin + w) * 8 + code]
                    if height == 16:
                        for pair in range(8):
                            out[start // 2 + pair] = block[pair * 8 + code, w]
                    else:
                        for pair in range(height // 2):
                            out[start // 2 + pair] = block[pair * 8 + code, w]


# ``marlin.cpu._Block`` describes the steps; a unit of a run is a, k2, k1, j1 with 4 bits.


@loop
def pack_tiles4(units, tiles, first, last):
    """u64 [N, K/16] to u64 [K/16, N]: runs of 64 rows, ``first`` to ``last``."""
    count = units.shape[1]
    block = np.empty((64, 129), np.uint64)
    for run in range(first, last):
        for begin in range(0, count, 128):
            width = min(128, count - begin)
            for j in range(2):
                for a in range(8):
                    row = run * 64 + j * 32 + a
                    place = a * 8 + j
                    for t in range(width):
                        p = units[row, begin + t]
                        q = units[row + 8, begin + t]
                        r = units[row + 16, begin + t]
                        s = units[row + 24, begin + t]
                        p, r = _swap(p, r, U(32), U(0x00000000FFFFFFFF))
                        p, r = _swap(p, r, U(4), U(0x0F0F0F0F0F0F0F0F))
                        p, r = _swap(p, r, U(16), U(0x0000FFFF0000FFFF))
                        q, s = _swap(q, s, U(32), U(0x00000000FFFFFFFF))
                        q, s = _swap(q, s, U(4), U(0x0F0F0F0F0F0F0F0F))
                        q, s = _swap(q, s, U(16), U(0x0000FFFF0000FFFF))
                        p, q = _swap(p, q, U(8), U(0x00FF00FF00FF00FF))
                        r, s = _swap(r, s, U(8), U(0x00FF00FF00FF00FF))
                        block[place, t] = p
                        block[place + 2, t] = q
                        block[place + 4, t] = r
                        block[place + 6, t] = s
            for t in range(width):
                for unit in range(64):
                    tiles[begin + t, run * 64 + unit] = block[unit, t]


@loop
def unpack_tiles4(tiles, units, first, last):
    """The inverse of :func:`pack_tiles4`."""
    count = units.shape[1]
    block = np.empty((64, 129), np.uint64)
    for run in range(first, last):
        for begin in range(0, count, 128):
            width = min(128, count - begin)
            for t in range(width):
                for unit in range(64):
                    block[unit, t] = tiles[begin + t, run * 64 + unit]
            for j in range(2):
                for a in range(8):
                    row = run * 64 + j * 32 + a
                    place = a * 8 + j
                    for t in range(width):
                        p = block[place, t]
                        q = block[place + 2, t]
                        r = block[place + 4, t]
                        s = block[place + 6, t]
                        p, q = _swap(p, q, U(8), U(0x00FF00FF00FF00FF))
                        r, s = _swap(r, s, U(8), U(0x00FF00FF00FF00FF))
                        p, r = _swap(p, r, U(16), U(0x0000FFFF0000FFFF))
                        p, r = _swap(p, r, U(4), U(0x0F0F0F0F0F0F0F0F))
                        p, r = _swap(p, r, U(32), U(0x00000000FFFFFFFF))
                        q, s = _swap(q, s, U(16), U(0x0000FFFF0000FFFF))
                        q, s = _swap(q, s, U(4), U(0x0F0F0F0F0F0F0F0F))
                        q, s = _swap(q, s, U(32), U(0x00000000FFFFFFFF))
                        units[row, begin + t] = p
                        units[row + 8, begin + t] = q
                        units[row + 16, begin + t] = r
                        units[row + 24, begin + t] = s


@loop
def pack_tiles8(units, tiles, first, last):
    """u64 [N, K/8] to u64 [K/16, 2*N]: as :func:`pack_tiles4`, a unit being a, k2, k1, j."""
    count = units.shape[1] // 2
    block = np.empty((128, 65), np.uint64)
    for run in range(first, last):
        for begin in range(0, count, 64):
            width = min(64, count - begin)
            for j in range(4):
                for a in range(8):
                    row = run * 64 + j * 16 + a
                    place = a * 16 + j
                    for t in range(width):
                        p = units[row, 2 * (begin + t)]
                        q = units[row, 2 * (begin + t) + 1]
                        r = units[row + 8, 2 * (begin + t)]
                        s = units[row + 8, 2 * (begin + t) + 1]
                        p, r = _swap(p, r, U(32), U(0x00000000FFFFFFFF))
                        q, s = _swap(q, s, U(32), U(0x00000000FFFFFFFF))
                        p, q = _swap(p, q, U(8), U(0x00FF00FF00FF00FF))
                        r, s = _swap(r, s, U(8), U(0x00FF00FF00FF00FF))
                        p, q = _swap(p, q, U(16), U(0x0000FFFF0000FFFF))
                        r, s = _swap(r, s, U(16), U(0x0000FFFF0000FFFF))
                        block[place, t] = p
                        block[place + 4, t] = q
                        block[place + 8, t] = r
                        block[place + 12, t] = s
            for t in range(width):
                for unit in range(128):
                    tiles[begin + t, run * 128 + unit] = block[unit, t]


@loop
def unpack_tiles8(tiles, units, first, last):
    """The inverse of :func:`pack_tiles8`."""
    count = units.shape[1] // 2
    block = np.empty((128, 65), np.uint64)
    for run in range(first, last):
        for begin in range(0, count, 64):
            width = min(64, count - begin)
            for t in range(width):
                for unit in range(128):
                    block[unit, t] = tiles[begin + t, run * 128 + unit]
            for j in range(4):
                for a in range(8):
                    row = run * 64 + j * 16 + a
                    place = a * 16 + j
                    for t in range(width):
                        p = block[place, t]
                        q = block[place + 4, t]
                        r = block[place + 8, t]
                        s = block[place + 12, t]
                        p, q = _swap(p, q, U(16), U(0x0000FFFF0000FFFF))
                        r, s = _swap(r, s, U(16), U(0x0000FFFF0000FFFF))
                        p, q = _swap(p, q, U(8), U(0x00FF00FF00FF00FF))
                        r, s = _swap(r, s, U(8), U(0x00FF00FF00FF00FF))
                        p, r = _swap(p, r, U(32), U(0x00000000FFFFFFFF))
                        q, s = _swap(q, s, U(32), U(0x00000000FFFFFFFF))
                        units[row, 2 * (begin + t)] = p
                        units[row, 2 * (begin + t) + 1] = q
                        units[row + 8, 2 * (begin + t)] = r
                        units[row + 8, 2 * (begin + t) + 1] = s


#: Rows whose columns are taken together, of int4: 64 bytes of a column, a cache line.
_TAKEN = 128


@loop
def take4(source, columns, target, first, last):
    """Columns of u64 [N, K/16], N % 16 == 0, into the same: int4 codes, rows ``first`` to ``last``.

    The rows of a block in the cache are transposed, so that a column's codes move together.
    """
    turned = np.empty((len(columns), _TAKEN // 16), np.uint64)
    for begin in range(first, last, _TAKEN):
        rows = np.arange(begin, min(begin + _TAKEN, last))
        transpose4(source, rows, turned, 0, source.shape[1])
        transpose4(turned, columns, target[begin:last], 0, len(rows) // 16)


@loop
def take8(source, columns, target, first, last):
    """Columns of u64 [N, K/8], N % 8 == 0, into the same: as :func:`take4`, of 8-bit codes."""
    turned = np.empty((len(columns), _TAKEN // 16), np.uint64)
    for begin in range(first, last, _TAKEN // 2):
        rows = np.arange(begin, min(begin + _TAKEN // 2, last))
        transpose8(source, rows, turned, 0, source.shape[1])
        transpose8(turned, columns, target[begin:last], 0, len(rows) // 8)


# Word i of a run of 64 zero points has, of the 8 x 8 codes as they lie, those of column i, the even
# rows before the odd ones: two of them a byte.


@loop
def pack_zeros4(codes, packed, first, last):
    """u8 [G, N], N % 64 == 0, to the bytes of Marlin's words, u8 [G, N/2], rows ``first`` to
    ``last``; returns all codes' OR, 16 or more where one is out of range.
    """
    seen = np.zeros(8, np.uint8)
    for row in range(first, last):
        for run in range(codes.shape[1] // 64):
            at = codes[row, run * 64 : run * 64 + 64]
            into = packed[row, run * 32 : run * 32 + 32]
            for i in range(8):
                a, b, c, d = at[i], at[i + 16], at[i + 32], at[i + 48]
                e, f, g, h = at[i + 8], at[i + 24], at[i + 40], at[i + 56]
                into[4 * i] = a | b << 4
                into[4 * i + 1] = c | d << 4
                into[4 * i + 2] = e | f << 4
                into[4 * i + 3] = g | h << 4
                seen[i] |= a | b | c | d | e | f | g | h
    return seen.max()


@loop
def unpack_zeros4(packed, codes, first, last):
    """The inverse of :func:`pack_zeros4`."""
    for row in range(first, last):
        for run in range(codes.shape[1] // 64):
            at = packed[row, run * 32 : run * 32 + 32]
            into = codes[row, run * 64 : run * 64 + 64]
            for i in range(8):
                for pair in range(2):
                    into[i + 32 * pair] = at[4 * i + pair] & 15
                    into[i + 32 * pair + 16] = at[4 * i + pair] >> 4
                    into[i + 32 * pair + 8] = at[4 * i + pair + 2] & 15
                    into[i + 32 * pair + 24] = at[4 * i + pair + 2] >> 4
