"""Sums of codes along K, several codes an operation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ctconvert.transforms.threads import GRAIN, slices, spread

# Units of one operation, of two i32 each, which stays in the calling thread.
_GRAIN = GRAIN // 2
# On an accelerator launches, not caches, are what an operation costs.
_DEVICE_FACTOR = 256


def whole_words(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes, contiguous, as i32 words: the last dimension is a multiple of 4 of them."""
    tensor = tensor.contiguous()
    return (tensor if tensor.storage_offset() % 4 == 0 else tensor.clone()).view(torch.int32)


def nibble_sums(words: torch.Tensor, columns: int) -> torch.Tensor:
    """Sums of 4-bit codes: i32 [N, K/8] words to i32 [N, K/columns], 32 <= columns <= 128.

    ``columns`` is a multiple of 32 that divides K.
    """
    units = _units(words)
    size = columns // 16  # units of a sum: at most 8 of bytes of at most 30, which fit a byte
    totals = units.new_empty((units.shape[0], units.shape[1] // size))

    def pairs(source: torch.Tensor, block: torch.Tensor, scratch: torch.Tensor) -> None:
        block.copy_(source)
        _pair(block, 4, _NIBBLES, scratch)

    _reduce(units, pairs, size, totals)
    return _folded(totals, 8)


def byte_sums(values: torch.Tensor) -> torch.Tensor:
    """Sums of i8 [N, K] along K, to i32 [N]."""
    k = values.shape[1]
    if k % 8 or not values.numel():
        return values.sum(1, dtype=torch.int32)
    units = _units(values)
    size = math.gcd(units.shape[1], 128)  # as u8: 16-bit lanes hold 128 sums of two bytes
    totals = units.new_empty((units.shape[0], units.shape[1] // size))

    def pairs(source: torch.Tensor, block: torch.Tensor, scratch: torch.Tensor) -> None:
        torch.bitwise_xor(source, _SIGNS, out=block)
        _pair(block, 8, _MASKS[8], scratch)

    _reduce(units, pairs, size, totals)
    return _folded(totals, 16).sum(1, dtype=torch.int32) - 128 * k


_NIBBLES = 0x0F0F0F0F0F0F0F0F
#: By the fields' bits: the lower of every two.
_MASKS = {8: 0x00FF00FF00FF00FF, 16: 0x0000FFFF0000FFFF, 32: 0xFFFFFFFF}
_SIGNS = -0x7F7F7F7F7F7F7F80  # the i64 of eight bytes 0x80


def _pair(x: torch.Tensor, shift: int, mask: int, y: torch.Tensor) -> None:
    """``x``: the sums of every two neighbouring fields of ``shift`` bits, in fields twice as wide.

    In place; ``y`` is scratch.
    """
    torch.bitwise_right_shift(x, shift, out=y)
    x.bitwise_and_(mask)
    y.bitwise_and_(mask)
    # Sums of 32 bits are the faster ones, and no field of these crosses a word.
    x.view(torch.int32).add_(y.view(torch.int32))


def _folded(totals: torch.Tensor, shift: int) -> torch.Tensor:
    """The sum of all fields of ``shift`` bits of each unit, as i32."""
    blocks = totals.view(-1).split(_GRAIN if totals.device.type == "cpu" else 1 << 24)
    for block in blocks:
        scratch = torch.empty_like(block)
        width = shift
        while width < 64:
            _pair(block, width, _MASKS[width], scratch)
            width *= 2
    return totals.to(torch.int32)


def _units(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes, contiguous, as i64."""
    tensor = tensor.contiguous()
    if tensor.storage_offset() * tensor.element_size() % 8:
        tensor = tensor.clone()
    return tensor.view(torch.int64)


def _reduce(
    units: torch.Tensor,
    pairs: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None],
    size: int,
    totals: torch.Tensor,
) -> None:
    """``totals``: the sums of every ``size`` units of a row, in rows small enough for a cache.

    ``pairs`` makes of rows a block of wider fields; it is given scratch of the same size.
    """
    n, width = units.shape
    on_cpu = units.device.type == "cpu"
    step = min(max((_GRAIN if on_cpu else _GRAIN * _DEVICE_FACTOR) // max(width, 1), 1), n)

    def work(parts: Sequence[slice]) -> None:
        scratch = units.new_empty((2, step, width))
        for rows in parts:
            block, other = scratch[:, : rows.stop - rows.start]
            pairs(units[rows], block, other)
            torch.sum(block.unflatten(1, (-1, size)), -1, out=totals[rows])

    spread(work, slices(n, step), units.nbytes if on_cpu else 0)
