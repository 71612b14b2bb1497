"""The CPU transforms that torch's operations are slow at, compiled by Numba where it is installed.

``pip install 'ctconvert[fast]'``. The bits are those of the torch paths, which are the reference,
and which run where Numba is not there or too little is to be done.

They were chosen over torch's operations, each of which goes through memory again; ``bench_cpu.py``
times both.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from types import ModuleType

import torch

from ctconvert.transforms.dtypes import empty
from ctconvert.transforms.threads import slices, spread

#: Bytes that torch does first in a process: loading Numba and the kernels costs as much as is
#: saved by then. A first compilation costs three times that, and is kept in Numba's cache.
WORTH = 512 << 20


class _Loops:
    """The compiled loops, once :attr:`least` bytes were asked of them."""

    def __init__(self) -> None:
        self.least = WORTH
        self._lock = threading.Lock()
        self._seen = 0
        self._found: ModuleType | None = None
        self._looked = False

    def after(self, count: int) -> ModuleType | None:
        """The loops; None where torch shall do these ``count`` bytes."""
        with self._lock:
            self._seen += count
            if self._seen < self.least:
                return None
            if not self._looked:
                self._looked = True
                try:
                    self._found = importlib.import_module("ctconvert.transforms.loops")
                except (ImportError, RuntimeError):  # no Numba, or no place for what it compiles
                    self._found = None
            return self._found


LOOPS = _Loops()


def _loops(source: torch.Tensor, slower: int = 1) -> ModuleType | None:
    """The loops where they take a tensor; torch takes ``slower`` times as long for its bytes."""
    if source.device.type != "cpu" or not source.is_contiguous() or source.data_ptr() % 8:
        return None
    return LOOPS.after(2 * slower * source.nbytes)


def transpose(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor | None:
    """``packed.cpu.transpose``; None where the torch path shall do it."""
    rows, width = words.shape
    f = 32 // bits
    if (
        bits not in (4, 8)
        or rows % (2 * f)
        or width % 2
        or columns != width * f
        or not words.numel()
    ):
        return None
    if (loops := _loops(words)) is None:
        return None
    out = empty((columns, rows // f), torch.int32)
    source, target = words.numpy().view("u8"), out.numpy().view("u8")
    every = torch.arange(rows).numpy()
    run = loops.transpose4 if bits == 4 else loops.transpose8

    def work(share: Sequence[slice]) -> None:
        run(source, every, target, share[0].start, share[-1].stop)

    spread(work, slices(width // 2, 64), words.nbytes)
    return out


def pack_tiles(units: torch.Tensor, bits: int) -> torch.Tensor | None:
    """``marlin.cpu.pack_tiles``; None where the torch path shall do it."""
    if (loops := _loops(units)) is None:
        return None
    n, k = units.shape[0], units.shape[1] * 64 // bits
    tiles = empty((k // 16, n * bits // 2), torch.int32)
    source, target = units.numpy().view("u8"), tiles.numpy().view("u8")
    run = loops.pack_tiles4 if bits == 4 else loops.pack_tiles8

    def work(share: Sequence[slice]) -> None:
        run(source, target, share[0].start, share[-1].stop)

    spread(work, slices(n // 64, 1), units.nbytes)
    return tiles


def unpack_tiles(units: torch.Tensor, bits: int, n: int, k: int) -> torch.Tensor | None:
    """``marlin.cpu.unpack_tiles``; None where the torch path shall do it."""
    if (loops := _loops(units)) is None:
        return None
    words = empty((n, k * bits // 32), torch.int32)
    source, target = units.numpy().view("u8"), words.numpy().view("u8")
    run = loops.unpack_tiles4 if bits == 4 else loops.unpack_tiles8

    def work(share: Sequence[slice]) -> None:
        run(source, target, share[0].start, share[-1].stop)

    spread(work, slices(n // 64, 1), units.nbytes)
    return words


def take_columns(words: torch.Tensor, perm: torch.Tensor, bits: int) -> torch.Tensor | None:
    """``marlin.cpu.take_columns``; None where the torch path shall do it."""
    n, k = words.shape[0], perm.shape[0]
    if n % 16 or k % 16 or (loops := _loops(words, slower=4)) is None:
        return None
    out = empty(words.shape, torch.int32)
    source, target = words.numpy().view("u8"), out.numpy().view("u8")
    columns = perm.contiguous().numpy()
    run = loops.take4 if bits == 4 else loops.take8

    def work(share: Sequence[slice]) -> None:
        run(source, columns, target, share[0].start, share[-1].stop)

    spread(work, slices(n, 64), words.nbytes)
    return out


def pack_zero_points(codes: torch.Tensor) -> torch.Tensor | None:
    """``marlin_pack_zero_points`` of 4 bits; None where the torch path shall do it."""
    if (loops := _loops(codes)) is None:
        return None
    groups, n = codes.shape
    out = empty((groups, n // 8), torch.int32)
    source, target = codes.numpy(), out.numpy().view("u1")
    seen = []

    def work(share: Sequence[slice]) -> None:
        seen.append(loops.pack_zeros4(source, target, share[0].start, share[-1].stop))

    spread(work, slices(groups, 1), codes.nbytes)
    return out if max(seen, default=0) < 16 else None  # torch's path names the code


def unpack_zero_points(words: torch.Tensor) -> torch.Tensor | None:
    """``marlin_unpack_zero_points`` of 4 bits; None where the torch path shall do it."""
    if (loops := _loops(words)) is None:
        return None
    groups, width = words.shape
    codes = empty((groups, width * 8), torch.uint8)
    source, target = words.numpy().view("u1"), codes.numpy()

    def work(share: Sequence[slice]) -> None:
        loops.unpack_zeros4(source, target, share[0].start, share[-1].stop)

    spread(work, slices(groups, 1), codes.nbytes)
    return codes
