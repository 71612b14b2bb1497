"""Triton kernels of the 2:4 transforms; `ctconvert.transforms.sparse24` has the forms to the bit.

Before and after, by kernel (a group is four columns, one word of the dense weight; a *unit* is four
groups, whose nibbles are 16 bits of the bitmask or of the metadata):

- decompress: compressed [N, K/2], bitmask u8 [N, ceil(K/8)] -> dense [N, K]
- compress: dense, bitmask -> compressed; mask: dense -> bitmask
- SM90 compress: dense -> values [N, K/2], meta u8 [Np, Kp/8]; SM90 decompress: the way back

Every kernel is one pass: each input byte is read once and each output byte written once. A tile is
units by four words, so a thread loads and stores 16 neighbouring bytes and the lanes of a warp
neighbouring units. The bitmask kernels see the weight as one row wherever K % 8 == 0, so any such K
runs at the same speed. A program of the SM90 kernels owns 64 rows by 128 (or more) columns: the
metadata of such a block is 1 KiB in one piece.

An invalid group leaves its place (unit or row) in an error word by an atomic minimum; the launcher
reads the word and raises the CPU path's error for that row.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl

from ctconvert.transforms.sparse24.groups import kept_of_pattern, kept_pair, meta_nibble
from ctconvert.transforms.words import signed


def _packed(entry: Callable[[int], int], bits: int, width: int) -> int:
    """A table of 16 entries of ``bits`` bits as one signed integer of ``width`` bits."""
    return signed(sum(entry(code) << bits * code for code in range(16)), width)


def _nibble_or_ones(nibble: int | None) -> int:
    return 0xF if nibble is None else nibble


def _kept(mask: int, slot: int) -> int:
    pair = kept_pair(mask)
    return 0 if pair is None else pair[slot] - slot


# Nibble tables indexed by four times a nonzero pattern; 0xF, which neither form has, is invalid.
_META_OF_PATTERN = tl.constexpr(_packed(lambda code: _nibble_or_ones(meta_nibble(code)), 4, 64))
_MASK_OF_PATTERN = tl.constexpr(_packed(lambda code: _nibble_or_ones(kept_of_pattern(code)), 4, 64))
# Elements that the first and the second kept value move by, indexed by twice a bitmask nibble. The
# last valid one is 12, so the tables can be shifted up by a few bits and stay 32 bits wide.
_FIRST_MOVE = tl.constexpr(_packed(lambda mask: _kept(mask, 0), 2, 32))
_SECOND_MOVE = tl.constexpr(_packed(lambda mask: _kept(mask, 1), 2, 32))


@triton.jit
def _any(word):
    """Nonzero where any i32 along the last dimension is."""
    largest = tl.max(word.to(tl.uint32, bitcast=True), axis=len(word.shape) - 1)
    return largest.to(tl.int32, bitcast=True)


@triton.jit
def _load_units(ptr, at, groups, WORD: tl.constexpr):
    """Nibbles of the units ``at`` of a bitmask row that has ``groups`` groups left, as i32."""
    if WORD:
        unit = tl.load(ptr + at, mask=at * 4 < groups, other=0x3333).to(tl.int32) & 0xFFFF
    else:
        low = tl.load(ptr + at * 2, mask=at * 4 < groups, other=0)
        high = tl.load(ptr + at * 2 + 1, mask=at * 4 + 2 < groups, other=0)
        unit = low.to(tl.int32) | (high.to(tl.int32) << 8)
    return unit


@triton.jit
def _wrong_mask(unit, at, groups, WORD: tl.constexpr):
    """Nonzero where a group of a bitmask unit does not keep two columns, or lies past the row."""
    count = unit - ((unit >> 1) & 0x5555)
    count = (count & 0x3333) + ((count >> 2) & 0x3333)
    if WORD:
        wrong = count ^ 0x2222
    else:
        inside = tl.minimum(tl.maximum(groups - at * 4, 0), 4)
        wrong = count ^ (0x2222 & ((1 << (inside * 4)) - 1))
    return wrong


@triton.jit
def _moves(unit, SIZE: tl.constexpr):
    """Bits that the first and the second kept value of each group of the units move by."""
    j = tl.arange(0, 4)
    code = tl.expand_dims(unit << 1, -1) >> (j * 4)
    code = code & 30
    LOG_BITS: tl.constexpr = 2 + SIZE
    first = tl.full([], _FIRST_MOVE << LOG_BITS, tl.int32) >> code
    second = tl.full([], _SECOND_MOVE << LOG_BITS, tl.int32) >> code
    return first & (3 << LOG_BITS), second & (3 << LOG_BITS)


@triton.jit
def _pattern(word, SIZE: tl.constexpr):
    """Four times the nonzero pattern of each group, as u32, and the words without -0.0."""
    if SIZE == 1:
        top = ((word & 0x7F7F7F7F) + 0x7F7F7F7F) | word
        top = (top & -0x7F7F7F80).to(tl.uint32, bitcast=True)
        # The product moves the top bit of element j to bit 28 + j; bits 24 to 27 stay 0.
        pattern = (top * 0x204081) >> 26
    else:
        ABS: tl.constexpr = 0x7FFF7FFF7FFF7FFF
        top = (word & ABS) + ABS
        word = word & (top | ABS)
        # Elements 0 and 1 go between 2 and 3: their top bits are then at 7, 23, 15 and 31.
        both = ((top.to(tl.int32) >> 8) & 0x00800080) | ((top >> 32).to(tl.int32) & -0x7FFF8000)
        pattern = (both.to(tl.uint32, bitcast=True) * 0x208041) >> 26
    return pattern, word


@triton.jit
def _look_up(TABLE: tl.constexpr, pattern):
    return (tl.full([], TABLE, tl.int64) >> pattern.to(tl.int64)).to(tl.int32) & 15


@triton.jit
def _join(nibble):
    """Four nibbles along the last dimension -> the 16 bits of a unit, as i32."""
    return tl.sum(nibble << (tl.arange(0, 4) * 4), axis=len(nibble.shape) - 1)


@triton.jit
def _spread(pair, first, second, SIZE: tl.constexpr):
    """Value pairs to groups: the low value up by ``first`` bits, the high one by ``second``."""
    if SIZE == 1:
        pair = pair.to(tl.int32)
        word = ((pair & 0xFF) << first) | ((pair & 0xFF00) << second)
    else:
        pair = pair.to(tl.int64)
        first = first.to(tl.int64)
        second = second.to(tl.int64)
        word = ((pair & 0xFFFF) << first) | ((pair & 0xFFFF0000) << second)
    return word


@triton.jit
def _flat_tile(groups, WORD: tl.constexpr, UNITS: tl.constexpr):
    """Row, first group, groups left from there, and unit numbers of a program's tile."""
    tile = tl.program_id(0)
    row = tile.to(tl.int64) * 0
    if not WORD:
        tiles = tl.cdiv(groups, UNITS * 4)
        row = (tile // tiles).to(tl.int64)
        tile = (tile % tiles).to(tl.int32)
    start = tile.to(tl.int64) * (UNITS * 4)
    left = tl.minimum(groups - start, UNITS * 4).to(tl.int32)
    return row, start, left, tl.arange(0, UNITS)


@triton.jit
def _inside(at, left, WORD: tl.constexpr):
    """Which groups of the units are in the row; whole units where the row has no partial one."""
    j = tl.arange(0, 4)
    group = tl.expand_dims(at * 4, -1) + j
    if WORD:
        inside = tl.expand_dims(at * 4 < left, -1) & (j >= 0)
    else:
        inside = group < left
    return group, inside


@triton.jit
def decompress_kernel(
    pairs,
    mask,
    dense,
    error,
    groups,
    mask_stride,
    SIZE: tl.constexpr,
    WORD: tl.constexpr,
    UNITS: tl.constexpr,
):
    row, start, left, at = _flat_tile(groups, WORD, UNITS)
    mask += row * mask_stride + (start // 4 if WORD else start // 2)
    unit = _load_units(mask, at, left, WORD)
    place = row * groups + start
    _report(error, place + at * 4, _wrong_mask(unit, at, left, WORD))
    first, second = _moves(unit, SIZE)
    group, inside = _inside(at, left, WORD)
    pair = tl.load(pairs + place + group, mask=inside, other=0)
    tl.store(dense + place + group, _spread(pair, first, second, SIZE), mask=inside)


@triton.jit
def compress_kernel(
    dense,
    mask,
    pairs,
    error,
    groups,
    mask_stride,
    SIZE: tl.constexpr,
    WORD: tl.constexpr,
    UNITS: tl.constexpr,
):
    row, start, left, at = _flat_tile(groups, WORD, UNITS)
    mask += row * mask_stride + (start // 4 if WORD else start // 2)
    unit = _load_units(mask, at, left, WORD)
    place = row * groups + start
    first, second = _moves(unit, SIZE)
    group, inside = _inside(at, left, WORD)
    word = tl.load(dense + place + group, mask=inside, other=0)
    if SIZE == 1:
        pair = ((word >> first) & 0xFF) | ((word >> second) & 0xFF00)
        dropped = word & ~((0xFF << first) | (0xFF00 << second))
        tl.store(pairs + place + group, pair.to(tl.int16), mask=inside)
    else:
        first = first.to(tl.int64)
        second = second.to(tl.int64)
        pair = ((word >> first).to(tl.int32) & 0xFFFF) | ((word >> second).to(tl.int32) & -0x10000)
        LOW: tl.constexpr = 0xFFFF
        HIGH: tl.constexpr = 0xFFFF0000
        ones = tl.zeros_like(word)
        kept = ((ones + LOW) << first) | ((ones + HIGH) << second)
        left_over = word & ~kept & 0x7FFF7FFF7FFF7FFF
        dropped = left_over.to(tl.int32) | (left_over >> 32).to(tl.int32)
        tl.store(pairs + place + group, pair, mask=inside)
    wrong = _wrong_mask(unit, at, left, WORD) | _any(dropped)
    _report(error, place + at * 4, wrong)


@triton.jit
def mask_kernel(
    dense,
    mask,
    error,
    groups,
    mask_stride,
    SIZE: tl.constexpr,
    WORD: tl.constexpr,
    UNITS: tl.constexpr,
):
    row, start, left, at = _flat_tile(groups, WORD, UNITS)
    place = row * groups + start
    group, inside = _inside(at, left, WORD)
    word = tl.load(dense + place + group, mask=inside, other=0)
    pattern, _ = _pattern(word, SIZE)
    nibble = _look_up(_MASK_OF_PATTERN, pattern)
    if not WORD:
        nibble = tl.where(inside, nibble, 0)
    unit = _join(nibble)
    wrong = unit & (unit >> 1)
    wrong = wrong & (wrong >> 2) & 0x1111
    _report(error, place + at * 4, wrong)
    if WORD:
        mask += row * mask_stride + start // 4
        tl.store(mask + at, unit.to(tl.int16), mask=at * 4 < left)
    else:
        mask += row * mask_stride + start // 2
        tl.store(mask + at * 2, unit.to(tl.uint8), mask=at * 4 < left)
        tl.store(mask + at * 2 + 1, (unit >> 8).to(tl.uint8), mask=at * 4 + 2 < left)


@triton.jit
def _block_tile(n, groups, BLOCKS: tl.constexpr):
    """A program's 64 rows by BLOCKS blocks of 128 columns, each with eight units a row.

    Returns the first row and group, the row and unit number of the program's units, row by row,
    and the place and offsets of their words.
    """
    UNITS: tl.constexpr = 8 * BLOCKS
    first_row = tl.program_id(1) * 64
    first_group = tl.program_id(0) * (32 * BLOCKS)
    unit = tl.arange(0, 64 * UNITS)
    m = unit // UNITS
    u = unit % UNITS
    place = first_row.to(tl.int64) * groups + first_group
    offset = (m * groups + u * 4)[:, None] + tl.arange(0, 4)[None, :]
    return first_row, first_group, m, u, place, offset


@triton.jit
def _block_inside(first_row, first_group, m, u, n, groups, WHOLE: tl.constexpr):
    """Which groups of the units exist; whole units where the rows have no partial one."""
    j = tl.arange(0, 4)[None, :]
    if WHOLE:
        inside = ((first_row + m < n) & (first_group + u * 4 < groups))[:, None] & (j >= 0)
    else:
        inside = (first_row + m < n)[:, None] & ((first_group + u * 4)[:, None] + j < groups)
    return inside


@triton.jit
def _meta_tile(n, groups, BLOCKS: tl.constexpr):
    """Where the metadata of a program's blocks is, eight units a row of a block."""
    row_blocks = tl.cdiv(n, 64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    start = (block.to(tl.int64) * row_blocks + tl.program_id(1)) * 512
    at = start + tl.arange(0, 512)[None, :]
    return at, (block * 32 < groups) & (at >= 0)


@triton.jit
def _to_kernel_order(unit, SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """Units, row by row -> [BLOCKS, 512] as the metadata has them."""
    if SIZE == 1:
        unit = tl.permute(tl.reshape(unit, (64, BLOCKS, 8)), (1, 0, 2))
    else:
        # [m'//16, m'//8%2, m'%8, block, k'//32, k'//16%2]
        unit = tl.reshape(unit, (4, 2, 8, BLOCKS, 4, 2))
        unit = tl.permute(unit, (3, 0, 5, 2, 4, 1))
    return tl.reshape(unit, (BLOCKS, 512))


@triton.jit
def _from_kernel_order(unit, SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """Inverse of `_to_kernel_order`."""
    if SIZE == 1:
        unit = tl.permute(tl.reshape(unit, (BLOCKS, 64, 8)), (1, 0, 2))
    else:
        unit = tl.reshape(unit, (BLOCKS, 4, 2, 8, 4, 2))
        unit = tl.permute(unit, (1, 5, 3, 0, 4, 2))
    return tl.reshape(unit, (512 * BLOCKS,))


@triton.jit
def _report(error, place, wrong):
    """Lower the error word to the first place with a nonzero in ``wrong``."""
    tl.atomic_min(error + place * 0, place.to(tl.int64), mask=wrong != 0, sem="relaxed")


@triton.jit
def sm90_compress_kernel(
    dense,
    pairs,
    meta,
    error,
    n,
    groups,
    SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    first_row, first_group, m, u, place, offset = _block_tile(n, groups, BLOCKS)
    inside = _block_inside(first_row, first_group, m, u, n, groups, WHOLE)
    if EVEN:
        word = tl.load(dense + place + offset)
    else:
        word = tl.load(dense + place + offset, mask=inside, other=0)
    pattern, word = _pattern(word, SIZE)
    nibble = _look_up(_META_OF_PATTERN, pattern)
    if SIZE == 1:
        pair = (word >> ((nibble << 3) & 24)) & 0xFF
        pair = (pair | ((word >> ((nibble << 1) & 24)) << 8)).to(tl.int16)
    else:
        pair = (word >> ((nibble << 4) & 48).to(tl.int64)).to(tl.int32) & 0xFFFF
        pair = pair | ((word >> ((nibble << 2) & 48).to(tl.int64)).to(tl.int32) << 16)
    unit = _join(nibble)
    # 0xF is the only nibble here whose low two bits are both set.
    _report(error, first_row + m, unit & (unit >> 1) & 0x1111)
    at, exists = _meta_tile(n, groups, BLOCKS)
    unit = _to_kernel_order(unit.to(tl.int16), SIZE, BLOCKS)
    if EVEN:
        tl.store(pairs + place + offset, pair)
        tl.store(meta + at, unit)
    else:
        tl.store(pairs + place + offset, pair, mask=inside)
        tl.store(meta + at, unit, mask=exists)


@triton.jit
def sm90_decompress_kernel(
    pairs,
    meta,
    dense,
    error,
    n,
    groups,
    SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    first_row, first_group, m, u, place, offset = _block_tile(n, groups, BLOCKS)
    inside = _block_inside(first_row, first_group, m, u, n, groups, WHOLE)
    at, exists = _meta_tile(n, groups, BLOCKS)
    if EVEN:
        unit = tl.load(meta + at)
        pair = tl.load(pairs + place + offset)
    else:
        unit = tl.load(meta + at, mask=exists, other=0)
        pair = tl.load(pairs + place + offset, mask=inside, other=0)
    unit = _from_kernel_order(unit, SIZE, BLOCKS).to(tl.int32) & 0xFFFF
    nibble = (unit[:, None] >> (tl.arange(0, 4) * 4)[None, :]) & 15
    if SIZE == 1:
        pair = pair.to(tl.int32) & 0xFFFF
        word = ((pair & 0xFF) << ((nibble << 3) & 24)) | ((pair >> 8) << ((nibble << 1) & 24))
    else:
        first = pair.to(tl.int64) & 0xFFFF
        second = (pair.to(tl.int64) >> 16) & 0xFFFF
        word = first << ((nibble << 4) & 48).to(tl.int64)
        word = word | (second << ((nibble << 2) & 48).to(tl.int64))
    # Valid: i0 < i1, compared in all four nibbles at once, or 0 and no values.
    high = unit >> 2
    differ = unit ^ high
    less = ((high & differ) >> 1) | (high & differ & ~(differ >> 1))
    some = unit | high
    wrong = (some | (some >> 1)) & ~less & 0x1111
    extra = tl.where(nibble == 0, pair, 0)
    if not EVEN:
        # Padding is 0 throughout.
        extra = tl.where(inside, extra, nibble)
    _report(error, first_row + m, wrong | _any(extra))
    if EVEN:
        tl.store(dense + place + offset, word)
    else:
        tl.store(dense + place + offset, word, mask=inside)
