"""What a store is: named byte ranges, wherever they lie.

To add one: a class with the four methods of :class:`Store`; nothing else in the package knows
where bytes come from. A store can be pickled, so that a job can run in another process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ctconvert import memory

#: Bytes read, copied or hashed at once where no transform needs a whole tensor.
CHUNK = 8 << 20
#: Where a file's bytes should begin and end to go past the page cache: a multiple of what disks and
#: file systems ask for, but for a few.
BLOCK = 4096


class Store(ABC):
    """The files of a checkpoint: names, sizes, byte ranges. Safe to share by threads."""

    #: What the user calls it, for messages.
    where: str
    #: Its name in the manifest: a Hub id, or the directory's own name.
    id: str
    #: The Hub commit, or None.
    revision: str | None = None
    #: How many reads at once are faster than one after the other, where nothing is done between.
    at_once: int = 1

    @abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """Every file by its path relative to the checkpoint, with its size in bytes."""

    @abstractmethod
    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from a file.

        Raises:
            ConversionError: the file ends early (it changed after its size was read), or it
                cannot be read.
        """

    @abstractmethod
    def fingerprint(self, name: str) -> str:
        """A text that changes whenever the file's content may have changed.

        Raises:
            ConversionError: the file is no longer the one that :meth:`sizes` has listed.
        """

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Made sure of when files were read: they are still those that the store has listed.

        Raises:
            ConversionError: one is another now, so that what was read may not belong together.
        """
        for name in names:
            self.fingerprint(name)

    def keep_in(self, folder: Path) -> bool:
        """Lets a store that is far away keep there what it fetches; whether it will.

        What is kept is fetched once, and by a later run not again; :meth:`release` gives it up.
        """
        return False

    def release(self, name: str) -> None:  # noqa: B027 (most stores keep nothing)
        """A file that nobody reads again."""

    def stated_sha256(self, name: str) -> str | None:
        """The hash that a file has by the word of where it is from."""
        return None

    def check_sha256(self, name: str, found: str) -> None:  # noqa: B027 (most know of no hash)
        """Made sure of when a whole file was read: it is what it is said to be where it is from.

        Raises:
            BadInputError: it is not.
        """

    def left_out(self) -> Mapping[str, str]:
        """What stands beside the files and is none, by name, with the reason."""
        return {}

    def close(self) -> None:  # noqa: B027 (most stores hold nothing open)
        """Gives up open files; the store can be used again."""

    def path(self, name: str) -> str:
        """The file for messages."""
        return f"{self.where}/{name}"

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of a file; fewer where it ends early."""
        rest = max(self.sizes()[name] - offset, 0)
        buffer = bytearray(rest if length is None else min(length, rest))
        self.read_into(name, offset, memoryview(buffer))
        return bytes(buffer)

    def pieces(self, name: str, offset: int = 0, length: int | None = None) -> Iterator[memoryview]:
        """A range of a file, a few MB at a time; each piece is valid until the next."""
        left = self.sizes()[name] - offset if length is None else length
        buffer = memory.buffer(min(CHUNK, max(left, 0)))
        while left > 0:
            part = buffer[: min(CHUNK, left)]
            self.read_into(name, offset, part)
            yield part
            offset += len(part)
            left -= len(part)
