"""Joins the shares of an output: makes sure that all are there and whole, and puts them together.

Nothing is copied: files are renamed into the partial output of the whole, and its journal takes
over what theirs say. A file is recorded before it is moved, so that a killed run finds it in one of
the two places; what an earlier run has moved is read again, as by any run that is resumed.
"""

from __future__ import annotations

import os
from pathlib import Path

from ctconvert.errors import ConversionError, UsageError
from ctconvert.records import Plan, Shard
from ctconvert.store.base import Store
from ctconvert.store.places import JOURNAL, take_lock
from ctconvert.store.writer import cannot_write, fsync_directory
from ctconvert.work.journal import Begin, Identity, ShardDone, SourceDone, read_journal
from ctconvert.work.shares import LOCK, Share, hashed_by, shards_of, shares_in
from ctconvert.work.staging import Staging


class Joining:
    """The shares of an output, which are locked until :meth:`close`.

    Args:
        plan: of the whole.
        store: what it is made of.
        staging: of the whole; not open yet.
    """

    def __init__(self, plan: Plan, store: Store, staging: Staging) -> None:
        self.plan = plan
        self.store = store
        self.staging = staging
        self._locks: list[int] = []
        #: Where each finished file lies, with the share it is of and the hashes of its tensors.
        self._shards: dict[str, tuple[Path, Share, Shard, dict[str, str]]] = {}
        self._sources: dict[str, str] = {}

    def check(self) -> None:
        """Makes sure that every share is finished, before anything is changed.

        Raises:
            UsageError: one is missing, unfinished, being written, or of something else.
            ConversionError: the source changed from one to another.
        """
        root = self.staging.root
        try:
            found = shares_in(root)
            counts = sorted({share.count for share in found})
            if not found:
                raise UsageError(f"{root} holds no parts to join; make them with --part I/N")
            if len(counts) > 1:
                raise UsageError(
                    f"{root} holds parts of {counts[0]} and of {counts[1]}; remove those of one"
                )
            for index in range(1, counts[0] + 1):
                share = Share(index, counts[0])
                if share not in found:
                    raise UsageError(f"{root}: part {share} is missing; make it first")
                self._check(share, found[share])
        except OSError as error:
            raise cannot_write(root, error) from None

    def _check(self, share: Share, folder: Path) -> None:
        where = f"{self.staging.root}: part {share}"
        if (lock := take_lock(folder, LOCK)) is None:
            raise UsageError(f"{where} is being written by another run")
        self._locks.append(lock)
        entries = read_journal(folder / JOURNAL)
        begun = entries[0] if entries else None
        if not isinstance(begun, Begin):
            raise UsageError(f"{where} is unfinished; run it again with --resume")
        if wrong := _difference(begun.identity, self.staging.identity):
            raise UsageError(f"{where} {wrong}; make it again with --overwrite")
        shards = {entry.name: entry.tensors for entry in entries if isinstance(entry, ShardDone)}
        sources = {entry.name: entry.blake3 for entry in entries if isinstance(entry, SourceDone)}
        wanted = shards_of(self.plan, share)
        done = [shard for shard in wanted if shards.get(shard.name, {}).keys() == {*shard.tensors}]
        if len(done) < len(wanted) or hashed_by(self.plan, share, self.store) - sources.keys():
            raise UsageError(
                f"{where} is unfinished, {len(done)} of {len(wanted)} files; run it again with "
                "--resume"
            )
        for shard in wanted:
            path = folder / self.staging.folder.name / shard.name
            if not (self._is_whole(path, shard) or (self.staging.folder / shard.name).exists()):
                raise _lacks(where, shard.name)
            self._shards[shard.name] = path, share, shard, shards[shard.name]
        for name, digest in sources.items():
            if self._sources.setdefault(name, digest) != digest:
                raise ConversionError(
                    f"{where} has read other bytes of {self.store.path(name)} than a part before "
                    "it; make the parts again with --overwrite",
                    file=self.store.path(name),
                )
        self.staging.joined.append(folder)

    def _is_whole(self, path: Path, shard: Shard) -> bool:
        header = self.plan.header(shard)
        if not path.is_file() or path.stat().st_size != shard.size:
            return False
        with path.open("rb") as file:
            return file.read(len(header)) == header

    def move(self) -> None:
        """Puts everything into the partial output, which is open.

        Raises:
            UsageError: what an earlier run has moved is damaged.
            ConversionError: the file system refuses.
        """
        staging = self.staging
        try:
            for name, digest in self._sources.items():
                if name not in staging.sources:
                    staging.finished_source(name, digest)
            for name, (path, share, shard, tensors) in self._shards.items():
                if name in staging.shards:
                    continue
                if not self._is_whole(path, shard):
                    raise _lacks(f"{staging.root}: part {share}", name)
                staging.finished_shard(name, tensors)
                path.rename(staging.folder / name)
            fsync_directory(staging.folder)
            self.close()  # the folders go away, which some file systems refuse while one is open
        except OSError as error:
            raise cannot_write(staging.folder, error) from None

    def close(self) -> None:
        """Gives up the locks."""
        for lock in self._locks:
            os.close(lock)
        self._locks.clear()


def _difference(theirs: Identity, ours: Identity) -> str | None:
    """What a share was made of, where that is something else."""
    if theirs.options != ours.options:
        return "was made with other options or by another version"
    changed = [
        name
        for name in sorted({*theirs.sources, *ours.sources})
        if theirs.sources.get(name) != ours.sources.get(name)
    ]
    if changed:
        return f"was made of another source: {changed[0]} has changed"
    return "was made of another source" if theirs.plan != ours.plan else None


def _lacks(where: str, name: str) -> UsageError:
    return UsageError(f"{where} lacks {name}, or it is damaged; make it again with --overwrite")
