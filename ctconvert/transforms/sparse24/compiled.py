"""The compiled path of :mod:`ctconvert.transforms.sparse24`, which describes the forms.

Each function gives None where the torch path shall do it: without Numba, for little, and wherever
something is wrong, which that path names.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from ctconvert.transforms import compiled
from ctconvert.transforms.dtypes import empty
from ctconvert.transforms.sparse24 import order
from ctconvert.transforms.sparse24.groups import (
    GROUP_DTYPE,
    PAIR_DTYPE,
    index_pair,
    kept_of_pattern,
    kept_pair,
    meta_nibble,
    meta_pair,
)
from ctconvert.transforms.threads import slices, spread
from ctconvert.transforms.words import as_words

_ROWS = 64
#: From the checkpoint's bitmask to index pairs, from any index pairs to those, and back.
Kind = Literal["bitmask", "pairs", "back"]
_WRONG, _CHANGED = 1, 2


#: How many times longer torch takes for a byte than for those of `compiled.WORTH`.
_SLOWER = 4


def _loops(count: int) -> ModuleType | None:
    """The loops; None where torch shall do these ``count`` bytes."""
    if compiled.LOOPS.after(_SLOWER * count) is None:
        return None
    from ctconvert.transforms.sparse24 import loops

    return loops


def bitmask_decompress(
    compressed: torch.Tensor, bitmask: torch.Tensor, k: int
) -> torch.Tensor | None:
    loops = _loops(3 * compressed.nbytes)
    if loops is None or (k % 8 and bool((bitmask[:, -1] > 0x0F).any())):
        return None
    return _scattered(loops.scatter, compressed, bitmask, "bitmask", k)


def sm90_decompress(
    values: torch.Tensor, meta: torch.Tensor, n: int, k: int
) -> torch.Tensor | None:
    loops = _loops(3 * values.nbytes)
    if loops is None:
        return None
    nibbles = order.from_kernel_order(meta, values.element_size())
    if not order.padding_is_zero(nibbles, n, k):
        return None
    return _scattered(loops.scatter, values, nibbles, "meta", k)


def settle(
    values: torch.Tensor, codes: torch.Tensor, k: int, kind: Kind
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``codes`` u8 [N, K/8] by rows, to values and codes; the very same where nothing changes."""
    loops = _loops(2 * (values.nbytes + codes.nbytes))
    size, n = values.element_size(), values.shape[0]
    bits = 8 * size
    if loops is None or k * size % 16:
        return None
    source, before = _unsigned(as_words(values, torch.int64)), codes.contiguous().numpy()
    every = sum(1 << place for place in range(0, 64, bits))
    masks = [
        every * ((1 << bits - 1) - 1),
        every << bits - 1 if size == 1 else 0,
        every << bits - 1,
    ]
    tables = _choices(kind, bits), _whole(kind), np.array(masks, np.uint64), np.uint64(bits)

    def run(target: Any, after: Any) -> int:
        call = functools.partial(loops.settle, source, before, *tables, target, after)
        return _results(call, n, values.nbytes)

    made, nibbles = empty(values.shape, values.dtype), empty(codes.shape, torch.uint8)
    found = run(_unsigned(made.view(torch.int64)), nibbles.numpy())
    if found & _WRONG:
        return None
    return (made, nibbles) if found & _CHANGED else (values, codes)


def to_kernel_order(rows: torch.Tensor, size: int) -> torch.Tensor | None:
    loops = _loops(2 * rows.nbytes)
    if loops is None:
        return None
    made = empty(rows.shape, torch.uint8)
    _ordered(loops, rows, made, size, back=False)
    return made


def from_kernel_order(meta: torch.Tensor, size: int) -> torch.Tensor | None:
    loops = _loops(2 * meta.nbytes)
    if loops is None:
        return None
    made = empty(meta.shape, torch.uint8)
    _ordered(loops, made, meta, size, back=True)
    return made


def _ordered(
    loops: ModuleType, rows: torch.Tensor, meta: torch.Tensor, size: int, back: bool
) -> None:
    dtype, run = (torch.int64, loops.order8) if size == 1 else (torch.int16, loops.order16)
    left, right = _unsigned(as_words(rows, dtype)), _unsigned(as_words(meta, dtype).view(-1))

    def work(share: Sequence[slice]) -> None:
        run(left, right, back, share[0].start, share[-1].stop)

    spread(work, slices(rows.shape[0] // 64, 1), rows.nbytes)


def _scattered(
    scatter: Callable[..., int], values: torch.Tensor, nibbles: torch.Tensor, kind: str, k: int
) -> torch.Tensor | None:
    size, n = values.element_size(), values.shape[0]
    dense = empty((n, k), values.dtype)
    groups = _unsigned(dense.view(GROUP_DTYPE[size]))
    pairs = _unsigned(as_words(values, PAIR_DTYPE[size]))
    table = nibbles.contiguous().numpy(), _shifts(kind, 8 * size), np.uint64(8 * size)
    run = functools.partial(scatter, pairs, *table, groups)
    return None if _results(run, n, dense.nbytes) else dense


def _unsigned(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous tensor of integers as numpy's unsigned ones."""
    return tensor.numpy().view(f"u{tensor.element_size()}")


def _results(run: Callable[[int, int], int], n: int, nbytes: int) -> int:
    """What ``run`` gives for all of n rows, bits of any of them."""
    found = [0]  # appended to by threads

    def work(share: Sequence[slice]) -> None:
        found.append(int(run(share[0].start, share[-1].stop)))

    spread(work, slices(n, _ROWS), nbytes)
    return functools.reduce(operator.or_, found)


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


def _choice(kind: Kind, nibble: int, held: int) -> tuple[int, int, int, int] | None:
    """What ``loops.settle`` does with a group; ``held`` has a bit for each value that is not 0."""
    pair = kept_pair(nibble) if kind == "bitmask" else meta_pair(nibble)
    if pair is None or (pair == (0, 0) and held):
        return None
    pattern = sum(1 << pair[slot] for slot in (0, 1) if held >> slot & 1)
    if kind == "back":
        code = kept_of_pattern(pattern)
        places = None if code is None else kept_pair(code)
    else:
        code, places = meta_nibble(pattern), index_pair(pattern)
    assert code is not None and places is not None
    empty_pair = int(pair == (0, 0))
    if held in (0, 3):
        return 0, 0, code, empty_pair
    slot = held >> 1
    return slot, places.index(pair[slot]), code, empty_pair


@functools.cache
def _choices(kind: Kind, bits: int) -> Any:
    entries = []
    for at in range(64):
        choice = _choice(kind, at & 15, at >> 4)
        if choice is None:
            entries.append(1 << 15)
        else:
            down, up, code, zeros = choice
            entries.append(down * bits | up * bits << 5 | code << 10 | zeros << 14)
    return np.array(entries, np.uint64)


@functools.cache
def _whole(kind: Kind) -> Any:
    bytes_ = []
    for byte in range(256):
        low, high = (_choice(kind, nibble, 3) for nibble in (byte & 15, byte >> 4))
        bytes_.append(256 if low is None or high is None else low[2] | high[2] << 4)
    return np.array(bytes_, np.uint16)
