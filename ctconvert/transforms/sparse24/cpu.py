"""The torch path of :mod:`ctconvert.transforms.sparse24`, which describes the forms.

The functions without a docstring are that package's own, of arguments that it has checked.

A group is one word (int32 for 8-bit elements, int64 for 16-bit), its two kept values are half a
word. Which elements are nonzero becomes a 4-bit pattern, two patterns to a byte, and small tables
indexed by the pattern hold the factor or the shifts that move both values at once. Work goes over
blocks of rows, so the temporaries are a few cache-sized blocks and, for the SM90 forms, one more
copy of ``meta``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctconvert.transforms.dtypes import empty
from ctconvert.transforms.shapes import sm90_meta_shape
from ctconvert.transforms.sparse24 import tables
from ctconvert.transforms.sparse24.errors import (
    raise_dense_error,
    raise_drop_error,
    raise_mask_error,
    raise_meta_error,
)
from ctconvert.transforms.sparse24.groups import GROUP_DTYPE, PAIR_DTYPE
from ctconvert.transforms.sparse24.order import from_kernel_order, padding_is_zero, to_kernel_order
from ctconvert.transforms.threads import GRAIN, slices, spread
from ctconvert.transforms.words import as_words


def bitmask_decompress(compressed: Tensor, bitmask: Tensor, k: int) -> Tensor:
    bitmask = bitmask.contiguous()
    size, n = compressed.element_size(), compressed.shape[0]
    dense = empty((n, k), compressed.dtype)
    groups = dense.view(GROUP_DTYPE[size])
    pairs = as_words(compressed, PAIR_DTYPE[size])
    first, second = tables.mask_shifts(size)

    def block(rows: slice) -> None:
        mask = _whole_mask(bitmask[rows], k)
        ok = mask is not None and _scatter(
            pairs[rows], _table_index(mask, size), first, second, groups[rows]
        )
        if not ok:
            raise_mask_error(bitmask[rows], k, rows.start)

    _run_blocks(block, n, k, size)
    return dense


def bitmask_compress(dense: Tensor, bitmask: Tensor) -> Tensor:
    bitmask = bitmask.contiguous()
    size = dense.element_size()
    n, k = dense.shape
    compressed = empty((n, k // 2), dense.dtype)
    pairs = compressed.view(PAIR_DTYPE[size])
    groups = as_words(dense, GROUP_DTYPE[size])
    factors = tables.mask_factors(size)

    def block(rows: slice) -> None:
        mask = _whole_mask(bitmask[rows], k)
        source = _even_columns(groups[rows]).view(torch.int64)
        pattern = _pattern(_code(_nonzero(source, size), size), size)
        if mask is None or int((pattern & ~mask).max()) != 0:
            raise_drop_error(dense[rows], bitmask[rows], rows.start)
        index = _table_index(mask, size)
        if size == 2:
            # What is not kept may be -0.0, and counts as zero.
            source = _look_up(tables.keep_masks(), index, source).bitwise_and_(source)
        if not _gather(source.view(GROUP_DTYPE[size]), index, factors, pairs[rows]):
            raise_drop_error(dense[rows], bitmask[rows], rows.start)

    _run_blocks(block, n, k, size)
    return compressed


def bitmask_of(dense: Tensor) -> Tensor:
    size = dense.element_size()
    n, k = dense.shape
    bitmask = empty((n, -(-k // 8)), torch.uint8)
    groups = as_words(dense, GROUP_DTYPE[size])

    def block(rows: slice) -> None:
        source = _even_columns(groups[rows]).view(torch.int64)
        pattern = _pattern(_code(_nonzero(source, size), size), size)
        mask = tables.mask_of_pattern().index_select(0, pattern.to(torch.int32).flatten())
        if int(mask.max()) == tables.INVALID_BYTE:
            raise_dense_error(dense[rows], rows.start)
        bitmask[rows].copy_(mask.view_as(pattern))

    _run_blocks(block, n, k, size)
    if k % 8:
        bitmask[:, -1].bitwise_and_(0x0F)
    return bitmask


def sm90_compress(dense: Tensor) -> tuple[Tensor, Tensor]:
    size = dense.element_size()
    n, k = dense.shape
    values = empty((n, k // 2), dense.dtype)
    pairs = values.view(PAIR_DTYPE[size])
    meta = torch.zeros(sm90_meta_shape(n, k), dtype=torch.uint8)
    groups = as_words(dense, GROUP_DTYPE[size])
    factors = tables.pattern_factors(size)

    def block(rows: slice) -> None:
        source = _even_columns(groups[rows]).view(torch.int64)
        nonzero = _nonzero(source, size)
        if size == 2:
            source = _without_negative_zero(source, nonzero)
        code = _code(nonzero, size)
        pattern = _pattern(code, size)
        nibbles = tables.meta_of_pattern().index_select(0, pattern.to(torch.int32).flatten())
        if int(nibbles.max()) == tables.INVALID_BYTE:
            raise_dense_error(dense[rows], rows.start)
        meta[rows, : pattern.shape[1]].copy_(nibbles.view_as(pattern))
        _gather(source.view(GROUP_DTYPE[size]), code.flatten(), factors, pairs[rows])

    _run_blocks(block, n, k, size)
    return values, to_kernel_order(meta, size)


def sm90_decompress(values: Tensor, meta: Tensor, n: int, k: int) -> Tensor:
    size = values.element_size()
    dense = empty((n, k), values.dtype)
    groups = dense.view(GROUP_DTYPE[size])
    pairs = as_words(values, PAIR_DTYPE[size])
    nibbles = from_kernel_order(meta, size)
    first, second = tables.meta_shifts(size)
    if not padding_is_zero(nibbles, n, k):
        raise_meta_error(values, nibbles, n, k, 0)

    def block(rows: slice) -> None:
        index = _table_index(nibbles[rows, : -(-k // 8)], size)
        if not _scatter(
            pairs[rows], index, first, second, groups[rows], tables.no_value_masks(size)
        ):
            raise_meta_error(values[rows], nibbles[rows], rows.stop - rows.start, k, rows.start)

    _run_blocks(block, n, k, size)
    return dense


def _run_blocks(work: Callable[[slice], None], n: int, k: int, size: int) -> None:
    """Calls ``work`` on blocks of rows."""

    def run(share: Sequence[slice]) -> None:
        for rows in share:
            work(rows)

    spread(run, slices(n, GRAIN // -(-k // 4)), n * k * size)


def _even_columns(block: Tensor) -> Tensor:
    """The block with a zero group added to each row where the number of groups is odd."""
    if block.shape[1] % 2:
        return torch.nn.functional.pad(block, (0, 1))
    return block


def _whole_mask(mask: Tensor, k: int) -> Tensor | None:
    """The bitmask rows with a valid group past an odd K/4; None where bits are set there."""
    if k % 8 == 0:
        return mask
    if bool((mask[:, -1] > 0x0F).any()):
        return None
    mask = mask.clone()
    mask[:, -1] |= 0x30
    return mask


def _repeated(value: int, bits: int, word_bits: int) -> int:
    """``value`` in every field of ``bits`` bits of a word."""
    return sum(value << shift for shift in range(0, word_bits, bits))


def _nonzero(block: Tensor, size: int) -> Tensor:
    """The words with the top bit set of every nonzero element, and no other bit.

    The sign of a 16-bit float does not count.
    """
    low = _repeated((1 << 8 * size - 1) - 1, 8 * size, 8 * block.element_size())
    # The sum cannot carry out of an element.
    top = (block & low).add_(low)
    if size == 1:
        top.bitwise_or_(block)
    return top.bitwise_and_(~low)


def _without_negative_zero(block: Tensor, nonzero: Tensor) -> Tensor:
    """The words with -0.0 of 16-bit floats made +0.0: the sign goes where nothing is nonzero."""
    low = _repeated(0x7FFF, 16, 8 * block.element_size())
    return (nonzero | low).bitwise_and_(block)


def _code(nonzero: Tensor, size: int) -> Tensor:
    """Gathers the top bits of the words' elements, in place: bit j for element j."""
    word, bits = 8 * nonzero.element_size(), 8 * size
    count = word // bits
    # The product moves the top bit of element j to bit j of the topmost ``count`` bits. No two
    # terms meet, so nothing carries.
    factor = sum(1 << word - count + j - (bits * j + bits - 1) for j in range(count))
    return nonzero.mul_(factor).bitwise_right_shift_(word - count).bitwise_and_((1 << count) - 1)


