"""A directory as a store: what is part of it, links, times, and files that change."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from support.faults import descriptors
from support.models import plan_of, repack, write_model

from ctconvert.errors import BadInputError, ConversionError
from ctconvert.records import Plan
from ctconvert.store.base import CHUNK
from ctconvert.store.checkpoint import Checkpoint
from ctconvert.store.local import LocalStore


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def names(plan: Plan) -> set[str]:
    """The side files of a plan."""
    return {file.name for file in plan.side_files}


def test_what_is_part_of_it(model: Path) -> None:
    (model / ".git").mkdir()
    (model / ".git" / "config").write_text("")
    (model / ".hidden.safetensors").write_text("")
    os.mkfifo(model / "fifo")
    store = LocalStore(model)
    assert {"config.json", "templates/chat.jinja", "tokenizer.json"} <= store.sizes().keys()
    assert not any(name.startswith(".") for name in store.sizes())
    assert store.left_out() == {"fifo": "no regular file"}
    assert store.id == "model" and store.revision is None


def test_links_that_leave_the_checkpoint_are_not_copied_and_are_named(
    model: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("secret")
    (model / "key.txt").symlink_to(secret)
    (model / "relative.txt").symlink_to("../id_rsa")
    (model / "templates" / "deep.txt").symlink_to("../../id_rsa")
    (model / "chain.txt").symlink_to("relative.txt")
    (model / "folder").symlink_to(tmp_path / "folder")
    (model / "dangling.txt").symlink_to("gone")
    (model / "loop.txt").symlink_to("loop.txt")
    left_out = {
        "key.txt",
        "relative.txt",
        "templates/deep.txt",
        "chain.txt",
        "folder",
        "dangling.txt",
        "loop.txt",
    }
    plan = plan_of(LocalStore(model))
    assert not left_out & names(plan)
    for name in left_out:
        assert any(note.startswith(f"{name} is left out: ") for note in plan.notes), name
    repack(model, tmp_path / "out")
    assert not any("secret" in path.read_text("latin-1") for path in _files(tmp_path / "out"))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_links_inside_the_checkpoint_are_followed(model: Path, tmp_path: Path) -> None:
    (model / "again.json").symlink_to("tokenizer.json")
    (model / "templates" / "up.json").symlink_to("../tokenizer.json")
    (model / "absolute.json").symlink_to(model / "tokenizer.json")
    repack(model, tmp_path / "out")
    for name in ("again.json", "templates/up.json", "absolute.json"):
        assert (tmp_path / "out" / name).read_text() == '{"version": "1.0"}'
        assert not (tmp_path / "out" / name).is_symlink()


def test_a_model_that_is_a_link_itself(model: Path, tmp_path: Path) -> None:
    (model / "again.json").symlink_to("tokenizer.json")
    (tmp_path / "link").symlink_to("model")
    plan = plan_of(LocalStore(tmp_path / "link"))
    assert "again.json" in names(plan) and plan.notes == ()


def hub_cache(model: Path, folder: Path) -> Path:
    """The model as huggingface_hub keeps it: snapshots of links to blobs."""
    root = folder / "models--org--name"
    snapshot, blobs = root / "snapshots" / "0123abcd", root / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(_files(model)):
        link = snapshot / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / f"{number:040x}")
        up = "../" * (len(link.relative_to(root).parts) - 1)
        link.symlink_to(f"{up}blobs/{number:040x}")
    return snapshot


def test_a_hub_cache_keeps_its_files_elsewhere(model: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(model, tmp_path)
    (tmp_path / "id_rsa").write_text("secret")
    (snapshot / "key.txt").symlink_to(tmp_path / "id_rsa")
    (snapshot / "other.txt").symlink_to("../../../other")
    (tmp_path / "other").write_text("")
    plan = plan_of(LocalStore(snapshot))
    assert names(plan) == {"tokenizer.json", "templates/chat.jinja"}
    assert {note.partition(" ")[0] for note in plan.notes} == {"key.txt", "other.txt"}
    repack(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_blobs_belong_to_a_hub_cache_only(model: Path, tmp_path: Path) -> None:
    """Another folder called ``snapshots`` opens no way to the one called ``blobs`` beside it."""
    snapshot = hub_cache(model, tmp_path)
    root = snapshot.parent.parent.rename(tmp_path / "something")
    plan = plan_of(LocalStore(root / "snapshots" / snapshot.name))
    assert plan.side_files == ()


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_what_a_checkpoint_needs_and_cannot_be_read(model: Path, name: str) -> None:
    (model / name).unlink()
    (model / name).mkdir()
    with pytest.raises(BadInputError, match=name):
        Checkpoint(LocalStore(model))
    (model / name).rmdir()
    os.mkfifo(model / name)  # must not be waited for
    with pytest.raises(BadInputError, match=rf"{name}.* no regular file"):
        Checkpoint(LocalStore(model))


def test_a_fifo_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    store = LocalStore(tmp_path)
    assert store.sizes() == {"file": 3}
    (tmp_path / "file").unlink()
    os.mkfifo(tmp_path / "file")
    with pytest.raises(ConversionError, match=r"file: "):
        store.read("file")


def test_files_that_end_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abcdef")
    store = LocalStore(tmp_path)
    assert store.read("file", 4) == b"ef" and store.read("file", 9) == b""
    os.truncate(tmp_path / "file", 4)
    assert store.read("file", 0, 4) == b"abcd"
    with pytest.raises(ConversionError, match=r"file: ends at byte 4; it changed"):
        store.read("file", 2)


def test_files_that_go_away(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    store = LocalStore(tmp_path)
    store.sizes()
    (tmp_path / "file").unlink()
    with pytest.raises(ConversionError, match="file: cannot read: No such file"):
        store.read("file")
    with pytest.raises(ConversionError, match="file: changed"):
        store.fingerprint("file")


def test_pieces_are_a_file_in_order(tmp_path: Path) -> None:
    data = os.urandom(1 << 10) * ((2 * CHUNK >> 10) + 3)
    (tmp_path / "file").write_bytes(data)
    store = LocalStore(tmp_path)
    assert b"".join(bytes(part) for part in store.pieces("file")) == data
    lengths = [len(part) for part in store.pieces("file", 7, CHUNK + 5)]
    assert lengths == [CHUNK, 5]
    assert b"".join(map(bytes, store.pieces("file", 7, CHUNK + 5))) == data[7 : CHUNK + 12]
    assert list(store.pieces("file", len(data))) == []


def test_a_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    seen = set()

    def see() -> None:
        seen.add(LocalStore(tmp_path).fingerprint("file"))

    path.write_bytes(b"abc")
    before = path.stat()
    times = (before.st_atime_ns, before.st_mtime_ns)
    see()
    see()
    assert len(seen) == 1
    path.write_bytes(b"abd")
    os.utime(path, ns=times)
    see()
    assert len(seen) == 2
    other = tmp_path / "other"
    other.write_bytes(b"abe")
    os.utime(other, ns=times)
    other.replace(path)
    see()
    assert len(seen) == 3


def test_a_store_is_what_it_was_when_its_files_were_listed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    store = LocalStore(tmp_path)
    store.sizes()
    (tmp_path / "later").write_text("")
    assert store.sizes().keys() == {"file"}
    store.fingerprint("file")
    path.write_bytes(b"abcd")
    with pytest.raises(ConversionError, match="changed"):
        store.fingerprint("file")


def test_files_are_closed_and_opened_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    store = LocalStore(tmp_path)
    opened = descriptors()
    for _ in range(3):
        assert store.read("file") == b"abc"
        store.close()
        assert descriptors() == opened
    store.read("file")
    del store
    assert descriptors() == opened


def test_one_that_cannot_be_made_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt, or a path that leads round and round: it is one error, not two."""
    others: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", others.append)

    def resolve(path: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "resolve", resolve)
        LocalStore(tmp_path)
    assert not others
