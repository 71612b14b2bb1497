"""The torch path of :mod:`ctconvert.transforms.reorder`: blocks that stay in the L2 cache.

A block of the order's words is copied from the K-packed weight to *planes*, whose first dimensions
are the inner ones and whose others lie as in the weight, so that the copy runs along its rows; the
exchanges run on whole halves of the planes, and a second copy puts the words in the layout's order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from ctconvert.transforms.reorder.order import FIELDS, Order
from ctconvert.transforms.threads import GRAIN, slices, spread

# 64 bytes more a plane: planes a power of two apart would share the sets of the L1 cache.
_PADDING = 16
#: What a run of so many words is copied as.
_WIDE = {2: torch.int64, 4: torch.complex128, 8: torch.complex128, 16: torch.complex128}


class _Planes:
    """Scratch and views for blocks of one size, which is that of every dimension."""

    def __init__(self, order: Order, size: tuple[int, ...]) -> None:
        first, count = len(order.outer), len(order.inner)
        rest = [dim for dim in range(len(size)) if not first <= dim < first + count]
        rest.sort(key=lambda dim: -order.strides[dim])
        self.axes = [*range(first, first + count), *rest]  # the layout's dimensions, as they lie
        self.rows = rest[0]  # the outer dimension that counts blocks of rows
        shape = [size[dim] for dim in self.axes]
        words = torch.Size(shape[count:]).numel()
        scratch = torch.zeros((*shape[:count], words + _PADDING), dtype=torch.int32)
        planes = scratch[..., :words].unflatten(-1, shape[count:])
        self.words = planes.permute([self.axes.index(dim) for dim in range(len(size))])
        # Shifts and masks of 64 bits are the faster ones.
        pairs = scratch[..., :words].view(torch.int64)
        swap = torch.zeros(pairs.numel() // 2, dtype=torch.int64)
        self.steps = []
        for axis, shift in order.exchanges:
            low, high = pairs.select(axis, 0), pairs.select(axis, 1)
            self.steps.append((shift, FIELDS[shift] * 0x100000001, low, high, swap.view(low.shape)))
        self.wide = _WIDE[size[-1]] if rest[-1] == len(size) - 1 else torch.int32

    def load(self, view: torch.Tensor) -> None:
        """The block's words from the weight, along its rows."""
        self._copy(self.words.permute(self.axes), view.permute(self.axes))

    def store(self, view: torch.Tensor) -> None:
        """The block's words to the weight."""
        self._copy(view.permute(self.axes), self.words.permute(self.axes))

    def give(self, view: torch.Tensor) -> None:
        """The block's words to the layout."""
        _copy(view.view(self.wide), self.words.view(self.wide), self.rows)

    def take(self, view: torch.Tensor) -> None:
        """The block's words from the layout."""
        _copy(self.words.view(self.wide), view.view(self.wide), self.rows)

    def exchange(self, backwards: bool) -> None:
        for shift, mask, low, high, swap in reversed(self.steps) if backwards else self.steps:
            # The shift is arithmetic, and of two words at once; the mask is zero where it brings in
            # copies of the sign or bits of the other word.
            torch.bitwise_right_shift(low, shift, out=swap)
            swap.bitwise_xor_(high).bitwise_and_(mask)
            high.bitwise_xor_(swap)
            low.bitwise_xor_(swap.bitwise_left_shift_(shift))

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        _copy(target, source, self.axes.index(self.rows))


def _copy(target: torch.Tensor, source: torch.Tensor, dim: int) -> None:
    parts = -(-target.numel() // GRAIN)
    for to, what in zip(target.chunk(parts, dim), source.chunk(parts, dim), strict=True):
        _copy_part(to, what)


def _copy_part(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


def _spread(
    order: Order,
    words: torch.Tensor,
    flat: torch.Tensor,
    move: Callable[[_Planes, torch.Tensor, torch.Tensor], None],
) -> None:
    """Calls ``move`` on every block: its planes, its words in the weight and in the layout."""
    weight = words.as_strided(order.sizes, order.strides, words.storage_offset())
    layout = flat.as_strided(order.sizes, order.places, flat.storage_offset())
    first, second = order.block

    def work(parts: Sequence[tuple[slice, slice]]) -> None:
        made: dict[torch.Size, _Planes] = {}
        for place in parts:
            before = weight[place]
            if before.shape not in made:
                made[before.shape] = _Planes(order, before.shape)
            move(made[before.shape], before, layout[place])

    parts = itertools.product(slices(order.sizes[0], first), slices(order.sizes[1], second))
    spread(work, list(parts), words.nbytes)


def reorder(words: torch.Tensor, flat: torch.Tensor, order: Order) -> None:
    """K-packed words i32 [N, K/f] into ``flat``."""

    def move(planes: _Planes, before: torch.Tensor, after: torch.Tensor) -> None:
        planes.load(before)
        planes.exchange(backwards=False)
        planes.give(after)

    _spread(order, words, flat, move)


def restore(flat: torch.Tensor, words: torch.Tensor, order: Order) -> None:
    """The inverse: ``flat`` into ``words`` i32 [N, K/f]."""
    if flat.storage_offset() % 4:  # it could not be seen as wider elements
        flat = flat.clone()

    def move(planes: _Planes, before: torch.Tensor, after: torch.Tensor) -> None:
        planes.take(after)
        planes.exchange(backwards=True)
        planes.store(before)

    _spread(order, words, flat, move)
