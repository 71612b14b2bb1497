"""Output shards: the header is written first, tensors go to their offsets in any order."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ctconvert.checkpoint.header import Shard
from ctconvert.errors import ConversionError

_PARTIAL = ".partial"


def cannot_write(path: Path, error: OSError) -> ConversionError:
    """One line for an error of the file system."""
    if error.errno is not None and os.strerror(error.errno) != str(error):
        reason = os.strerror(error.errno)
    else:
        reason = str(error)
    return ConversionError(
        f"{path}: cannot write: {reason}; free some space or choose another place, then run "
        "again with --resume"
    )


def fsync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Writes a file whole: beside it, fsync, rename.

    Args:
        path: the file.
        data: its content, or pieces of it.

    Raises:
        ConversionError: the file system refuses.
    """
    beside = path.with_name(path.name + _PARTIAL)
    try:
        with beside.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from None


class ShardWriter:
    """One shard being written, under a name that no loader takes until it is complete.

    :meth:`write` may be called from several threads at once.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.shard = shard
        self.path = folder / shard.name
        self._beside = self.path.with_name(shard.name + _PARTIAL)
        self._file: int | None = None

    def open(self) -> None:
        """Creates the file at its full size and writes the header.

        Raises:
            ConversionError: the file system refuses, for instance because it is full.
        """
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._file = os.open(self._beside, flags, 0o644)
            os.truncate(self._file, self.shard.size)
            self._write_at(memoryview(self.shard.header), 0)
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def write(self, name: str, data: memoryview, start: int = 0) -> None:
        """Puts bytes of a tensor in their place.

        Args:
            name: the tensor's full name.
            data: its bytes, or some of them.
            start: where in the tensor they begin.
        """
        end = start + len(data)
        if end > self.shard.specs[name].nbytes:
            raise AssertionError(f"{name}: {end} bytes do not fit {self.shard.specs[name]}")
        try:
            self._write_at(data, self.shard.offsets[name] + start)
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def _write_at(self, data: memoryview, offset: int) -> None:
        assert self._file is not None
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], offset + done)

    def finish(self) -> None:
        """Makes the file durable, then gives it its name."""
        assert self._file is not None
        try:
            os.fsync(self._file)
            # what is read back to be verified should come from the disk, not from memory
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
            self.close()
            self._beside.replace(self.path)
            fsync_directory(self.path.parent)
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
