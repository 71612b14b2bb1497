"""Where an output is built until it is complete: ``OUT.partial``, beside OUT.

A kill at any moment leaves under OUT what was there before, or the complete checkpoint: the
checkpoint is built in ``OUT.partial/checkpoint`` and renamed to OUT at the very end. A journal
beside it says which shards are finished, so that ``--resume`` can take them over.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ctconvert.checkpoint import manifest
from ctconvert.checkpoint.writer import cannot_write, fsync_directory
from ctconvert.errors import UsageError


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
        self.folder = self.root / "checkpoint"
        self._journal = self.root / "journal.jsonl"
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
        if self.out.exists() and not (resume or overwrite or _is_empty(self.out)):
            raise UsageError(f"{self.out} exists; choose another place, or use --overwrite")
        if self.out.is_mount():
            raise UsageError(f"{self.out} is a mount point; name a directory inside it")
        if self.root.exists() and not (resume or overwrite):
            raise UsageError(
                f"{self.root} holds an unfinished conversion; use --resume to continue it or "
                "--overwrite to start again"
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if not (resume and self._load()):
                self._clear()
                self.folder.mkdir()
                self._append(self._state)
        except OSError as error:
            raise cannot_write(self.root, error) from None

    def _take_lock(self) -> None:
        self._lock = os.open(self.root, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UsageError(f"{self.root} is being written by another run") from None

    def _clear(self) -> None:
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _load(self) -> bool:
        """Reads the journal; False where there is nothing to resume."""
        if not self._journal.exists() or not self.folder.is_dir():
            return False
        for line in self._journal.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                break  # the line being written when the run was killed
            if "digest" in entry and entry != self._state:
                raise UsageError(
                    f"{self.root} was made from another source, with other options or by another "
                    "version; use --overwrite to start again"
                )
            if "shard" in entry:
                self.shards[entry["shard"]] = entry["tensors"]
            if "source" in entry:
                self.sources[entry["source"]] = entry["sha256"]
        return True

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
        old = self.root / "old"
        try:
            fsync_directory(self.folder)
            if old.exists():
                shutil.rmtree(old)
            if self.out.exists() and not _is_empty(self.out):
                self.out.rename(old)
            self.folder.rename(self.out)
            fsync_directory(self.out.parent)
            self.discard()
        except OSError as error:
            raise cannot_write(self.out, error) from None

    def discard(self) -> None:
        """Removes the partial output."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Gives up the lock; what is finished stays for ``--resume``."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


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
