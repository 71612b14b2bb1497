"""What ``--overwrite`` replaces: what ctconvert has made and nothing else, in one step or two."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.changes import another_conversion
from support.executors import Inline
from support.models import options, repack, tree

from ctconvert import api
from ctconvert.errors import ConversionError, UsageError
from ctconvert.runtime.loading import Loader
from ctconvert.store.places import recover
from ctconvert.work import staging

if TYPE_CHECKING:
    from .conftest import Place

Whole = dict[str, str]


@pytest.mark.parametrize("flags", [{"overwrite": True}, {}])
@pytest.mark.parametrize(
    "add",
    [
        lambda out: (out / "notes.txt").write_text("mine"),
        lambda out: (out / ".git").mkdir() or (out / ".git" / "HEAD").write_text("ref"),
        lambda out: (out / "mine").mkdir() or (out / "mine" / "model.bin").write_text(""),
        lambda out: (out / "elsewhere").symlink_to(out.parent),
        lambda out: (out / "nothing").symlink_to("gone"),
        lambda out: os.mkfifo(out / "fifo"),
        lambda out: (out / "ctconvert.json").unlink(),
        lambda out: (out / "ctconvert.json").write_text("{"),
        lambda out: (out / "ctconvert.json").write_text('{"tool": {"name": "x"}, "files": {}}'),
        lambda out: shutil.rmtree(out) or out.write_text("mine"),
    ],
    ids=["file", ".git", "folder", "link", "dangling", "fifo", "bare", "cut", "other", "no folder"],
)
def test_only_what_ctconvert_made_is_replaced(
    place: Place, add: Callable[[Path], object], flags: dict[str, bool]
) -> None:
    another_conversion(place.out)
    add(place.out)
    before = {path.name for path in place.out.iterdir()} if place.out.is_dir() else "mine"
    with pytest.raises(UsageError, match="out"):
        repack(place.model, place.out, **flags)
    after = {path.name for path in place.out.iterdir()} if place.out.is_dir() else "mine"
    assert after == before and place.names <= {"model", "out"}


def test_what_is_added_to_out_during_a_run_is_kept(place: Place, whole: Whole) -> None:
    """It was replaceable when the run began, and no longer is when it ends."""
    another_conversion(place.out)
    notes = place.out / "notes.txt"
    with pytest.raises(ConversionError, match=r"notes\.txt.*left alone"):
        executor = Inline(lambda: notes.write_text("mine"))
        repack(place.model, place.out, executor=executor, overwrite=True)
    assert notes.read_text() == "mine"
    notes.unlink()
    assert repack(place.model, place.out, resume=True).resumed_shards == 3
    assert tree(place.out) == whole and place.is_clean


def test_what_is_added_to_out_at_the_last_moment_is_kept(
    place: Place, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last look at it: what was exchanged is looked at, and exchanged back."""
    another_conversion(place.out)
    notes = place.out / "notes.txt"
    exchange, times = staging.exchange, []

    def late(a: Path, b: Path) -> bool:
        if not times:
            notes.write_text("mine")
        times.append((a, b))
        return exchange(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(staging, "exchange", late)
        with pytest.raises(ConversionError, match=r"notes\.txt.*left alone"):
            repack(place.model, place.out, overwrite=True)
    assert len(times) == 2 and notes.read_text() == "mine"
    notes.unlink()
    assert repack(place.model, place.out, resume=True).resumed_shards == 3
    assert tree(place.out) == whole and place.is_clean


def test_out_is_back_at_once_where_the_new_one_cannot_take_its_place(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two steps, of which the second fails."""
    another_conversion(place.out)
    old = tree(place.out)

    def no_exchange(a: Path, b: Path) -> bool:
        shutil.rmtree(a)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(staging, "exchange", no_exchange)
        with pytest.raises(ConversionError, match="cannot write"):
            repack(place.model, place.out, overwrite=True)
    assert tree(place.out) == old


def test_an_output_of_the_first_version_of_the_manifest_is_replaced(
    place: Place, whole: Whole
) -> None:
    """Its files were a mapping."""
    another_conversion(place.out)
    files = {path.name: {} for path in place.out.rglob("*") if path.name != "ctconvert.json"}
    files["templates/chat.jinja"] = {}
    manifest = {"format_version": 1, "tool": {"name": "ctconvert"}, "files": files}
    (place.out / "ctconvert.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="overwrite=True"):
        repack(place.model, place.out)
    repack(place.model, place.out, overwrite=True)
    assert tree(place.out) == whole


def test_a_link_to_an_output_is_followed(place: Place, whole: Whole) -> None:
    """Beside what it leads to lies the partial output, on the same disk."""
    elsewhere = place.folder / "elsewhere"
    elsewhere.mkdir()
    another_conversion(place.out)
    place.out.rename(elsewhere / "real")
    place.out.symlink_to("elsewhere/real")
    repack(place.model, place.out, overwrite=True)
    assert place.out.is_symlink() and tree(elsewhere / "real") == whole


# --- replaced in two steps -----------------------------------------------------------------------


def moved_aside(place: Place) -> Whole | None:
    """As a kill between two renames leaves it, where directories cannot be exchanged."""
    another_conversion(place.out)
    old = tree(place.out)
    place.killed(overwrite=True)
    place.out.rename(place.partial / "old")
    return old


def by_verify(place: Place) -> None:
    api.verify(place.out, workers=1)


def by_restore(place: Place) -> None:
    api.restore(place.out, place.folder / "converted", workers=1)


def by_load(place: Place) -> None:
    assert len(Loader(place.out, "cpu").converted) == 6


def by_a_link(place: Place) -> None:
    link = place.folder / "converted"
    link.symlink_to("out")
    api.verify(link, workers=1)


def by_a_refused_repack(place: Place) -> None:
    for flags in ({}, {"resume": True}):
        with pytest.raises(UsageError):
            repack(place.model, place.out, asked=options(target="cuda"), **flags)


@pytest.mark.parametrize(
    "verb", [by_verify, by_restore, by_load, by_a_link, by_a_refused_repack, lambda place: None]
)
def test_whatever_runs_next_brings_an_output_back(
    place: Place, whole: Whole, verb: Callable[[Place], None]
) -> None:
    old = moved_aside(place)
    verb(place)
    if place.out.exists():
        assert tree(place.out) == old
        api.verify(place.out, against=place.model, workers=1)
    repack(place.model, place.out, resume=True)
    assert tree(place.out) == whole and place.is_clean


def test_nothing_is_brought_back_into_the_place_of_something_else(place: Place) -> None:
    moved_aside(place)
    place.out.mkdir()
    (place.out / "notes.txt").write_text("mine")
    recover(place.out)
    assert [path.name for path in place.out.iterdir()] == ["notes.txt"]
    assert (place.partial / "old" / "ctconvert.json").exists()


@pytest.mark.parametrize("what", ["a link", "no conversion"])
def test_nothing_is_brought_back_from_what_is_not_a_partial_output(place: Place, what: str) -> None:
    """A folder ``old`` of the user's, which happens to lie there."""
    folder = place.folder / "converted" if what == "a link" else place.partial
    (folder / "old").mkdir(parents=True)
    (folder / "old" / "notes.txt").write_text("mine")
    if what == "a link":
        (folder / "journal.jsonl").write_text("")
        place.partial.symlink_to("converted")
    recover(place.out)
    assert not place.out.exists() and (folder / "old" / "notes.txt").exists()
