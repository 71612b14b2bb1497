"""Large ranges of local files between the disk and a buffer, past the page cache (``O_DIRECT``).

What is written once and read once to be verified gains nothing from the page cache, and pays for
it: a copy each way, and fresh pages for as many bytes. The system wants blocks: places in the file,
lengths and addresses that are multiples of ``BLOCK``. A file system that has no such way, or
wants larger blocks, refuses, and the ordinary way, which moves the same bytes, is taken.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ctconvert import memory
from ctconvert.store.base import BLOCK, CHUNK
from ctconvert.store.local import LocalStore

#: Smaller ranges go the ordinary way.
LEAST = 1 << 20
_FLAG = getattr(os, "O_DIRECT", None)


def opened(path: Path, flags: int) -> int | None:
    """A descriptor past the page cache; None where the ordinary way works or says what is wrong."""
    if _FLAG is not None:
        with suppress(OSError):
            # a FIFO must not be waited for
            return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | _FLAG)
    return None


def begins_a_block(data: memoryview) -> bool:
    """Whether the bytes lie in memory so that they can go to the disk from there."""
    import numpy  # not at the top, for verifying needs none

    place: int = numpy.frombuffer(data, numpy.uint8).__array_interface__["data"][0]
    return place % BLOCK == 0


def put(buffer: memoryview, data: memoryview) -> None:
    """Copies bytes to the begin of a buffer, while other threads run (a slice would stop them)."""
    import numpy

    numpy.copyto(
        numpy.frombuffer(buffer[: len(data)], numpy.uint8), numpy.frombuffer(data, numpy.uint8)
    )


def aligned(count: int) -> memoryview:
    """A buffer of at least ``count`` bytes, a multiple of :data:`BLOCK`, that begins a page."""
    return memory.buffer(max(-(-count // BLOCK) * BLOCK, memory.LEAST))


class Descriptors:
    """The descriptors past the page cache of a directory's files; threads may share them."""

    def __init__(self, root: Path, flags: int) -> None:
        self._root = root
        self._flags = flags
        self._open: dict[str, int | None] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> int | None:
        """A file's; None where the ordinary way is to be taken."""
        with self._lock:
            if name not in self._open:
                self._open[name] = opened(self._root / name, self._flags)
            return self._open[name]

    def close(self, *names: str) -> None:
        """Gives up those of some files, or of all."""
        with self._lock:
            for name in names or [*self._open]:
                if (descriptor := self._open.pop(name, None)) is not None:
                    os.close(descriptor)


class DiskStore(LocalStore):
    """A directory whose large ranges come from the disk itself, not from what memory has of it."""

    def pieces(self, name: str, offset: int = 0, length: int | None = None) -> Iterator[memoryview]:
        left = self.sizes()[name] - offset if length is None else length
        if left >= LEAST and (descriptor := opened(self.root / name, os.O_RDONLY)) is not None:
            try:
                for part in _read(descriptor, offset, left):
                    yield part
                    offset += len(part)
                    left -= len(part)
            finally:
                os.close(descriptor)
        # what the disk did not give so, be it for a block's size, for an error, or for its end
        yield from super().pieces(name, offset, left)


def _read(descriptor: int, offset: int, left: int) -> Iterator[memoryview]:
    """A range of a file up to the first thing that is not as it should be."""
    buffer = aligned(min(CHUNK, left + 2 * BLOCK))
    while left > 0:
        begin = offset // BLOCK * BLOCK
        wanted = -(-(offset + left - begin) // BLOCK) * BLOCK
        count = 0
        with suppress(OSError):
            count = os.preadv(descriptor, [buffer[: min(CHUNK, len(buffer), wanted)]], begin)
        part = buffer[offset - begin : min(count, offset - begin + left)]
        if not part:
            return
        yield part
        offset += len(part)
        left -= len(part)
