"""The compiled path of :mod:`ctconvert.transforms.sparse24`, which describes the forms.

Each function gives None where the torch path shall do it: without Numba, for little, and wherever
something is wrong, which that path names.

GB/s (in + out) of one busy core, best of four, compiled beside torch, bf16 of 4096 x 14336: bitmask
to dense 5.1 beside 1.3, dense to SM90 2.1 beside 0.8, SM90 to dense 3.5 beside 0.8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ctconvert.transforms.compiled import LOOPS
from ctconvert.transforms.dtypes import empty
from ctconvert.transforms.shapes import sm90_meta_shape
from ctconvert.transforms.sparse24 import cpu
from ctconvert.transforms.sparse24.groups import (
    GROUP_DTYPE,
    PAIR_DTYPE,
    index_pair,
    kept_pair,
    meta_nibble,
    meta_pair,
)
from ctconvert.transforms.threads import slices, spread
from ctconvert.transforms.words import as_words

_ROWS = 64


def bitmask_decompress(
    compressed: torch.Tensor, bitmask: torch.Tensor, k: int
) -> torch.Tensor | None:
    loops = LOOPS.after(3 * compressed.nbytes)
    if loops is None or (k % 8 and bool((bitmask[:, -1] > 0x0F).any())):
        return None
    return _scattered(loops.scatter, compressed, bitmask, "bitmask", k)


def sm90_decompress(
    values: torch.Tensor, meta: torch.Tensor, n: int, k: int
) -> torch.Tensor | None:
    loops = LOOPS.after(3 * values.nbytes)
    if loops is None:
        return None
    nibbles = cpu.from_kernel_order(meta, values.element_size())
    if not cpu.padding_is_zero(nibbles, n, k):
        return None
    return _scattered(loops.scatter, values, nibbles, "meta", k)


def sm90_compress(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    loops = LOOPS.after(3 * dense.nbytes // 2)
    if loops is None:
        return None
    size, (n, k) = dense.element_size(), dense.shape
    values = empty((n, k // 2), dense.dtype)
    meta = torch.zeros(sm90_meta_shape(n, k), dtype=torch.uint8)
    groups = _unsigned(as_words(dense, GROUP_DTYPE[size]))
    pairs, nibbles = _unsigned(values.view(PAIR_DTYPE[size])), meta.numpy()
    bits = 8 * size
    every = sum(1 << place * bits for place in range(4))
    low = every * ((1 << bits - 1) - 1)
    signs = every << bits - 1 if size == 1 else 0
    factor = sum(1 << (bits - 1) * 3 - (bits - 1) * place for place in range(4))
    words = (np.uint64(word) for word in (bits, low, signs, factor))
    arguments = (groups, _patterns(bits), *words, pairs, nibbles)
    if not _all(functools.partial(loops.gather, *arguments), n, dense.nbytes):
        return None
    return values, cpu.to_kernel_order(meta, size)


def _scattered(
    scatter: Callable[..., bool], values: torch.Tensor, nibbles: torch.Tensor, kind: str, k: int
) -> torch.Tensor | None:
    size, n = values.element_size(), values.shape[0]
    dense = empty((n, k), values.dtype)
    groups = _unsigned(dense.view(GROUP_DTYPE[size]))
    pairs = _unsigned(as_words(values, PAIR_DTYPE[size]))
    table = nibbles.contiguous().numpy(), _shifts(kind, 8 * size), np.uint64(8 * size)
    run = functools.partial(scatter, pairs, *table, groups)
    return dense if _all(run, n, dense.nbytes) else None


def _unsigned(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous tensor of integers as numpy's unsigned ones."""
    return tensor.numpy().view(f"u{tensor.element_size()}")


def _all(run: Callable[[int, int], bool], n: int, nbytes: int) -> bool:
    """Whether ``run`` finds nothing wrong in any of n rows."""
    wrong: list[Sequence[slice]] = []

    def work(share: Sequence[slice]) -> None:
        if not run(share[0].start, share[-1].stop):
            wrong.append(share)

    spread(work, slices(n, _ROWS), nbytes)
    return not wrong


@functools.cache
def _shifts(kind: str, bits: int) -> Any:
    """Of every nibble: where its values go, 1 where they are none, 2 where it is none."""
    rows = []
    for nibble in range(16):
        pair = kept_pair(nibble) if kind == "bitmask" else meta_pair(nibble)
        if pair is None:
            rows.append((0, 0, 2))
        else:
            rows.append((pair[0] * bits, pair[1] * bits, int(pair == (0, 0))))
    return np.array(rows, np.uint64)


@functools.cache
def _patterns(bits: int) -> Any:
    """Of every pattern of nonzeros: where its values are, and its nibble; 16 where it is none."""
    rows = []
    for pattern in range(16):
        first, second = index_pair(pattern) or (0, 0)
        nibble = meta_nibble(pattern)
        rows.append((first * bits, second * bits, 16 if nibble is None else nibble))
    return np.array(rows, np.uint64)
