"""Loops that Numba compiles, for :mod:`ctconvert.transforms.compiled`; nothing else imports this.

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


def _loop(function: Callable[..., Any]) -> Any:
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


@_loop
def transpose4(source, target, first, last):
    """u64 [R, W/2], R % 8 == 0, to u32 [8*W, R/8]: int4 codes, columns ``first`` to ``last``.

    Blocks of 128 rows by 64 words: eight rows are transposed as 8 x 8 codes in every word, words
    side by side, into a block in the L1 cache, of which the words are transposed then.
    """
    groups = source.shape[0] // 8
    block = np.empty((128, 32), np.uint64)
    words = block.view(np.uint32)
    for begin in range(first, last, 32):
        count = min(32, last - begin)
        for start in range(0, groups, 16):
            height = min(16, groups - start)
            for group in range(height):
                row = (start + group) * 8
                for w in range(count):
                    a = source[row, begin + w]
                    b = source[row + 1, begin + w]
                    c = source[row + 2, begin + w]
                    d = source[row + 3, begin + w]
                    e = source[row + 4, begin + w]
                    f = source[row + 5, begin + w]
                    g = source[row + 6, begin + w]
                    h = source[row + 7, begin + w]
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
                    line = group * 8
                    block[line, w] = a
                    block[line + 1, w] = b
                    block[line + 2, w] = c
                    block[line + 3, w] = d
                    block[line + 4, w] = e
                    block[line + 5, w] = f
                    block[line + 6, w] = g
                    block[line + 7, w] = h
            for w in range(2 * count):
                for code in range(8):
                    row = (2 * begin + w) * 8 + code
                    if height == 16:
                        for group in range(16):
                            target[row, start + group] = words[group * 8 + code, w]
                    else:
                        for group in range(height):
                            target[row, start + group] = words[group * 8 + code, w]


@_loop
def transpose8(source, target, first, last):
    """u64 [R, W/2], R % 4 == 0, to u32 [4*W, R/4]: as :func:`transpose4`, of 8-bit codes."""
    groups = source.shape[0] // 4
    block = np.empty((64, 32), np.uint64)
    words = block.view(np.uint32)
    for begin in range(first, last, 32):
        count = min(32, last - begin)
        for start in range(0, groups, 16):
            height = min(16, groups - start)
            for group in range(height):
                row = (start + group) * 4
                for w in range(count):
                    a = source[row, begin + w]
                    b = source[row + 1, begin + w]
                    c = source[row + 2, begin + w]
                    d = source[row + 3, begin + w]
                    a, c = _swap(a, c, U(16), U(0x0000FFFF0000FFFF))
                    b, d = _swap(b, d, U(16), U(0x0000FFFF0000FFFF))
                    a, b = _swap(a, b, U(8), U(0x00FF00FF00FF00FF))
                    c, d = _swap(c, d, U(8), U(0x00FF00FF00FF00FF))
                    line = group * 4
                    block[line, w] = a
                    block[line + 1, w] = b
                    block[line + 2, w] = c
                    block[line + 3, w] = d
            for w in range(2 * count):
                for code in range(4):
                    row = (2 * begin + w) * 4 + code
                    if height == 16:
                        for group in range(16):
                            target[row, start + group] = words[group * 4 + code, w]
                    else:
                        for group in range(height):
                            target[row, start + group] = words[group * 4 + code, w]


# ``marlin.cpu._Block`` describes the steps; a unit of a run is a, k2, k1, j1 with 4 bits.


@_loop
def pack_tiles4(units, tiles, first, last):
    """u64 [N, K/16] to u64 [K/16, N]: runs of 64 rows, ``first`` to ``last``."""
    count = units.shape[1]
    block = np.empty((64, 32), np.uint64)
    for run in range(first, last):
        for begin in range(0, count, 32):
            width = min(32, count - begin)
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


@_loop
def unpack_tiles4(tiles, units, first, last):
    """The inverse of :func:`pack_tiles4`."""
    count = units.shape[1]
    block = np.empty((64, 32), np.uint64)
    for run in range(first, last):
        for begin in range(0, count, 32):
            width = min(32, count - begin)
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


@_loop
def pack_tiles8(units, tiles, first, last):
    """u64 [N, K/8] to u64 [K/16, 2*N]: as :func:`pack_tiles4`, a unit being a, k2, k1, j."""
    count = units.shape[1] // 2
    block = np.empty((128, 18), np.uint64)
    for run in range(first, last):
        for begin in range(0, count, 16):
            width = min(16, count - begin)
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


@_loop
def unpack_tiles8(tiles, units, first, last):
    """The inverse of :func:`pack_tiles8`."""
    count = units.shape[1] // 2
    block = np.empty((128, 18), np.uint64)
    for run in range(first, last):
        for begin in range(0, count, 16):
            width = min(16, count - begin)
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


@_loop
def take4(source, columns, target, first, last):
    """Columns of u64 [N, K/16] into u32 [N, K/8]: int4 codes, rows ``first`` to ``last``.

    The rows of a block in the L2 cache are transposed, so that a column's codes move together.
    """
    k = len(columns)
    for begin in range(first, last, 64):
        rows = min(64, last - begin)
        turned = np.empty((k, rows // 8), np.uint32)
        moved = np.empty((k, rows // 16), np.uint64)
        transpose4(source[begin : begin + rows], turned, 0, source.shape[1])
        pairs = turned.view(np.uint64)
        for column in range(k):
            for pair in range(rows // 16):
                moved[column, pair] = pairs[columns[column], pair]
        transpose4(moved, target[begin : begin + rows], 0, rows // 16)


@_loop
def take8(source, columns, target, first, last):
    """u64 [N, K/8] into u32 [N, K/4]: as :func:`take4`, of 8-bit codes."""
    k = len(columns)
    for begin in range(first, last, 32):
        rows = min(32, last - begin)
        turned = np.empty((k, rows // 4), np.uint32)
        moved = np.empty((k, rows // 8), np.uint64)
        transpose8(source[begin : begin + rows], turned, 0, source.shape[1])
        pairs = turned.view(np.uint64)
        for column in range(k):
            for pair in range(rows // 8):
                moved[column, pair] = pairs[columns[column], pair]
        transpose8(moved, target[begin : begin + rows], 0, rows // 8)


# 2:4 sparse weights: a group of four elements is a word of u64 (16-bit elements) or u32 (8-bit),
# its two kept values, lower column first, half a word.


@_loop
def scatter(pairs, nibbles, shifts, bits, groups, first, last):
    """Groups [N, K/4] of pairs [N, K/4] and nibbles u8 [N, >= K/8], rows ``first`` to ``last``.

    ``shifts`` u64 [16, 3] has for each nibble where the two values go in the word, and 1 where they
    are none and must be 0, 2 where the nibble is wrong. True where one is wrong.
    """
    low = (U(1) << bits) - U(1)
    wrong = U(0)
    for row in range(first, last):
        for g in range(groups.shape[1]):
            nibble = (nibbles[row, g >> 1] >> ((g & 1) * 4)) & 15
            pair = U(pairs[row, g])
            state = shifts[nibble, 2]
            wrong |= (state & U(2)) | ((U(0) - (state & U(1))) & pair)
            word = ((pair & low) << shifts[nibble, 0]) | ((pair >> bits) << shifts[nibble, 1])
            groups[row, g] = word
    return wrong != U(0)


@njit(inline="always")
def _settled(pair, clean, entry):
    """The values of a group, and what is wrong with it: nothing but 0 where all is well."""
    made = (clean >> (entry & U(31))) << ((entry >> U(5)) & U(31))
    return made, (entry & U(1 << 15)) | ((U(0) - ((entry >> U(14)) & U(1))) & pair)


@_loop
def settle(words, codes, table, whole, masks, bits, target, nibbles, first, last):
    """Which two of a group are stored, made one choice for all weights of the same value.

    ``words`` u64 [N, K*b/128] hold the values, b bits each, ``codes`` u8 [N, K/8] a nibble a group,
    ``target`` and ``nibbles`` the same, rows ``first`` to ``last``. ``masks`` u64 [3] have all bits
    of the elements but the highest, those of the highest that alone make an element nonzero, else
    it is 0, and the highest. ``table`` u64 [64] has for every nibble, 16 more where the first value
    is nonzero and 32 more where the second is, how far the values go down, how far then up (5 bits
    each), the nibble (4 bits), and bits for: both values must be 0 to the bit; there is none.
    ``whole`` u16 [256] has the byte for two groups without a 0; 256 where there is none.

    The result is the sum of 1 where something is wrong and 2 where something changed.
    """
    low, signs, high = masks[0], masks[1], masks[2]
    half, top = U(2) * bits, bits - U(1)
    mask = (U(1) << half) - U(1)
    count = codes.shape[1] // words.shape[1]  # bytes of nibbles for a word
    wrong, changed = U(0), U(0)
    for row in range(first, last):
        source, before, made, after = words[row], codes[row], target[row], nibbles[row]
        for c in range(source.shape[0]):
            word = source[c]
            nonzero = (((word & low) + low) | (word & signs)) & high
            if nonzero == high:  # mostly, and then two groups are one look-up
                made[c] = word
                for place in range(count):
                    code = before[c * count + place]
                    nibble = whole[code]
                    after[c * count + place] = nibble
                    wrong |= U(nibble >> 8)
                    changed |= U(nibble ^ code)
                continue
            clean = word & (low | signs | nonzero)
            held = nonzero >> top
            held |= held >> top
            both = U(0)
            for place in range(count):
                code, shift = U(before[c * count + place]), U(2 * place) * half
                entry = table[(code & U(15)) | ((held >> shift) & U(3)) << U(4)]
                other = table[(code >> U(4)) | ((held >> (shift + half)) & U(3)) << U(4)]
                left, amiss = _settled((word >> shift) & mask, (clean >> shift) & mask, entry)
                shift += half
                right, astray = _settled((word >> shift) & mask, (clean >> shift) & mask, other)
                both |= (left | right << half) << (shift - half)
                nibble = ((entry >> U(10)) & U(15)) | (((other >> U(10)) & U(15)) << U(4))
                after[c * count + place] = nibble
                wrong |= amiss | astray
                changed |= nibble ^ code
            changed |= both ^ word
            made[c] = both
    return int(wrong != U(0)) | int(changed != U(0)) << 1


# The SM90 metadata, 64 rows by 128 columns after another; ``back`` is from its order to rows.


@_loop
def order16(rows, flat, back, first, last):
    """u16 [N, K/16] and u16 [N*K/16] in the order for 16-bit elements: blocks of 64 rows."""
    height = rows.shape[0] // 64
    for strip in range(first, last):
        for block in range(rows.shape[1] // 8):
            for a in range(4):
                for b in range(2):
                    for c in range(8):
                        row = strip * 64 + a * 16 + b * 8 + c
                        at = (block * height + strip) * 512 + a * 128 + c * 8 + b
                        for d in range(4):
                            for e in range(2):
                                if back:
                                    rows[row, block * 8 + d * 2 + e] = flat[at + e * 64 + d * 2]
                                else:
                                    flat[at + e * 64 + d * 2] = rows[row, block * 8 + d * 2 + e]


@_loop
def order8(rows, flat, back, first, last):
    """u64 [N, K/64] and u64 [N*K/64] in the order for 8-bit elements: blocks of 64 rows."""
    height = rows.shape[0] // 64
    for strip in range(first, last):
        for block in range(rows.shape[1] // 2):
            for row in range(64):
                at = ((block * height + strip) * 64 + row) * 2
                for half in range(2):
                    if back:
                        rows[strip * 64 + row, block * 2 + half] = flat[at + half]
                    else:
                        flat[at + half] = rows[strip * 64 + row, block * 2 + half]
