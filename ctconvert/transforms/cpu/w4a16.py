"""``w4a16`` of :mod:`ctconvert.transforms.cpu`, which describes the layout."""

from __future__ import annotations

import torch

from ctconvert.transforms import reorder
from ctconvert.transforms.reorder import Order


def cpu_w4a16_pack(words: torch.Tensor) -> torch.Tensor:
    """K-packed codes i32 [N, K/8] to i32 [N/16, 2*K].

    Safe to call from several threads. Raises ValueError for another dtype or rank, or unless
    N % 32 == K % 32 == 0.
    """
    reorder.check_words(words, None, "words")
    n, k = words.shape[0], words.shape[1] * 8
    reorder.check_multiples("the CPU's W4A16", n, k, 32, 32)
    return reorder.reorder(words, _order(n, k)).view(n // 16, 2 * k)


def cpu_w4a16_unpack(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Exact inverse of :func:`cpu_w4a16_pack`: i32 [N/16, 2*K] to words i32 [N, K/8].

    Raises ValueError for another dtype, or a shape that is not that of ``n`` x ``k``.
    """
    reorder.check_multiples("the CPU's W4A16", n, k, 32, 32)
    reorder.check_words(packed, (n // 16, 2 * k), "the packed weight")
    return reorder.restore(packed, _order(n, k))


def _order(n: int, k: int) -> Order:
    row = k // 8
    return Order(
        4,
        n,
        k,
        outer=((n // 16, 16 * row), (k // 8, 1)),
        inner=((2, 4 * row), (2, 2 * row), (2, row)),  # n2 n1 n0, which take k2 k1 k0
        tail=(2, 8 * row),  # n3
        exchanges=((0, 16), (1, 8), (2, 4)),
        block=(8, 512),
    )
