"""Where an output is built until it is complete: ``OUT.partial``, beside OUT.

The checkpoint is built in ``OUT.partial/checkpoint``; a journal beside it says which shards are
finished, so that ``--resume`` can take them over. The journal is made first and removed last: a
directory without it is not ours, and is left alone. At the very end the checkpoint is renamed to
OUT, or exchanged with what stands there in one step, so that OUT is at every moment what it was or
the complete new checkpoint. Where the system cannot exchange directories, OUT is moved aside first;
whoever opens it after a kill between the two renames brings it back.

What one of several processes makes of a plan (:mod:`ctconvert.work.shares`) is built the same way
in a folder of its own in ``OUT.partial``, and never renamed to OUT.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from ctconvert.errors import ConversionError, UsageError
from ctconvert.store.places import (
    JOURNAL,
    OLD,
    check_replaceable,
    exchange,
    in_use,
    is_empty,
    locked,
    partial_of,
    recover,
    remove,
    take_lock,
)
from ctconvert.store.writer import LocalSink, cannot_write, fsync_directory
from ctconvert.work.journal import (
    Begin,
    Commit,
    Identity,
    Key,
    PartDone,
    ShardDone,
    SourceDone,
    read_journal,
)
from ctconvert.work.shares import LOCK, Share, holds_a_lock_alone, share_at, shares_in

_CHECKPOINT = "checkpoint"
#: Where source files are kept that are fetched from afar.
_SOURCE = "source"


class Staging:
    """The partial output of one run, locked while it is open.

    Args:
        out: the directory the checkpoint will be.
        identity: what it is made of.
        share: the share of it that is made.
        joins: shares are joined.
    """

    def __init__(
        self, out: Path, identity: Identity, share: Share | None = None, joins: bool = False
    ) -> None:
        self.out = out
        self.root = root_of(out, share)
        self._share = share
        self._joins = joins
        self.folder = self.root / _CHECKPOINT
        self.source = self.root / _SOURCE
        self.identity = identity
        #: Finished shards, with the hashes of their tensors, and hashes of source files.
        self.shards: dict[str, dict[str, str]] = {}
        self.sources: dict[str, str] = {}
        #: Parts of items that an earlier run has finished, of shards that it has not.
        self.parts: dict[Key, PartDone] = {}
        #: The folders of the shares that were joined, which go with the rest.
        self.joined: list[Path] = []
        #: Why an unfinished output was not taken over.
        self.note = ""
        self._journal = self.root / JOURNAL
        self._lock: int | None = None
        self._overwrite = False

    def open(self, *, resume: bool, overwrite: bool) -> LocalSink:
        """Makes or takes over the partial output.

        Returns:
            where to write the checkpoint.

        Raises:
            UsageError: there is an output or a partial one and neither flag says what to do
                with it, a partial one is of other options, or another run is writing it.
        """
        recover(self.out)
        opened = False
        try:
            if self.root.is_dir() and not self.root.is_symlink():
                self._take_lock()
            begun = self._check(resume, overwrite)
            while self._lock is None:
                self.root.mkdir(parents=True, exist_ok=True)
                self._take_lock()
                begun = self._check(resume, overwrite)  # another run may have come and gone
            if not (resume and begun is not None and self._load(begun)):
                self._clear()
                self._append(Begin(self.identity, self._overwrite))
                fsync_directory(self.root)
                self.folder.mkdir()
            opened = True
        except OSError as error:
            raise cannot_write(self.root, error) from None
        finally:
            if not opened:
                self.close()
        return LocalSink(self.folder)

    def _check(self, resume: bool, overwrite: bool) -> Begin | None:
        """What an unfinished run began with, where it may be continued or cleared away."""
        first = begun_in(self.root)
        unfinished = self._journal.exists()
        if self._share is None:
            self._check_shares()
        else:
            self._check_whole(self._share, overwrite)
        ours = self.root.is_dir() and (unfinished or self._joins or self._is_new())
        if os.path.lexists(self.root) and (self.root.is_symlink() or not ours):
            raise UsageError(
                f"{self.root} is in the way, and it is no unfinished conversion; move it or choose "
                "another place"
            )
        same = first is not None and first.identity.options == self.identity.options
        if unfinished and not (resume or overwrite):
            raise UsageError(
                f"{self.root} holds an unfinished conversion; use --resume to continue it or "
                "--overwrite to start again"
            )
        if resume and not overwrite and first is not None and not same:
            raise UsageError(
                f"{self.root} was made with other options or by another version; use --overwrite "
                "to start again"
            )
        self._overwrite = overwrite or (resume and first is not None and first.overwrite)
        if in_use(self.out):
            if not self._overwrite:
                raise UsageError(
                    f"{self.out} exists"
                    + (", and no unfinished conversion was to replace it" if resume else "")
                    + "; choose another place, or use --overwrite"
                )
            check_replaceable(self.out)
        if self.out.is_mount():
            raise UsageError(f"{self.out} is a mount point; name a directory inside it")
        return first

    def _is_new(self) -> bool:
        return is_empty(self.root) if self._share is None else holds_a_lock_alone(self.root)

    def _check_shares(self) -> None:
        """Refuses to make all of what is being made in shares."""
        if not self._joins and shares_in(self.root):
            raise UsageError(
                f"{self.root} holds parts of a conversion; join them with --commit, or remove it "
                "to start again"
            )

    def _check_whole(self, share: Share, overwrite: bool) -> None:
        """Refuses to make a share where all is being made, or shares are being joined."""
        root = partial_of(self.out)
        if os.path.lexists(root) and (root.is_symlink() or not _holds_shares(root)):
            raise UsageError(
                f"{root} is in the way, and it holds no parts of a conversion; move it or choose "
                "another place"
            )
        if (root / JOURNAL).exists() and not overwrite:
            raise UsageError(
                f"{root} holds a conversion that is not in parts, or is being joined; finish it "
                "with --resume or --commit, or use --overwrite to make this part all the same"
            )
        if others := {other.count for other in shares_in(root)} - {share.count}:
            raise UsageError(
                f"{root} holds parts of {min(others)}, and this is part {share}; remove it "
                "to start again"
            )

    def _take_lock(self) -> None:
        with suppress(FileNotFoundError):  # another run may have removed it at its end
            self._lock = take_lock(self.root, None if self._share is None else LOCK)
            if self._lock is None:
                raise UsageError(f"{self.root} is being written by another run")

    def _load(self, begun: Begin) -> bool:
        """Takes over what an earlier run has finished; False where that is nothing."""
        if not self.folder.is_dir():
            return False
        if begun.identity != self.identity:
            self.note = "the source has changed since the unfinished conversion: starting again"
            return False
        entries = read_journal(self._journal, mend=True)
        for entry in entries:
            if isinstance(entry, ShardDone):
                self.shards[entry.name] = entry.tensors
            elif isinstance(entry, PartDone):
                self.parts[entry.item, entry.first, entry.last] = entry
            elif isinstance(entry, SourceDone):
                self.sources[entry.name] = entry.blake3
        return True

    def keep_only(self, names: set[str], begun: set[str], parts: Mapping[Key, PartDone]) -> None:
        """Removes all but these finished shards, and others' parts in the files that are begun.

        What else lies there may be of any age.

        Raises:
            ConversionError: the file system refuses.
        """
        try:
            for path in self.folder.iterdir():
                if path.name not in names | begun:
                    remove(path)
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        self.shards = {name: found for name, found in self.shards.items() if name in names}
        self.parts = dict(parts)

    def check_space(self, need: int) -> None:
        """Refuses to begin what the disk cannot hold.

        Args:
            need: bytes still to be written.

        Raises:
            ConversionError: the disk has less free.
        """
        free = shutil.disk_usage(self.root).free
        if free < need:
            if not self.shards and not self.parts:
                self.discard()
            raise ConversionError(
                f"{self.out}: the output needs {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are "
                "free; free some space or choose another place"
            )

    def _append(self, entry: Struct, durable: bool = True) -> None:
        with self._journal.open("ab") as file:
            file.write(msgspec.json.encode(entry) + b"\n")
            file.flush()
            if durable:
                os.fsync(file.fileno())

    def _record(self, entry: Struct, durable: bool = True) -> None:
        try:
            self._append(entry, durable)
        except OSError as error:
            raise cannot_write(self._journal, error) from None

    def finished_shard(self, name: str, tensors: dict[str, str]) -> None:
        """Records a finished shard and the hash of each of its tensors."""
        self._record(ShardDone(name, tensors))
        self.shards[name] = tensors

    def finished_part(self, part: PartDone) -> None:
        """Records a finished part of an item, or all of it.

        There may be many. Each is looked at again before it is taken over, so none need be durable.
        """
        self._record(part, durable=False)

    def finished_source(self, name: str, digest: str) -> None:
        """Records the hash of a source file."""
        self._record(SourceDone(name, digest))
        self.sources[name] = digest

    def commit(self, manifest_sha256: str) -> None:
        """Makes the complete checkpoint appear under OUT and removes the rest.

        Raises:
            ConversionError: something that may not be replaced stands under OUT now, or the file
                system refuses; the partial output is kept.
        """
        self._record(Commit(manifest_sha256))
        try:
            if in_use(self.out):
                self._replace()
            else:
                self._appear()
            fsync_directory(self.out.parent)
        except OSError as error:
            raise cannot_write(self.out, error) from None
        self.discard()

    def _appear(self) -> None:
        try:
            self.folder.rename(self.out)  # replaces nothing but an empty directory
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise self._taken("it was not there when this run began") from None
            raise

    def _taken(self, reason: str) -> ConversionError:
        return ConversionError(
            f"{self.out}: {reason}; it was left alone. Move it, then run again with --resume"
        )

    def _replace(self) -> None:
        if not self._overwrite:
            raise self._taken("it was not there when this run began")
        try:
            check_replaceable(self.out)
        except UsageError as error:
            raise self._taken(error.message) from None
        if not exchange(self.folder, self.out):
            self._replace_in_two_steps()
            return
        try:  # what was exchanged, not what was looked at before
            check_replaceable(self.folder)
        except UsageError as error:
            exchange(self.folder, self.out)
            raise self._taken(error.message) from None

    def _replace_in_two_steps(self) -> None:
        """Moves OUT aside first; where the second step fails, it is brought back."""
        old = self.root / OLD
        remove(old)
        self.out.rename(old)
        try:
            self.folder.rename(self.out)
        finally:
            if not os.path.lexists(self.out):
                old.rename(self.out)

    def _clear(self) -> None:
        for name in (_CHECKPOINT, _SOURCE, OLD, JOURNAL):
            remove(self.root / name)

    def discard(self) -> None:
        """Removes the partial output."""
        with suppress(OSError):
            for folder in self.joined:
                _remove_share(folder)
            if self._share is None:
                self._clear()
                self.root.rmdir()
            else:
                _remove_share(self.root)
                self.root.parent.rmdir()  # where it was the only one
        self.close()

    def close(self) -> None:
        """Gives up the lock; what is finished stays for ``--resume``."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def root_of(out: Path, share: Share | None = None) -> Path:
    """Where an output, or a share of it, is built."""
    return partial_of(out) if share is None else partial_of(out) / share.folder


