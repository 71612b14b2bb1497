"""Tables of the torch path: what to do with a group, by the four bits that describe it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ctconvert.transforms.sparse24.groups import (
    index_pair,
    kept_of_pattern,
    kept_pair,
    meta_nibble,
    meta_pair,
)
from ctconvert.transforms.words import signed

# Markers in the shift tables, larger than any shift, and in the byte tables.
NO_VALUES = 64
INVALID = 127
INVALID_BYTE = 0xFF


def _word_table(size: int, entry: Callable[[int], int]) -> Tensor:
    """i64 table of a word per group: 256 rows of two int32 (8-bit elements) or 16 rows of one."""
    if size == 2:
        return torch.tensor([entry(i) for i in range(16)], dtype=torch.int64)
    return torch.tensor(
        [(entry(i >> 4) << 32) + (entry(i & 15) & 0xFFFFFFFF) for i in range(256)],
        dtype=torch.int64,
    )


def _factor_table(size: int, pair_of: Callable[[int], tuple[int, int] | None]) -> Tensor:
    bits = 8 * size

    def factor(code: int) -> int:
        pair = pair_of(code)
        if pair is None:
            return -1
        if pair == (0, 0):
            return 0
        # Element i0 goes to position 2 of the word, element i1 to position 3. Where the two lie
        # side by side one power of two moves both. What else the product makes falls below.
        return (1 << bits * (2 - pair[0])) | (1 << bits * (3 - pair[1]))

    return _word_table(size, factor)


def _shift_tables(
    size: int, pair_of: Callable[[int], tuple[int, int] | None]
) -> tuple[Tensor, Tensor]:
    def shift(code: int, slot: int) -> int:
        pair = pair_of(code)
        if pair is None:
            return INVALID
        # The second value already stands one element up.
        return NO_VALUES if pair == (0, 0) else 8 * size * (pair[slot] - slot)

    return _word_table(size, lambda c: shift(c, 0)), _word_table(size, lambda c: shift(c, 1))


@functools.cache
def pattern_factors(size: int) -> Tensor:
    return _factor_table(size, index_pair)


@functools.cache
def mask_factors(size: int) -> Tensor:
    return _factor_table(size, kept_pair)


@functools.cache
def mask_shifts(size: int) -> tuple[Tensor, Tensor]:
    return _shift_tables(size, kept_pair)


@functools.cache
def meta_shifts(size: int) -> tuple[Tensor, Tensor]:
    return _shift_tables(size, meta_pair)


@functools.cache
def no_value_masks(size: int) -> Tensor:
    """Ones over the value pair of every group whose nibble says that it holds none."""
    ones = (1 << 16 * size) - 1
    return _word_table(size, lambda code: ones if code == 0 else 0)


@functools.cache
def keep_masks() -> Tensor:
    """Ones over the kept columns of a group of four 16-bit elements."""

    def ones(code: int) -> int:
        return signed(sum(0xFFFF << 16 * p for p in range(4) if code >> p & 1), 64)

    return _word_table(2, ones)


def _byte_table(nibble_of: Callable[[int], int | None], invalid: int) -> Tensor:
    """u8 [256]: a nibble for each nibble, ``invalid`` where either has none."""
    rows = []
    for byte in range(256):
        low, high = nibble_of(byte & 15), nibble_of(byte >> 4)
        rows.append(invalid if low is None or high is None else low | high << 4)
    return torch.tensor(rows, dtype=torch.uint8)


@functools.cache
def meta_of_pattern() -> Tensor:
    return _byte_table(meta_nibble, INVALID_BYTE)


@functools.cache
def mask_of_pattern() -> Tensor:
    return _byte_table(kept_of_pattern, INVALID_BYTE)
