"""A directory as a sink: ranges in any order, whole files, one line for what the disk refuses."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from support.faults import descriptors

from ctconvert.errors import ConversionError
from ctconvert.store.writer import LocalSink, cannot_write


def test_ranges_in_any_order(tmp_path: Path) -> None:
    sink = LocalSink(tmp_path)
    sink.create("file", b"head", 12)
    assert (tmp_path / "file").read_bytes() == b"head" + bytes(8)
    sink.write("file", 8, memoryview(b"tail"))
    sink.write("file", 4, memoryview(b"body"))
    sink.finish("file")
    assert (tmp_path / "file").read_bytes() == b"headbodytail"


def test_what_was_there_before_is_gone(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    LocalSink(tmp_path).create("file", b"ab", 4)
    assert (tmp_path / "file").read_bytes() == b"ab\0\0"


def test_a_file_is_written_in_pieces(tmp_path: Path) -> None:
    sink = LocalSink(tmp_path)
    sink.put("a/b/file", iter([b"one", memoryview(b"two")]))
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"onetwo"
    sink.put("a/b/file", b"3")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"3"
    sink.sync()


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    opened = descriptors()
    sink = LocalSink(tmp_path)
    sink.create("one", b"", 1)
    sink.create("two", b"", 1)
    assert descriptors() == opened + 2
    sink.finish("one")
    sink.close()
    sink.close()
    assert descriptors() == opened


def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    sink = LocalSink(tmp_path)
    for action in (
        lambda: sink.create("folder", b"", 1),
        lambda: sink.create("gone/file", b"", 1),
        lambda: sink.write("nothing", 0, memoryview(b"x")),
        lambda: sink.finish("nothing"),
        lambda: sink.put("folder", b""),
        lambda: LocalSink(tmp_path / "gone").put("x" * 300, b""),
    ):
        with pytest.raises(ConversionError, match=r"^/.*: cannot write: .*; .*$"):
            action()


def test_an_error_names_its_reason_once() -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/file")
    text = str(cannot_write(Path("/out"), error))
    assert re.match(r"/out: cannot write: No space left on device; free some space", text)
    assert "odd" in str(cannot_write(Path("/out"), OSError("odd")))


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EACCES, "permissions"),
        (errno.EPERM, "permissions"),
        (errno.EROFS, "permissions"),
        (errno.ENAMETOOLONG, "shorter name"),
        (errno.EFBIG, "max_shard_size"),
        (errno.EISDIR, "another place"),
        (errno.ENOTDIR, "another place"),
        (errno.EIO, "another place"),
    ],
)
def test_each_error_has_the_advice_that_helps(number: int, advice: str) -> None:
    text = str(cannot_write(Path("/out"), OSError(number, os.strerror(number), "/some/file")))
    assert text.startswith(f"/out: cannot write: {os.strerror(number)}; ") and "\n" not in text
    for other in ("free some space", "permissions", "shorter name", "max_shard_size"):
        assert (other in text) == (other == advice), text
    assert advice in text
