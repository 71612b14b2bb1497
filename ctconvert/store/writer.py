"""Writing into a directory: byte ranges in any order, made durable file by file."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from ctconvert.errors import ConversionError
from ctconvert.store.base import BLOCK, CHUNK
from ctconvert.store.direct import Descriptors, aligned, begins_a_block, put
from ctconvert.store.local import fingerprint_of


class Sink(Protocol):
    """Where output bytes go: ranges of files that exist at their full size. Can be pickled."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Puts bytes in their place; may be called from several threads and processes at once.

        Raises:
            ConversionError: they cannot be written, for instance because the disk is full.
        """


#: Bytes from which on a write goes to the disk at once, past the page cache where that can be.
LARGE = 1 << 20
_FULL = "free some space, then run again with --resume, or choose another place"
_DENIED = "check its permissions, then run again with --resume, or choose another place"
#: What helps, by the error's number.
_ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: _DENIED,
    errno.EFBIG: "use a smaller --max-shard-size, or raise the limit and run again with --resume",
    errno.ENAMETOOLONG: "choose a shorter name, or another place whose file system takes it",
}


def cannot_write(path: Path, error: OSError) -> ConversionError:
    """One line for an error of the file system."""
    if error.errno is not None and os.strerror(error.errno) != str(error):
        reason = os.strerror(error.errno)
    else:
        reason = str(error)
    advice = _ADVICE.get(error.errno or 0, "choose another place")
    return ConversionError(f"{path}: cannot write: {reason}; {advice}")


def fsync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalSink:
    """A directory that nobody reads until it is complete: files are written under their names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: dict[str, int] = {}
        self._direct = Descriptors(root, os.O_WRONLY)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def create(self, name: str, header: bytes, size: int) -> None:
        """Makes a file of its full size that begins with ``header``.

        Raises:
            ConversionError: the file system refuses.
        """
        path = self.root / name
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o644)
            with self._lock:
                self._open[name] = descriptor
            os.truncate(descriptor, size)
        except OSError as error:
            raise cannot_write(path, error) from None
        self.write(name, 0, memoryview(header))
        try:
            # another machine may write to the file, and must not have its first page written over
            os.fsync(descriptor)
        except OSError as error:
            raise cannot_write(path, error) from None

    def write(self, name: str, offset: int, data: memoryview) -> None:
        try:
            done = 0
            if len(data) >= LARGE:
                # neighbours share the block that a range begins in, and the one it ends in
                done = -offset % BLOCK
                self._write(name, offset, data[:done])
                done += self._write_blocks(name, offset + done, data[done:])
            self._write(name, offset + done, data[done:])
            if len(data) - done >= LARGE and hasattr(os, "posix_fadvise"):
                # starts to write now what else the last fsync would wait for
                os.posix_fadvise(self._file(name), offset, len(data), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise cannot_write(self.root / name, error) from None

    def _write(self, name: str, offset: int, data: memoryview) -> None:
        descriptor, done = self._file(name), 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], offset + done)

    def _write_blocks(self, name: str, offset: int, data: memoryview) -> int:
        """Writes whole blocks past the page cache, from the first on; returns how many bytes."""
        descriptor, done = self._direct.of(name), 0
        if descriptor is None:
            return 0
        buffer = None if begins_a_block(data) else aligned(CHUNK)
        while count := min(CHUNK, (len(data) - done) // BLOCK * BLOCK):
            part = data[done : done + count]
            if buffer is not None:
                put(buffer, part)
                part = buffer[:count]
            try:
                wrote = os.pwrite(descriptor, part, offset + done)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EFAULT):
                    raise
                return done  # larger blocks or other memory is wanted, or it was promised in vain
            done += wrote // BLOCK * BLOCK
            if wrote < count:
                break
        return done

    def _file(self, name: str) -> int:
        found = self._open.get(name)
        if found is None:
            with self._lock:
                found = self._open.get(name)
                if found is None:
                    flags = os.O_RDWR | os.O_CLOEXEC
                    found = self._open[name] = os.open(self.root / name, flags)
        return found

    def finish(self, name: str) -> str:
        """Makes a file durable and gives up its descriptor.

        Returns:
            its fingerprint, as :class:`~ctconvert.store.local.LocalStore` has it.

        Raises:
            ConversionError: the file system refuses.
        """
        try:
            descriptor = self._file(name)
            os.fsync(descriptor)
            # what is read back to be verified should come from the disk, not from memory
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self._direct.close(name)
            fingerprint = fingerprint_of(os.fstat(descriptor))
            with self._lock:
                os.close(self._open.pop(name))
            return fingerprint
        except OSError as error:
            raise cannot_write(self.root / name, error) from None

    def finish_all(self) -> None:
        """:meth:`finish` for every file that was written to."""
        for name in list(self._open):
            self.finish(name)

    def put(self, name: str, data: bytes | Iterable[bytes | memoryview]) -> None:
        """Writes a whole file, durably.

        Args:
            name: its path, folders included; they are made.
            data: its content, or pieces of it.

        Raises:
            ConversionError: the file system refuses.
        """
        path = self.root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(path, error) from None

    def sync(self) -> None:
        """Makes every name in the directory durable.

        Raises:
            ConversionError: the file system refuses.
        """
        try:
            for folder, _, _ in os.walk(self.root):
                fsync_directory(Path(folder))
        except OSError as error:
            raise cannot_write(self.root, error) from None

    def close(self) -> None:
        """Gives up every descriptor."""
        self._direct.close()
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()
