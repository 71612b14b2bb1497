"""Shares of a plan: what each of N processes makes that know nothing of one another.

A share is made in ``OUT.partial/part-00002-of-00004``, which has a lock, a journal and a checkpoint
of its own, as a whole run has them in ``OUT.partial``; :mod:`ctconvert.work.joining` joins them.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from ctconvert.errors import UsageError
from ctconvert.planning.place import readers
from ctconvert.records import Plan, Shard
from ctconvert.store.base import Store
from ctconvert.store.places import JOURNAL

#: What is locked in a share's folder: a file, whose lock other machines see where that can be.
LOCK = "lock"
_FOLDER = re.compile(r"part-([0-9]{5})-of-([0-9]{5})")
#: As many as the folders' names can count.
_MOST = 99_999


class Share(Struct, frozen=True):
    """The ``index``-th of ``count``, from 1 on."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def folder(self) -> str:
        return f"part-{self.index:05}-of-{self.count:05}"


def share(index: int, count: int) -> Share:
    """One share of several.

    Raises:
        UsageError: there is no such one.
    """
    if not 1 <= index <= count <= _MOST:
        raise UsageError(
            f"--part {index}/{count}: write it as I/N, from 1/N to N/N, N at most {_MOST}"
        )
    return Share(index, count)


def shares_in(root: Path) -> dict[Share, Path]:
    """The shares that a partial output holds, with their folders."""
    if not root.is_dir():
        return {}
    each = ((share_at(path), path) for path in root.iterdir())
    return {share: path for share, path in each if share is not None}


def share_at(folder: Path) -> Share | None:
    """The share that is made in a folder, which another process may have made just now."""
    match = _FOLDER.fullmatch(folder.name)
    if match is None or folder.is_symlink() or not folder.is_dir():
        return None
    names = _names(folder)
    ours = names <= {LOCK} or (JOURNAL in names and (folder / JOURNAL).is_file())
    return Share(int(match[1]), int(match[2])) if ours else None


def holds_a_lock_alone(folder: Path) -> bool:
    """Whether nothing was begun in the folder of a share."""
    return folder.is_dir() and _names(folder) <= {LOCK}


def _names(folder: Path) -> set[str]:
    """What is in a folder, all at once; nothing where it is gone."""
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()


def shards_of(plan: Plan, share: Share) -> tuple[Shard, ...]:
    """The files of a share: neighbours, and the largest share's bytes as few as can be.

    Neighbours read the same source files. The least limit that ``count`` shares keep is found by
    bisection; each then takes as many files as it allows.
    """
    sizes = [shard.size for shard in plan.shards]
    total = sum(sizes)
    least = max(sizes, default=0)
    limit = least + bisect_left(
        range(least, total + 1), True, key=lambda limit: len(_cut(sizes, limit)) <= share.count
    )
    cuts = [*_cut(sizes, limit), *[len(sizes)] * (share.count + 1)]
    return plan.shards[cuts[share.index - 1] : cuts[share.index]]


def _cut(sizes: Sequence[int], limit: int) -> list[int]:
    """Where each share begins where none is larger than a limit that every size keeps."""
    begins: list[int] = []
    held = limit + 1
    for index, size in enumerate(sizes):
        if held + size > limit:
            begins.append(index)
            held = 0
        held += size
    return begins


def share_of(plan: Plan, share: Share) -> Plan:
    """The plan of what a share makes."""
    shards = shards_of(plan, share)
    files = {shard.name for shard in shards}
    items = tuple(item for item in plan.items if item.made[0].file in files)
    return replace(plan, shards=shards, items=items, side_files=())


def hashed_by(plan: Plan, share: Share, store: Store) -> set[str]:
    """The source files that a share hashes: those of which it is the first reader.

    Of a store that states their hashes, all that it reads: what came from afar is checked by whom
    it came to. The first share has what nobody reads.
    """
    mine = {shard.name for shard in shards_of(plan, share)}
    first: dict[str, str] = {}
    read: set[str] = set()
    for name, files in readers(plan).items():
        for file in files:
            first.setdefault(file, name)
        if name in mine:
            read |= set(files)
    return {
        file.name
        for file in plan.source.hashed
        if (first[file.name] in mine if file.name in first else share.index == 1)
        or (file.name in read and store.stated_sha256(file.name) is not None)
    }