def _pattern(code: Tensor, size: int) -> Tensor:
    """Codes of all words of a row -> u8 [R, ceil(K/8)]: bit j of byte c for column 8c + j."""
    pattern = code.to(torch.uint8)
    if size == 1:
        return pattern
    pairs = pattern.view(torch.int16)
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)


def _table_index(pattern: Tensor, size: int) -> Tensor:
    """i32 row numbers for the word tables: one a byte for 8-bit elements, else one a nibble."""
    if size == 2:
        spread = pattern.to(torch.int16)
        spread = (spread << 4).bitwise_or_(spread).bitwise_and_(0x0F0F)
        pattern = spread.view(torch.uint8)
    return pattern.to(torch.int32).flatten()


def _look_up(table: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Table rows as words of the dtype and shape of ``like``."""
    return table.index_select(0, index).view(like.dtype).view_as(like)


def _gather(block: Tensor, index: Tensor, factors: Tensor, out: Tensor) -> bool:
    """Write both kept values of every group to ``out``; False where a table row is invalid.

    All other elements of the group are zero, so one product moves both values to the word's top.
    """
    moved = _look_up(factors, index, block)
    if int(moved.min()) < 0:
        return False
    moved.mul_(block).bitwise_right_shift_(4 * block.element_size())
    out.copy_(moved[:, : out.shape[1]])
    return True


def _scatter(
    pairs: Tensor,
    index: Tensor,
    first: Tensor,
    second: Tensor,
    out: Tensor,
    no_values: Tensor | None = None,
) -> bool:
    """Write the groups of value pairs to ``out``; False where a table row or a value is invalid."""
    columns = out.shape[1]
    low, high = (0x00FF, 0xFF00) if out.dtype == torch.int32 else (0xFFFF, 0xFFFF0000)
    upper = _even_columns(pairs).to(out.dtype)
    shift = _look_up(first, index, upper)
    marker = int(shift.max())
    if marker == tables.INVALID:
        return False
    if marker == tables.NO_VALUES and no_values is not None:
        held = _look_up(no_values, index, upper).bitwise_and_(upper)
        if any(int(extreme) != 0 for extreme in held.aminmax()):
            return False
    lower = (upper & low).bitwise_left_shift_(shift)
    shift = _look_up(second, index, upper)
    upper.bitwise_and_(high).bitwise_left_shift_(shift)
    torch.bitwise_or(lower[:, :columns], upper[:, :columns], out=out)
    return True
