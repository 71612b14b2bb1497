"""Groups of four columns: the words they are moved as, and which two of the four are kept."""

from __future__ import annotations

import torch

# One group and its two kept values, by element size in bytes.
GROUP_DTYPE = {1: torch.int32, 2: torch.int64}
PAIR_DTYPE = {1: torch.int16, 2: torch.int32}


def index_pair(pattern: int) -> tuple[int, int] | None:
    """SM90 index pair of a 4-bit nonzero pattern; None for more than two nonzeros."""
    positions = [p for p in range(4) if pattern >> p & 1]
    if len(positions) > 2:
        return None
    if len(positions) == 2:
        return positions[0], positions[1]
    if len(positions) == 1:
        return (positions[0], 3) if positions[0] < 3 else (0, 3)
    return 0, 0


def kept_pair(mask: int) -> tuple[int, int] | None:
    """The two columns a bitmask nibble keeps; None unless there are exactly two."""
    return index_pair(mask) if mask.bit_count() == 2 else None


def meta_pair(nibble: int) -> tuple[int, int] | None:
    """Index pair of an SM90 nibble; None where it is not one."""
    low, high = nibble & 3, nibble >> 2
    return (low, high) if low < high or nibble == 0 else None


def meta_nibble(pattern: int) -> int | None:
    """SM90 nibble of a 4-bit nonzero pattern; None for more than two nonzeros."""
    pair = index_pair(pattern)
    return None if pair is None else pair[0] | pair[1] << 2


def kept_of_pattern(pattern: int) -> int | None:
    """Bitmask nibble `bitmask_of` gives a nonzero pattern; None for more than two nonzeros."""
    for column in range(4):
        if pattern.bit_count() < 2:
            pattern |= 1 << column
    return pattern if pattern.bit_count() == 2 else None
