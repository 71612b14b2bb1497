"""What a layout that permutes the bits of a code's position is, as a record; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

#: The lower of every two fields of so many bits.
FIELDS = {4: 0x0F0F0F0F, 8: 0x00FF00FF, 16: 0x0000FFFF}


@dataclass(frozen=True)
class Order:
    """The words of a layout of an N x K weight, slowest dimension first.

    A dimension is (size, distance in words between its elements in the K-packed weight). ``outer``
    are two or three of any size, ``inner`` two or three of two elements, ``tail`` one whose size is
    a power of two. ``exchanges`` are (inner dimension, shift): the fields that are traded have
    ``shift`` bits. ``block`` is how many elements of the first two outer dimensions the CPU takes
    at a time: 65536 words or less, in runs as long as possible before and after. Where there is a
    ``gap``, the layout leaves so many words out after every ``run`` of the order's.
    """

    bits: int
    n: int
    k: int
    outer: tuple[tuple[int, int], ...]
    inner: tuple[tuple[int, int], ...]
    tail: tuple[int, int]
    exchanges: tuple[tuple[int, int], ...]
    block: tuple[int, int]
    run: int = 0
    gap: int = 0

    @property
    def row_words(self) -> int:
        """Words of a row of the K-packed weight."""
        return self.k * self.bits // 32

    @property
    def dims(self) -> tuple[tuple[int, int], ...]:
        return (*self.outer, *self.inner, self.tail)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for size, _ in self.dims)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(stride for _, stride in self.dims)

    @property
    def places(self) -> tuple[int, ...]:
        """Distance in words between the elements of each dimension in the layout."""
        found, distance = [], 1
        for size in reversed(self.sizes):
            gaps = distance // self.run * self.gap if self.gap else 0
            found.append(distance + gaps)
            distance *= size
        return tuple(reversed(found))

    @property
    def words(self) -> int:
        return prod(self.sizes)