def _holds_shares(root: Path) -> bool:
    """Whether it is a partial output in which shares can be made."""
    if not root.is_dir():
        return False
    if (root / JOURNAL).is_file():
        return True
    # others may come and go meanwhile
    return all(share_at(path) or not os.path.lexists(path) for path in list(root.iterdir()))


def _remove_share(folder: Path) -> None:
    """Removes what a share was made in: its journal and its lock at the end, as they say whose."""
    for name in (_CHECKPOINT, _SOURCE, JOURNAL, LOCK):
        remove(folder / name)
    folder.rmdir()


def begun_in(root: Path) -> Begin | None:
    """How the unfinished run in a partial output began, where there is one that says so."""
    first = read_journal(root / JOURNAL)[:1]
    return first[0] if first and isinstance(first[0], Begin) else None


def discard_leftovers(out: Path, options: str) -> None:
    """Removes what a killed run of the same options has left beside a complete OUT.

    That run was killed just after its commit, or would have made the same again.
    """
    root = partial_of(out)
    with locked(root) as free:
        if not free:
            return
        for folder in shares_in(root).values():
            begun = begun_in(folder)
            with locked(folder, LOCK) as free, suppress(OSError):
                if free and (begun is None or begun.identity.options == options):
                    _remove_share(folder)
        begun = begun_in(root)
        if begun is None:  # killed before it had begun, or at the very end
            ours = {path.name for path in root.iterdir()} <= {JOURNAL}
        else:
            ours = begun.identity.options == options
        if not ours:
            return
        with suppress(OSError):
            for name in (_CHECKPOINT, _SOURCE, OLD, JOURNAL):
                remove(root / name)
            root.rmdir()
