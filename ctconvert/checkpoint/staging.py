"""Where an output is built until it is complete: ``OUT.partial``, beside OUT.

A kill at any moment leaves under OUT what was there before, or the complete checkpoint: the
checkpoint is built in ``OUT.partial/checkpoint`` and renamed to OUT at the very end. A journal
beside it says which shards are finished, so that ``--resume`` can take them over. The journal is
made first and removed last: a directory without it is not ours, and is left alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ctconvert.checkpoint import manifest
from ctconvert.checkpoint.header import Shard
from ctconvert.checkpoint.writer import cannot_write, fsync_directory
from ctconvert.errors import ConversionError, UsageError

_CHECKPOINT, _JOURNAL, _OLD = "checkpoint", "journal.jsonl", "old"


class Staging:
    """The partial output of one conversion, locked while it is open.

    Args:
        out: the directory the checkpoint will be.
        digest: the plan's digest.
        sources: name and modification time (ns) of every source shard.
    """

    def __init__(self, out: Path, digest: str, sources: dict[str, int]) -> None:
        self.out = out
        self.root = out.with_name(out.name + ".partial")
        self.folder = self.root / _CHECKPOINT
        self._journal = self.root / _JOURNAL
        self._old = self.root / _OLD
        self._state: dict[str, Any] = {"digest": digest, "sources": sources}
        self._lock: int | None = None
        self.shards: dict[str, dict[str, str]] = {}
        self.sources: dict[str, str] = {}

    def open(self, *, resume: bool, overwrite: bool) -> None:
        """Makes or takes over the partial output.

        Raises:
            UsageError: there is an output or a partial one and neither flag says what to do
                with it, a partial one is of another conversion, or another run is writing it.
        """
        unfinished = self._journal.exists()
        if _in_use(self.out) and not (overwrite or (resume and unfinished)):
            raise UsageError(
                f"{self.out} exists"
                + (", and there is no unfinished conversion of it to resume" if resume else "")
                + "; choose another place, or use --overwrite"
            )
        if _in_use(self.out) and not any(
            (self.out / n).exists() for n in ("config.json", manifest.NAME)
        ):
            raise UsageError(f"{self.out} is no checkpoint, and only a checkpoint is replaced")
        if self.out.is_mount():
            raise UsageError(f"{self.out} is a mount point; name a directory inside it")
        if self.root.exists() and not (self.root.is_dir() and (unfinished or _is_empty(self.root))):
            raise UsageError(
                f"{self.root} is in the way, and it is no unfinished conversion; move it or choose "
                "another place"
            )
        opened = False
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if unfinished and not (resume or overwrite):
                raise UsageError(
                    f"{self.root} holds an unfinished conversion; use --resume to continue it or "
                    "--overwrite to start again"
                )
            if self._old.exists() and not self.out.exists():  # killed between commit's two renames
                self._old.rename(self.out)
            if not (resume and self._load()):
                self._clear()
                self._append(self._state | {"overwrite": overwrite})
                self.folder.mkdir()
            opened = True
        except OSError as error:
            raise cannot_write(self.root, error) from None
        finally:
            if not opened:
                self.close()

    def _take_lock(self) -> None:
        self._lock = os.open(self.root, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{self.root} is being written by another run") from None

    def _clear(self) -> None:
        for path in (self.folder, self._old, self._journal):
            _remove(path)

    def _load(self) -> bool:
        """Reads the journal; False where there is nothing to resume."""
        if not self._journal.exists() or not self.folder.is_dir():
            return False
        first, *rest = self._read_journal() or [{}]
        if "digest" not in first:
            return False
        overwrite = first.pop("overwrite", False)
        if first != self._state:
            raise UsageError(
                f"{self.root} was made from another source, with other options or by another "
                "version; use --overwrite to start again"
            )
        if _in_use(self.out) and not overwrite:
            raise UsageError(
                f"{self.out} exists now, and the unfinished conversion was not to replace it; "
                "choose another place, or use --overwrite"
            )
        for entry in rest:
            match entry:
                case {"shard": str(name), "tensors": dict(tensors)}:
                    self.shards[name] = tensors
                case {"source": str(name), "sha256": str(digest)}:
                    self.sources[name] = digest
        return True

    def _read_journal(self) -> list[dict[str, Any]]:
        """The journal's entries; a last line that a kill cut short is removed."""
        found: list[dict[str, Any]] = []
        size = 0
        for line in self._journal.read_bytes().splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not isinstance(entry, dict) or not line.endswith(b"\n"):
                break
            found.append(entry)
            size += len(line)
        os.truncate(self._journal, size)
        return found

    def check_space(self, need: int, shards: Sequence[Shard]) -> None:
        """Refuses to begin what the disk cannot hold.

        Args:
            need: bytes of the whole output.
            shards: of the output; the finished ones need no more space.

        Raises:
            ConversionError: the disk has less free than what is still to be written.
        """
        need -= sum(shard.size for shard in shards if shard.name in self.shards)
        free = shutil.disk_usage(self.root).free
        if free < need:
            if not self.shards:
                self.discard()
            raise ConversionError(
                f"{self.out}: the output needs {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are "
                "free; free some space or choose another place"
            )

    def _append(self, entry: dict[str, Any]) -> None:
        with self._journal.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finished_shard(self, name: str, tensors: dict[str, str]) -> None:
        """Records a finished shard and the hash of each of its tensors."""
        try:
            self._append({"shard": name, "tensors": tensors})
        except OSError as error:
            raise cannot_write(self._journal, error) from None
        self.shards[name] = tensors

    def finished_source(self, name: str, sha256: str) -> None:
        """Records the hash of a source file."""
        try:
            self._append({"source": name, "sha256": sha256})
        except OSError as error:
            raise cannot_write(self._journal, error) from None
        self.sources[name] = sha256

    def commit(self) -> None:
        """Makes the complete checkpoint appear under OUT and removes the rest."""
        try:
            for folder, _, _ in os.walk(self.folder):
                fsync_directory(Path(folder))
            _remove(self._old)
            if _in_use(self.out):
                self.out.rename(self._old)
            self.folder.rename(self.out)
            fsync_directory(self.out.parent)
            self.discard()
        except OSError as error:
            raise cannot_write(self.out, error) from None

    def discard(self) -> None:
        """Removes the partial output."""
        with suppress(OSError):
            self._clear()
            self.root.rmdir()
        self.close()

    def discard_committed(self) -> None:
        """Removes what a run that was killed just after its commit has left."""
        if self._journal.exists() and not self.folder.exists():
            self._take_lock()
            self.discard()

    def close(self) -> None:
        """Gives up the lock; what is finished stays for ``--resume``."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _in_use(path: Path) -> bool:
    return path.exists() and not _is_empty(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def complete_with(out: Path, digest: str) -> bool:
    """Whether OUT is already the finished output of the plan with that digest."""
    if not (out / manifest.NAME).exists():
        return False
    return bool(manifest.load(out).get("plan") == digest)


def check_apart(source: Path, out: Path) -> None:
    """Refuses an output equal to, inside or around the source.

    Raises:
        UsageError: it is.
    """
    real_source, real_out = source.resolve(), out.resolve()
    if real_source == real_out:
        raise UsageError(f"{out}: the output is the source itself; choose another directory")
    if real_source in real_out.parents:
        raise UsageError(f"{out}: the output lies inside the source {source}; choose another place")
    if real_out in real_source.parents:
        raise UsageError(f"{out}: the source {source} lies inside the output; choose another place")
