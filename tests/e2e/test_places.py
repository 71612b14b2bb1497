"""Where an output may go: nothing of the user's is replaced, moved or mixed with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.builders import config_of, write_checkpoint
from support.damage import GROUP, ONE, convert, fails, refused, small
from support.models import tree

import ctconvert
from ctconvert.errors import UsageError, VerificationError

FLAGS: list[dict[str, Any]] = [{}, {"overwrite": True}, {"resume": True}]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", small(), config_of(GROUP))


def test_source_missing(tmp_path: Path) -> None:
    for verb in (convert, lambda model, _: ctconvert.inspect(model)):
        for place in (tmp_path / "none", "./none"):
            fails(verb, place, tmp_path / "out", says=(str(place),), error=UsageError)
    assert list(tmp_path.iterdir()) == []


def test_source_is_a_file(model: Path, tmp_path: Path) -> None:
    for name in (ONE, "config.json"):
        says = (str(model / name), "is a file")
        fails(convert, model / name, tmp_path / "out", says=says, error=UsageError)
        fails(ctconvert.inspect, model / name, says=says, error=UsageError)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"workers": 0}, ("workers 0",)),
        ({"workers": -1}, ("workers -1",)),
        ({"device": "abacus"}, ("abacus", "cpu")),
        ({"device": "cuda:x"}, ("cuda:x",)),
        ({"device": "cuda:9"}, ("cuda:9",)),
        ({"target": "tpu"}, ("'tpu'", "triton, cuda, cuda-sm80")),
        ({"layout": {"*": "none"}}, ("*=none", "triton-wna16")),
        ({"layout": {"re:(": "triton-wna16"}}, ("re:(",)),
        ({"max_shard_size": 0}, ("max_shard_size 0",)),
        ({"resume": True, "overwrite": True}, ("resume=True", "overwrite=True")),
    ],
)
def test_bad_usage_of_repack(model: Path, options: dict[str, Any], says: tuple[str, ...]) -> None:
    refused(model, says=says, error=UsageError, **options)


def test_bad_usage_of_verify(model: Path, tmp_path: Path) -> None:
    out, none = tmp_path / "out", tmp_path / "none"
    convert(model, out)
    fails(ctconvert.verify, none, says=(str(none),), error=UsageError)
    fails(ctconvert.verify, out, says=("workers 0",), error=UsageError, workers=0)
    fails(ctconvert.verify, out, says=(str(none),), error=UsageError, against=none)
    fails(ctconvert.verify, model, says=("no ctconvert.json",), error=VerificationError)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("kind", ["a user's files", "a source checkpoint", "a damaged output"])
def test_only_a_sound_output_is_replaced(
    model: Path, tmp_path: Path, kind: str, flag: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    if kind == "a user's files":
        out.mkdir()
        (out / "letters.txt").write_text("dear")
    elif kind == "a source checkpoint":
        write_checkpoint(out, small(), config_of(GROUP))
    else:
        convert(model, out)
        (out / "ctconvert.json").write_bytes((out / "ctconvert.json").read_bytes()[:-9])
    before = tree(out)
    fails(convert, model, out, says=(str(out),), error=UsageError, **flag)
    assert tree(out) == before and names(tmp_path) == ["model", "out"]


def test_an_output_with_a_foreign_file_is_not_replaced(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(model, out)
    (out / "letters.txt").write_text("dear")
    fails(convert, model, out, says=("letters.txt",), error=UsageError, overwrite=True)
    assert (out / "letters.txt").read_text() == "dear"
    (out / "letters.txt").unlink()
    convert(model, out, overwrite=True)


def test_output_is_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    fails(convert, model, tmp_path / "out", says=("exists",), error=UsageError)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_output_directory_is_used(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(model, tmp_path / "out")
    ctconvert.verify(tmp_path / "out")


def test_the_current_directory_as_output(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be replaced under the feet of the user's shell."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    for out in (".", tmp_path / "out", "../out", "../out/."):
        fails(convert, model, out, says=("the current directory",), error=UsageError)
    fails(convert, model, "..", says=("source",), error=UsageError)
    assert names(tmp_path) == ["model", "out"]


@pytest.mark.parametrize("name", ["empty", "dangling"])
def test_a_linked_output_directory(model: Path, tmp_path: Path, name: str) -> None:
    """The checkpoint appears where the link leads, and the link stays."""
    target, link = tmp_path / "disk", tmp_path / "link"
    if name == "empty":
        target.mkdir()
    link.symlink_to(target)
    convert(model, link)
    assert link.is_symlink() and (target / "ctconvert.json").is_file()
    ctconvert.verify(link)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("how", ["equal", "inside", "deep inside", "around", "far around"])
def test_output_that_overlaps_the_source(tmp_path: Path, how: str, flag: dict[str, Any]) -> None:
    model = write_checkpoint(tmp_path / "a" / "b" / "model", small(), config_of(GROUP))
    out = {
        "equal": model,
        "inside": model / "out",
        "deep inside": model / "x" / "y",
        "around": tmp_path / "a" / "b",
        "far around": tmp_path / "a",
    }[how]
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "a", target_is_directory=True)
    before = tree(tmp_path)
    for place in (out, link / out.relative_to(tmp_path / "a"), out / ".." / out.name):
        fails(convert, model, place, says=("source",), error=UsageError, **flag)
    linked = link / "b" / "model"
    fails(convert, linked, out, says=("source",), error=UsageError, **flag)
    assert tree(tmp_path) == before and names(tmp_path) == ["a", "link"]


@pytest.mark.parametrize("flag", FLAGS)
def test_a_source_named_like_the_partial_output(tmp_path: Path, flag: dict[str, Any]) -> None:
    """The partial output lies under OUT.partial, which must not be the source either."""
    model = write_checkpoint(tmp_path / "out.partial", small(), config_of(GROUP))
    before = tree(tmp_path)
    fails(convert, model, tmp_path / "out", says=("source",), error=UsageError, **flag)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("flag", FLAGS)
def test_a_foreign_directory_where_the_partial_output_belongs(
    model: Path, tmp_path: Path, flag: dict[str, Any]
) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "precious.txt").write_text("mine")
    fails(convert, model, tmp_path / "out", says=(str(partial),), error=UsageError, **flag)
    assert (partial / "precious.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_default_output_lies_beside_the_source(model: Path, tmp_path: Path) -> None:
    ctconvert.repack(model, target="triton", device="cpu")
    assert names(tmp_path) == ["model", "model-triton"]


def test_links_that_leave_the_checkpoint_are_left_out(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (model / "notes.txt").symlink_to(tmp_path / "secret")
    (model / "again.json").symlink_to("tokenizer.json")
    report = convert(model, tmp_path / "out")
    assert set(report.side_files) == {"tokenizer.json", "again.json"}
    (note,) = report.notes
    assert "notes.txt" in note and "leaves the checkpoint" in note
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert not (tmp_path / "out" / "again.json").is_symlink()
