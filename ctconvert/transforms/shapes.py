"""Sizes of packed and tiled weights: arithmetic alone, which planning does without torch."""

from __future__ import annotations

#: Widths whose codes fill a word without a rest and never straddle two.
WORD_BITS = (2, 4, 8)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not less than ``value``."""
    return -(-value // multiple) * multiple


def codes_per_word(bits: int) -> int:
    """Whole codes in a 32-bit word: ``floor(32/bits)``; ValueError unless bits is 1 to 8."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, not {bits}")
    return 32 // bits


def row_words(k: int, bits: int, packing: str = "dense") -> int:
    """Words that a row of ``k`` codes takes: ``ceil(k*bits/32)`` dense, ``ceil(k/f)`` padded.

    Raises ValueError for bits outside 1..8 or an unknown packing.
    """
    f = codes_per_word(bits)
    if packing == "dense":
        return -(-k * bits // 32)
    if packing == "padded":
        return -(-k // f)
    raise ValueError(f"packing must be 'dense' or 'padded', not {packing!r}")


def marlin_padded_shape(n: int, k: int) -> tuple[int, int]:
    """The smallest shape that holds ``n`` x ``k`` and that the kernel runs: (n_padded, k_padded).

    The kernel's tiles need K % 128 == 0 and N % 64 == 0, or K % 64 == 0 and N % 128 == 0. Of the
    two shapes the one with fewer elements is taken, then the one with fewer rows N.

    Raises ValueError for a size under 1.
    """
    if n < 1 or k < 1:
        raise ValueError(f"a weight of {n} x {k} has no elements to pad")
    shapes = [(round_up(n, 64), round_up(k, 128)), (round_up(n, 128), round_up(k, 64))]
    return min(shapes, key=lambda shape: (shape[0] * shape[1], shape[0]))


def sm90_meta_shape(n: int, k: int) -> tuple[int, int]:
    """Shape of the SM90 metadata, u8, of an n x k weight: N up to 64, K up to 128, 8 a byte."""
    return round_up(n, 64), round_up(k, 128) // 8
