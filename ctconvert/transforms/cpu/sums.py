"""Sums of codes along K, several codes an operation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Elements of one operation: it stays in the calling thread (torch's GRAIN_SIZE) and in the cache.
_GRAIN = 32768
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
    out = words.new_empty((words.shape[0], units.shape[1] * 16 // columns))
    for rows in _slices(units):
        x = units[rows]
        pairs = x.bitwise_right_shift(4).bitwise_and_(_NIBBLES).add_(x & _NIBBLES)
        # At most 8 units of bytes of at most 30: no sum overflows its byte.
        out[rows] = _folded(_added(pairs.unflatten(1, (-1, columns // 16))))
    return out


def byte_sums(values: torch.Tensor) -> torch.Tensor:
    """Sums of i8 [N, K] along K, K % 32 == 0, to i32 [N]."""
    n, k = values.shape
    units = _units(values)
    out = torch.empty(n, dtype=torch.int32, device=values.device)
    for rows in _slices(units):
        # As u8: 16-bit lanes hold 128 sums of two bytes.
        x = units[rows] ^ _SIGNS
        lanes = x.bitwise_right_shift(8).bitwise_and_(_BYTES).add_(x & _BYTES)
        total = sum((_wide(part.sum(1)) for part in lanes.split(128, 1)), start=lanes.new_zeros(1))
        out[rows] = total - 128 * k
    return out


_NIBBLES = 0x0F0F0F0F0F0F0F0F
_BYTES = 0x00FF00FF00FF00FF
_HALVES = 0x0000FFFF0000FFFF
_SIGNS = -0x7F7F7F7F7F7F7F80  # the i64 of eight bytes 0x80


def _units(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    if tensor.storage_offset() * tensor.element_size() % 8:
        tensor = tensor.clone()
    return tensor.view(torch.int64)


def _added(units: torch.Tensor) -> torch.Tensor:
    """The sum along the last dimension, which is short."""
    first, *others = units.unbind(-1)
    total = first.clone()
    for other in others:
        total.add_(other)
    return total


def _folded(total: torch.Tensor) -> torch.Tensor:
    """The sum of the eight bytes of each unit."""
    return _wide((total & _BYTES).add_(total.bitwise_right_shift(8).bitwise_and_(_BYTES)))


def _wide(lanes: torch.Tensor) -> torch.Tensor:
    """The sum of the four 16-bit lanes of each unit."""
    halves = (lanes & _HALVES).add_(lanes.bitwise_right_shift(16).bitwise_and_(_HALVES))
    return (halves & 0xFFFFFFFF).add_(halves.bitwise_right_shift(32))


def _slices(units: torch.Tensor) -> Iterator[slice]:
    n, width = units.shape
    elements = _GRAIN if units.device.type == "cpu" else _GRAIN * _DEVICE_FACTOR
    step = max(elements // max(width, 1), 1)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
