"""``int8`` of :mod:`ctconvert.transforms.cpu`, which describes the layout."""

from __future__ import annotations

import torch

from ctconvert.transforms import reorder
from ctconvert.transforms.cpu.sums import byte_sums, whole_words
from ctconvert.transforms.reorder import Order

_CHANNELS = 32


def cpu_int8_pack(values: torch.Tensor) -> torch.Tensor:
    """i8 [N, K] to i8 [N, K + 4].

    The kernel adds 128 to its activations and takes 128 times the sums off, in 32 bits. Raises
    ValueError for another dtype or rank, or unless N % 32 == K % 32 == 0.
    """
    if values.dtype != torch.int8 or values.dim() != 2:
        raise ValueError(
            f"values must be a 2-D torch.int8 tensor, not {values.dtype} {list(values.shape)}"
        )
    n, k = values.shape
    reorder.check_multiples("the CPU's INT8", n, k, _CHANNELS, 32)
    out = values.new_empty((n, k + 4))
    reorder.reorder(whole_words(values), _order(n, k), out.view(torch.int32).view(-1))
    out.view(torch.int32).view(-1, _CHANNELS * (k // 4 + 1))[:, -_CHANNELS:] = _sums(values)
    return out


def cpu_int8_unpack(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Exact inverse of :func:`cpu_int8_pack`: i8 [N, K + 4] to i8 [N, K].

    Raises ValueError for another dtype, a shape that is not that of ``n`` x ``k``, or sums that are
    not those of the weight.
    """
    reorder.check_multiples("the CPU's INT8", n, k, _CHANNELS, 32)
    if packed.dtype != torch.int8 or tuple(packed.shape) != (n, k + 4):
        raise ValueError(
            f"the packed weight must be torch.int8 {[n, k + 4]}, not {packed.dtype} "
            f"{list(packed.shape)}"
        )
    packed = whole_words(packed)
    values = reorder.restore(packed, _order(n, k)).view(torch.int8)
    held = packed.view(-1, _CHANNELS * (k // 4 + 1))[:, -_CHANNELS:]
    wrong = (held != _sums(values)).nonzero()
    if wrong.numel():
        block, channel = wrong[0].tolist()
        raise ValueError(
            f"row {32 * block + channel}: the sum in the packed weight is not 128 times its own"
        )
    return values


def _sums(values: torch.Tensor) -> torch.Tensor:
    """128 times the sums of i8 [N, K]: i32 [N/32, 32]."""
    return byte_sums(values).mul_(128).view(-1, _CHANNELS)


def _order(n: int, k: int) -> Order:
    row = k // 4
    return Order(
        8,
        n,
        k,
        outer=((n // 32, 32 * row), (k // 4, 1)),
        inner=((2, 16 * row), (2, 8 * row)),
        tail=(8, row),
        exchanges=(),  # the words stay whole
        block=(8, 256),
        run=8 * k,
        gap=_CHANNELS,
    )
