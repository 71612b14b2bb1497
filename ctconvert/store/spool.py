"""Files on their way: fetched once into a folder, in segments, several at once.

A segment is a file that grows from its beginning; how long it is says how much of it is there, also
to a later run. Readers wait for the bytes that they need.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from ctconvert.errors import ConversionError
from ctconvert.store.places import remove
from ctconvert.store.writer import cannot_write

#: Bytes of a segment: enough to be worth a request, and a file has several under way.
SEGMENT = 64 << 20
#: Segments that are fetched at once.
AT_ONCE = 8

#: Bytes of a file by name, offset and length, in pieces.
Fetch = Callable[[str, int, int], Iterator[bytes]]


class _Segment:
    def __init__(self, path: Path, start: int, length: int) -> None:
        self.path = path
        self.start = start
        self.length = length
        self.have = 0
        self.coming: Future[None] | None = None


class Spool:
    """A folder of files that are fetched as they are asked for, and kept until they are released.

    Args:
        folder: made where missing; what an earlier run has fetched into it is taken over.
        fetch: where bytes come from.
    """

    def __init__(self, folder: Path, fetch: Fetch) -> None:
        self.folder = folder
        self._fetch = fetch
        self._files: dict[str, list[_Segment]] = {}
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._closed = False

    def read_into(self, name: str, size: int, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from a file of ``size`` bytes, as soon as they are there.

        Raises:
            ConversionError: they do not come, or the disk refuses.
        """
        done = 0
        for segment in self._begun(name, size):
            begin = max(offset + done - segment.start, 0)
            want = min(segment.length - begin, len(buffer) - done)
            if want <= 0 or begin >= segment.length:
                continue
            self._wait(segment, begin + want)
            _read(segment, begin, buffer[done : done + want])
            done += want

    def release(self, name: str) -> None:
        """Gives up a file, which nobody reads again."""
        with self._changed:
            self._files.pop(name, None)
        remove(self.folder / quote(name, safe=""))

    def close(self) -> None:
        """Stops what is under way; what is there stays for a later run."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _begun(self, name: str, size: int) -> list[_Segment]:
        """The segments of a file, all there or under way."""
        with self._changed:
            if name not in self._files:
                folder = self.folder / quote(name, safe="")
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    found = [self._found(folder, start, size) for start in self._starts(size)]
                except OSError as error:
                    raise cannot_write(folder, error) from None
                self._files[name] = found
                for segment in found:
                    if segment.have < segment.length:
                        segment.coming = self._pool.submit(self._run, name, segment)
                        segment.coming.add_done_callback(self._tell)
            return self._files[name]

    def _starts(self, size: int) -> range:
        return range(0, size, SEGMENT)

    def _found(self, folder: Path, start: int, size: int) -> _Segment:
        path = folder / f"{start:016}"
        segment = _Segment(path, start, min(SEGMENT, size - start))
        if path.exists():
            segment.have = path.stat().st_size
            if segment.have > segment.length:
                path.unlink()
                segment.have = 0
        return segment

    def _run(self, name: str, segment: _Segment) -> None:
        start, left = segment.start + segment.have, segment.length - segment.have
        try:
            with segment.path.open("ab") as file:
                for data in self._fetch(name, start, left):
                    file.write(data)
                    file.flush()
                    with self._changed:
                        segment.have += len(data)
                        self._changed.notify_all()
                        if self._closed:
                            return
        except OSError as error:
            raise cannot_write(segment.path, error) from None

    def _tell(self, _: object) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wait(self, segment: _Segment, have: int) -> None:
        with self._changed:
            while segment.have < have:
                if self._closed or segment.coming is None:
                    raise ConversionError(f"{segment.path}: stopped")
                if segment.coming.done():
                    segment.coming.result()
                    raise ConversionError(f"{segment.path}: ends at byte {segment.have}")
                self._changed.wait(1)


def _read(segment: _Segment, offset: int, buffer: memoryview) -> None:
    try:
        with segment.path.open("rb", buffering=0) as file:
            done = 0
            while done < len(buffer):
                count = os.preadv(file.fileno(), [buffer[done:]], offset + done)
                if not count:
                    raise ConversionError(f"{segment.path}: changed while it was being read")
                done += count
    except OSError as error:
        raise ConversionError(f"{segment.path}: cannot read: {error.strerror}") from None
