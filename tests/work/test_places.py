"""Where an output may be made: what is somebody else's is left alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.changes import another_conversion
from support.executors import Inline
from support.models import repack, restore, tree

from ctconvert import api
from ctconvert.errors import ConversionError, UsageError
from ctconvert.work.journal import Commit, read_journal

if TYPE_CHECKING:
    from .conftest import Place

Whole = dict[str, str]


def a_folder(out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")


def a_file(out: Path) -> None:
    out.write_text("mine")


def a_link(out: Path) -> None:
    out.symlink_to("model")


@pytest.mark.parametrize("theirs", [a_folder, a_file, a_link, another_conversion])
@pytest.mark.parametrize("verb", ["repack", "restore"])
def test_an_out_that_somebody_else_makes_meanwhile_is_left_alone(
    place: Place,
    converted: Path,
    whole: Whole,
    restored: Whole,
    verb: str,
    theirs: Callable[[Path], None],
) -> None:
    run, source, want = {
        "repack": (repack, place.model, whole),
        "restore": (restore, converted, restored),
    }[verb]
    with pytest.raises(ConversionError, match=r"out: .*left alone.*resume=True"):
        run(source, place.out, executor=Inline(lambda: theirs(place.out)))
    kept = tree(place.out) or place.out.read_text()
    with pytest.raises(UsageError, match=r"exists|no directory|is the source"):
        run(source, place.out, resume=True)
    assert (tree(place.out) or place.out.read_text()) == kept
    assert len(place.finished()) == 3
    place.out.rename(place.folder / "theirs")
    again = Inline()
    assert run(source, place.out, executor=again, resume=True).resumed_shards == 3
    assert again.wrote == []
    assert tree(place.out) == want and not place.partial.exists()


def test_an_empty_folder_is_no_out(place: Place, whole: Whole) -> None:
    place.out.mkdir()
    repack(place.model, place.out)
    assert tree(place.out) == whole


# --- places where no output may be ---------------------------------------------------------------


@pytest.mark.parametrize("verb", ["repack", "restore"])
@pytest.mark.parametrize(
    ("current", "out"),
    [
        ("work", "."),
        ("work", "../work"),
        ("work/deep", ".."),
        ("work/deep", "../.."),
        ("work", ""),
        ("link", "."),
    ],
)
def test_the_current_directory_and_its_parents_are_no_output(
    place: Place,
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    current: str,
    out: str,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(place.model if verb == "repack" else converted, source)
    (place.folder / "work" / "deep").mkdir(parents=True)
    (place.folder / "link").symlink_to("work")
    monkeypatch.chdir(place.folder / current)
    before = tree(place.folder)
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match="current directory"):
            if verb == "repack":
                api.repack(source, out, target="triton", workers=1, **flags)
            else:
                api.restore(source, out, workers=1, **flags)
    assert tree(place.folder) == before


@pytest.mark.parametrize("out", ["model", "model/inside", "model/a/b", ".", "link", "link/inside"])
def test_the_source_is_no_output(place: Place, out: str) -> None:
    (place.folder / "link").symlink_to("model")
    before = tree(place.folder)
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match="source"):
            repack(place.model, place.folder / out, **flags)
    assert tree(place.folder) == before


def test_the_partial_output_is_not_made_in_the_source(place: Place) -> None:
    source = place.folder / "x.partial"
    place.model.rename(source)
    with pytest.raises(UsageError, match="source"):
        repack(source, place.folder / "x", overwrite=True)
    assert place.names == {"x.partial"}


def test_something_else_in_the_place_of_the_partial_output_is_left_alone(place: Place) -> None:
    place.partial.mkdir()
    (place.partial / "notes.txt").write_text("mine")
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match=r"out\.partial is in the way"):
            repack(place.model, place.out, **flags)
    assert (place.partial / "notes.txt").read_text() == "mine"


def test_a_parent_that_is_no_folder(place: Place) -> None:
    (place.folder / "file").write_text("")
    with pytest.raises((ConversionError, UsageError), match="Not a directory"):
        repack(place.model, place.folder / "file" / "out")


def test_a_commit_is_recorded_before_out_appears(place: Place) -> None:
    with pytest.raises(ConversionError, match="left alone"):
        repack(place.model, place.out, executor=Inline(lambda: a_folder(place.out)))
    assert isinstance(read_journal(place.journal)[-1], Commit)


@pytest.mark.parametrize("flags", [{"overwrite": True}, {"resume": True}, {}])
@pytest.mark.parametrize("into", ["out", "out.partial/checkpoint"])
@pytest.mark.parametrize(
    "file", ["model-00001-of-00002.safetensors", "config.json", "tokenizer.json", "LICENSE"]
)
def test_a_source_whose_files_are_links_into_out_is_no_source(
    place: Place, file: str, into: str, flags: dict[str, bool]
) -> None:
    """They are all there is of them, and would go with it."""
    if into == "out":
        another_conversion(place.out)
    else:
        place.killed()
    held = place.folder / into / "tokenizer.json"
    held.parent.mkdir(parents=True, exist_ok=True)
    if (place.model / file).exists():
        (place.model / file).rename(held)
    else:
        held.write_text("")
    (place.model / file).symlink_to(held)
    before = tree(place.folder)
    with pytest.raises(UsageError, match=rf"{file.replace('.', '[.]')}.* link .*out"):
        repack(place.model, place.out, **flags)
    assert tree(place.folder) == before


@pytest.mark.parametrize("leads_to", ["nothing", "an empty folder", "an unfinished conversion"])
def test_a_link_in_the_place_of_the_partial_output_is_left_alone(
    place: Place, leads_to: str
) -> None:
    """What is written, removed or renamed there would be somebody else's."""
    elsewhere = place.folder / "elsewhere"
    if leads_to == "an empty folder":
        elsewhere.mkdir()
    elif leads_to == "an unfinished conversion":
        place.killed()
        place.partial.rename(elsewhere)
    before = tree(elsewhere)
    place.partial.symlink_to("elsewhere")
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match=r"out\.partial is in the way"):
            repack(place.model, place.out, **flags)
    assert tree(elsewhere) == before and place.partial.is_symlink()
