"""Large ranges past the page cache: the bytes of the ordinary way, and it where there is none."""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.faults import descriptors

from ctconvert.errors import ConversionError
from ctconvert.specs import TensorSpec
from ctconvert.store import direct, writer
from ctconvert.store.base import BLOCK, CHUNK
from ctconvert.store.direct import DiskStore
from ctconvert.store.local import LocalStore
from ctconvert.store.safetensors import build_header
from ctconvert.store.writer import LARGE, LocalSink

#: Ranges that meet inside blocks, small and large, one of several chunks and one of whole blocks.
CUTS = (0, 9, 9 + LARGE, LARGE + BLOCK, 2 * LARGE + BLOCK, 2 * LARGE + 2 * BLOCK + 1)
CUTS += (CUTS[-1] + CHUNK + LARGE + 17, CUTS[-1] + CHUNK + 3 * LARGE + 18)


@pytest.fixture
def data() -> bytes:
    return random.Random(1).randbytes(CUTS[-1])


def _write(folder: Path, data: bytes) -> None:
    sink = LocalSink(folder)
    sink.create("file", data[: CUTS[1]], len(data))
    ranges = list(itertools.pairwise(CUTS))
    random.Random(2).shuffle(ranges)
    for first, last in ranges:
        sink.write("file", first, memoryview(data)[first:last])
    sink.finish("file")


def _has_direct(folder: Path) -> bool:
    (folder / "probe").write_bytes(bytes(BLOCK))
    descriptor = direct.opened(folder / "probe", os.O_RDWR)
    if descriptor is None:
        return False
    os.close(descriptor)
    return True


def _refuse_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "opened", lambda path, flags: None)


def _refuse_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of larger blocks, and one that gives half of what is asked for."""
    pwrite, preadv, calls = os.pwrite, os.preadv, [0]

    def is_direct(descriptor: int) -> bool:
        path = f"/proc/self/fdinfo/{descriptor}"
        flags = next(line for line in Path(path).read_text().splitlines() if "flags" in line)
        return bool(int(flags.split()[1], 8) & os.O_DIRECT)

    def write(descriptor: int, part: Any, offset: int) -> int:
        if is_direct(descriptor):
            calls[0] += 1
            if calls[0] % 2:
                raise OSError(errno.EINVAL, "Invalid argument")
            part = part[: len(part) // 2 // BLOCK * BLOCK + 512]
        return pwrite(descriptor, part, offset)

    def read(descriptor: int, parts: list[memoryview], offset: int) -> int:
        if is_direct(descriptor):
            calls[0] += 1
            if not calls[0] % 3:
                raise OSError(errno.EINVAL, "Invalid argument")
            parts = [parts[0][: max(len(parts[0]) // 2 // BLOCK * BLOCK, BLOCK)]]
        return preadv(descriptor, parts, offset)

    monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(os, "preadv", read)


@pytest.mark.parametrize("refuse", [None, _refuse_open, _refuse_blocks])
def test_bytes_in_their_places(
    tmp_path: Path,
    data: bytes,
    monkeypatch: pytest.MonkeyPatch,
    refuse: Callable[[pytest.MonkeyPatch], None] | None,
) -> None:
    if refuse is not None:
        refuse(monkeypatch)
    before = descriptors()
    _write(tmp_path, data)
    assert (tmp_path / "file").read_bytes() == data
    store = DiskStore(tmp_path)
    for first, last in (*itertools.pairwise(CUTS), (0, len(data)), (9, 2 * CHUNK)):
        last = min(last, len(data))
        found = b"".join(bytes(part) for part in store.pieces("file", first, last - first))
        assert found == data[first:last]
    store.close()
    assert descriptors() == before


def test_large_ranges_go_past_the_page_cache(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not _has_direct(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    done, pwrite = [0], os.pwrite

    def write(descriptor: int, part: Any, offset: int) -> int:
        if len(part) < BLOCK or offset % BLOCK:
            done[0] += len(part)
        return pwrite(descriptor, part, offset)

    monkeypatch.setattr(os, "pwrite", write)
    _write(tmp_path, data)
    assert done[0] < 2 * BLOCK * len(CUTS)
    store = DiskStore(tmp_path)
    monkeypatch.setattr(LocalStore, "read_into", lambda *_: pytest.fail("not from the disk"))
    assert sum(len(part) for part in store.pieces("file")) == len(data)


@pytest.mark.parametrize("first", [0, 1])
def test_bytes_that_begin_a_block_go_from_where_they_are(
    first: int, tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not _has_direct(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    copied: list[int] = []
    monkeypatch.setattr(writer, "put", lambda *given: copied.append(direct.put(*given)))
    size = CHUNK + BLOCK
    buffer = direct.aligned(size + first)[first : first + size]
    buffer[:] = data[:size]
    sink = LocalSink(tmp_path)
    sink.create("file", b"", size)
    sink.write("file", 0, buffer)
    sink.finish("file")
    assert (tmp_path / "file").read_bytes() == data[:size]
    assert bool(copied) == bool(first)


def test_the_data_of_a_file_begins_a_block() -> None:
    header, offsets = build_header(
        [("a", TensorSpec("U8", (3,))), ("b", TensorSpec("U8", (1,)))], {}
    )
    assert len(header) % BLOCK == 0
    assert offsets == [len(header), len(header) + 3]


def test_memory_that_no_disk_takes(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device's, mapped here."""
    pwrite, refused = os.pwrite, [0]

    def write(descriptor: int, part: Any, offset: int) -> int:
        if len(part) == CHUNK:
            refused[0] += 1
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return pwrite(descriptor, part, offset)

    monkeypatch.setattr(os, "pwrite", write)
    _write(tmp_path, data)
    assert (tmp_path / "file").read_bytes() == data
    assert refused[0] or not _has_direct(tmp_path)


def test_a_file_that_ends_early_or_is_gone(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    store = DiskStore(tmp_path)
    assert store.sizes()
    os.truncate(tmp_path / "file", 2 * LARGE + 5)
    with pytest.raises(ConversionError, match=f"ends at byte {2 * LARGE + 5}"):
        for _ in store.pieces("file", 3, 3 * LARGE):
            pass


def test_a_full_disk_is_one_line(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sink = LocalSink(tmp_path)
    sink.create("file", b"", len(data))
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ConversionError, match="file: cannot write: No space left on device"):
        sink.write("file", 0, memoryview(data))
    sink.close()
