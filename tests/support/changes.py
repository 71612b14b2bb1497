"""Changes to checkpoints: a bit, a file that is replaced unseen, an output that is another."""

from __future__ import annotations

import os
from pathlib import Path

from .models import options, repack


def flip(path: Path, at: int = -1) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def replaced_unseen(path: Path) -> None:
    """Another file of the same name, size and modification time."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    other = path.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def rewritten_unseen(path: Path) -> None:
    """The same file, written over in place, its modification time set back."""
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


def another_conversion(out: Path) -> None:
    other = out.with_name("other")
    repack(out.parent / "model", other, asked=options(max_shard_size=1_000_000))
    other.rename(out)
