"""``w4a8`` of :mod:`ctconvert.transforms.cpu`, which describes the layout."""

from __future__ import annotations

import torch

from ctconvert.transforms import reorder
from ctconvert.transforms.cpu.sums import nibble_sums, whole_words
from ctconvert.transforms.reorder import Order

_CHANNELS = 32


def _block_columns(k: int, groups: int) -> int:
    """B of a weight of K columns in ``groups``; ValueError where the layout has none."""
    if groups < 1 or k % groups or (k // groups) % 32:
        raise ValueError(
            f"the CPU's W4A8 needs groups of a multiple of 32 columns; K = {k} has {groups} groups"
        )
    size = k // groups
    columns = min(128, size)
    if size % columns:
        raise ValueError(f"groups of {size} columns are no multiple of the block of {columns}")
    return columns


def cpu_w4a8_pack(words: torch.Tensor, zero_points: torch.Tensor) -> torch.Tensor:
    """K-packed codes i32 [N, K/8] and zero points u8 [N, groups] to u8 [N/32, K/B, 16*B + 128].

    Symmetric codes have zero point 8. B is 128, or the group's size where that is less. Raises
    ValueError for another dtype, rank or shape, N % 32, or groups that are not of a multiple of 32
    columns, of 128 from 128 on.
    """
    reorder.check_words(words, None, "words")
    n, k = words.shape[0], words.shape[1] * 8
    reorder.check_multiples("the CPU's W4A8", n, k, _CHANNELS, 32)
    _check_zero_points(zero_points, n)
    columns = _block_columns(k, zero_points.shape[1])
    out = words.new_empty(_shape(n, k, columns), dtype=torch.uint8)
    reorder.reorder(words, _order(n, k, columns), out.view(torch.int32).view(-1))
    out[..., 16 * columns :] = _sums(words, zero_points, columns).view(torch.uint8)
    return out


def cpu_w4a8_unpack(
    packed: torch.Tensor, zero_points: torch.Tensor, n: int, k: int
) -> torch.Tensor:
    """Exact inverse of :func:`cpu_w4a8_pack`: its result and zero points u8 [N, groups] to words.

    Raises ValueError for another dtype, a shape that is not that of ``n`` x ``k``, or sums that are
    not those of the codes.
    """
    reorder.check_multiples("the CPU's W4A8", n, k, _CHANNELS, 32)
    _check_zero_points(zero_points, n)
    columns = _block_columns(k, zero_points.shape[1])
    shape = _shape(n, k, columns)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != shape:
        raise ValueError(
            f"the packed weight must be torch.uint8 {list(shape)}, not {packed.dtype} "
            f"{list(packed.shape)}"
        )
    packed = whole_words(packed)
    words = reorder.restore(packed, _order(n, k, columns))
    held = packed[..., 4 * columns :]
    wrong = (held != _sums(words, zero_points, columns)).nonzero()
    if wrong.numel():
        block, at, channel = wrong[0].tolist()
        raise ValueError(
            f"row {32 * block + channel}, columns from {at * columns}: the sum in the packed "
            "weight is not that of its codes less the zero point"
        )
    return words


def cpu_w4a8_group_rows(values: torch.Tensor) -> torch.Tensor:
    """Zero points or scales [N, groups] of any dtype to [N/32, groups, 32], contiguous."""
    if values.dim() != 2 or values.shape[0] % _CHANNELS:
        raise ValueError(f"values must be [N, groups] with N % 32 == 0, not {list(values.shape)}")
    return _channels_last(values).contiguous()


def cpu_w4a8_ungroup_rows(values: torch.Tensor) -> torch.Tensor:
    """Exact inverse of :func:`cpu_w4a8_group_rows`."""
    if values.dim() != 3 or values.shape[2] != _CHANNELS:
        raise ValueError(f"values must be [N/32, groups, 32], not {list(values.shape)}")
    return values.transpose(1, 2).reshape(-1, values.shape[1])


def _channels_last(values: torch.Tensor) -> torch.Tensor:
    return values.unflatten(0, (-1, _CHANNELS)).transpose(1, 2)


def _check_zero_points(zero_points: torch.Tensor, n: int) -> None:
    if zero_points.dtype != torch.uint8 or zero_points.dim() != 2 or zero_points.shape[0] != n:
        raise ValueError(
            f"zero points must be torch.uint8 [{n}, groups], not {zero_points.dtype} "
            f"{list(zero_points.shape)}"
        )


def _sums(words: torch.Tensor, zero_points: torch.Tensor, columns: int) -> torch.Tensor:
    """i32 [N/32, K/B, 32] of the codes of [N, K] less zero points u8 [N, groups]."""
    sums = nibble_sums(words, columns)
    zeros = zero_points.to(torch.int32).mul_(columns)
    sums -= zeros.repeat_interleave(sums.shape[1] // zeros.shape[1], 1)
    return _channels_last(sums).contiguous()


def _shape(n: int, k: int, columns: int) -> tuple[int, int, int]:
    return n // _CHANNELS, k // columns, 16 * columns + 4 * _CHANNELS


def _order(n: int, k: int, columns: int) -> Order:
    row = k // 8
    return Order(
        4,
        n,
        k,
        outer=((n // 32, 32 * row), (k // columns, columns // 8), (columns // 8, 1)),
        inner=((2, 8 * row), (2, 16 * row)),  # n3, which takes k2, and n4
        tail=(8, row),
        exchanges=((0, 4), (0, 8), (0, 16)),
        block=(8, 2048 // columns),
        run=4 * columns,
        gap=_CHANNELS,
    )
