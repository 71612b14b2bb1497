"""Large buffers, used again and again.

A fresh buffer costs more than what is done with it: the system gives its pages one at a time, each
cleared, as they are touched first. These are mapped in huge pages where the system has them, and
kept when nobody holds them any more.
"""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

#: Smaller buffers are the allocator's.
LEAST = 4 << 20
#: Bytes that are kept while nobody uses them.
KEPT = 128 << 20
_PAGE = 2 << 20
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def _holders(buffers: Sequence[mmap.mmap]) -> list[int]:
    """The reference count of each: views, arrays and tensors of its memory count."""
    return [sys.getrefcount(buffer) for buffer in buffers]


#: What a buffer counts that only the list holds.
_IDLE = _holders([mmap.mmap(-1, 1)])[0]


class Pool:
    """Buffers and who may have them next; threads may share one.

    A buffer is free when nothing refers to it but the pool. There is no giving back, so none can
    be given out while a view of it lives.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self.kept = kept
        self._buffers: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def take(self, count: int) -> mmap.mmap:
        """A buffer of ``count`` bytes or up to a quarter more, of any content.

        Raises:
            MemoryError: the system has none left.
        """
        with self._lock:
            sizes = {
                place: len(self._buffers[place])
                for place, holders in enumerate(_holders(self._buffers))
                if holders == _IDLE
            }
            most = count + count // 4 + _PAGE
            fitting = [place for place, size in sizes.items() if count <= size <= most]
            if fitting:
                found = self._buffers.pop(min(fitting, key=sizes.__getitem__))
            else:
                self._trim(self.kept)
                found = _mapped(count)
            self._buffers.append(found)  # the last is the one used last
            return found

    def _trim(self, kept: int) -> None:
        """Gives up idle buffers, those used longest ago first, until ``kept`` bytes are left."""
        counts = _holders(self._buffers)
        left = []
        for buffer, holders in zip(reversed(self._buffers), reversed(counts), strict=True):
            if holders == _IDLE:
                if len(buffer) > kept:
                    continue
                kept -= len(buffer)
            left.append(buffer)
        self._buffers = left[::-1]

    def clear(self) -> None:
        """Gives up every idle buffer."""
        with self._lock:
            self._trim(0)


def _mapped(count: int) -> mmap.mmap:
    try:
        found = mmap.mmap(-1, -(-count // _PAGE) * _PAGE, flags=_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{count} bytes: {error.strerror}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            found.madvise(mmap.MADV_HUGEPAGE)
    return found


#: The one that this package uses.
POOL = Pool()


def buffer(count: int) -> memoryview:
    """A writable buffer of ``count`` bytes, of any content, its owner's until no view is left."""
    if count < LEAST:
        return memoryview(bytearray(count))
    return memoryview(POOL.take(count))[:count]
