"""The journal of a run: what an unfinished output is made of, and what of it is finished."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from msgspec import Struct


class Identity(Struct, frozen=True):
    """What a partial output is made of: what was asked for, the plan, and the source's files.

    ``options`` and ``plan`` are hashes, ``sources`` fingerprints by file.
    """

    options: str
    plan: str
    sources: dict[str, str]


class Begin(Struct, frozen=True, tag="begin"):
    """The journal's first line; ``overwrite`` says that OUT may be replaced."""

    identity: Identity
    overwrite: bool


class ShardDone(Struct, frozen=True, tag="shard"):
    """A finished shard, with the BLAKE3 hashes of its tensors."""

    name: str
    tensors: dict[str, str]


class Piece(Struct, frozen=True):
    """Bytes of a tensor, from ``start`` on, and their BLAKE3 hash."""

    start: int
    length: int
    blake3: str


#: An item and the units of it that a part is: the name, the first, and the one after the last.
Key = tuple[str, int, int]


class PartDone(Struct, frozen=True, tag="part"):
    """Units of a module, ``first`` up to ``last``, are made; all of them where it is no stack.

    ``tensors`` are hashes of those that are whole, ``pieces`` what was written of others.
    """

    item: str
    first: int
    last: int
    tensors: dict[str, str]
    pieces: dict[str, Piece]


class SourceDone(Struct, frozen=True, tag="source"):
    """A source file's BLAKE3 hash."""

    name: str
    blake3: str


class Commit(Struct, frozen=True, tag="commit"):
    """The output is complete and verified; the hash of its manifest."""

    manifest: str


Entry = Begin | ShardDone | PartDone | SourceDone | Commit
_ENTRY = msgspec.json.Decoder(Entry)


def read_journal(path: Path, mend: bool = False) -> list[Entry]:
    """A journal's entries, up to a line that a kill cut short; ``mend`` removes that one."""
    try:
        if not path.is_file():
            return []
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        return []
    found = []
    size = 0
    for line in lines:
        try:
            entry = _ENTRY.decode(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        found.append(entry)
        size += len(line)
    if mend:
        os.truncate(path, size)
    return found
