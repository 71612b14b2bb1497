"""A directory as a store."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ctconvert.errors import ConversionError
from ctconvert.store.base import Store


class LocalStore(Store):
    """A directory. Hidden files and folders, and what is no regular file, are no part of it.

    Args:
        root: the directory.
        id: its name in the manifest; the directory's own where None.
        revision: the Hub commit it is a copy of.
    """

    def __init__(self, root: Path, id: str | None = None, revision: str | None = None) -> None:
        self.root = root
        self.where = str(root)
        self.id = id or root.resolve().name
        self.revision = revision
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()
        self._sizes: dict[str, int] | None = None
        self._prints: dict[str, str] = {}
        self._left_out: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "id": self.id, "revision": self.revision}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def sizes(self) -> Mapping[str, int]:
        """The files as they were when first asked for: a plan must not change under way."""
        if self._sizes is None:
            self._sizes = dict(self._walk())
        return self._sizes

    def left_out(self) -> Mapping[str, str]:
        self.sizes()
        return self._left_out

    def _walk(self) -> Iterator[tuple[str, int]]:
        roots = _own_roots(self.root)
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = sorted(item for item in subfolders if not item.startswith("."))
            at = Path(folder)
            for item in subfolders:
                if (at / item).is_symlink():
                    self._leave_out(at / item, "a link to a directory, which is not followed")
            for item in sorted(name for name in names if not name.startswith(".")):
                path = at / item
                try:
                    found = path.stat()
                except OSError:
                    self._leave_out(path, "a link to nothing that can be read")
                    continue
                if not stat.S_ISREG(found.st_mode):
                    self._leave_out(path, "no regular file")
                elif not _is_utf8(item):
                    self._leave_out(path, "its name is not UTF-8")
                else:
                    name = path.relative_to(self.root).as_posix()
                    if path.is_symlink() and not _inside(path, roots):
                        self._leave_out(path, "a link that leaves the checkpoint")
                    self._prints[name] = fingerprint_of(found)
                    yield name, found.st_size

    def _leave_out(self, path: Path, reason: str) -> None:
        name = path.relative_to(self.root).as_posix()
        self._left_out[name.encode("utf-8", "backslashreplace").decode()] = reason

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._file(name), [buffer[done:]], offset + done)
            except OSError as error:
                raise ConversionError(
                    f"{self.root / name}: cannot read: {error.strerror}", file=str(self.root / name)
                ) from None
            if count == 0:
                raise ConversionError(
                    f"{self.root / name}: ends at byte {offset + done}; it changed while it was "
                    "being read",
                    file=str(self.root / name),
                )
            done += count

    def _file(self, name: str) -> int:
        found = self._open.get(name)
        if found is None:
            with self._lock:
                found = self._open.get(name)
                if found is None:
                    # a FIFO put in a file's place since it was listed must not be waited for
                    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
                    found = self._open[name] = os.open(self.root / name, flags)
        return found

    def fingerprint(self, name: str) -> str:
        """Size, inode and both times; the change time cannot be set back as ``touch`` can.

        The device is left out: machines that see the same storage number it differently.

        Raises:
            ConversionError: the file is no longer what it was when the files were listed; what
                was read of it since then and what is read now may not belong together.
        """
        self.sizes()
        try:
            found = fingerprint_of((self.root / name).stat())
        except OSError:
            found = ""
        if found != self._prints[name]:
            raise ConversionError(
                f"{self.root / name}: changed while it was being read; run again",
                file=str(self.root / name),
            )
        return found

    def close(self) -> None:
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def __del__(self) -> None:
        self.close()


def fingerprint_of(found: os.stat_result) -> str:
    """What :meth:`LocalStore.fingerprint` gives for a file of which the system says this."""
    return f"{found.st_size}-{found.st_ino}-{found.st_mtime_ns}-{found.st_ctime_ns}"


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _own_roots(root: Path) -> list[Path]:
    """Where a link may lead: the directory itself, and a Hub cache's blobs beside snapshots."""
    real = root.resolve()
    roots = [real]
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        roots.append(real.parent.parent / "blobs")
    return roots


def _inside(path: Path, roots: list[Path]) -> bool:
    real = path.resolve()
    return any(root in real.parents for root in roots)
