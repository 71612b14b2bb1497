"""Two runs of one output at once."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import pytest
from support import faults
from support.changes import another_conversion, flip
from support.executors import Inline
from support.models import repack, tree

from ctconvert import api
from ctconvert.errors import UsageError
from ctconvert.store import places
from ctconvert.store.places import recover

if TYPE_CHECKING:
    from .conftest import Place

Whole = dict[str, str]


def meanwhile(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Does something once, after a partial output was opened and before it is locked."""
    lock, came = places.fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not came:
            came.append(True)
            action()
        lock(descriptor, operation)

    monkeypatch.setattr(places.fcntl, "flock", late)


def test_two_runs_at_once(place: Place, whole: Whole) -> None:
    """The second is refused whatever it is told, and the first is not disturbed."""

    def second() -> None:
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UsageError, match=r"out\.partial is being written by another run"):
                repack(place.model, place.out, **flags)
        recover(place.out)

    repack(place.model, place.out, executor=Inline(second))
    assert tree(place.out) == whole and place.is_clean


def test_out_is_not_brought_back_under_a_run_that_is_replacing_it(place: Place) -> None:
    another_conversion(place.out)

    def look() -> None:
        place.out.rename(place.partial / "old")
        recover(place.out)
        assert not place.out.exists()
        (place.partial / "old").rename(place.out)

    repack(place.model, place.out, executor=Inline(look), overwrite=True)


def test_the_journal_of_another_run_is_not_mistaken_for_the_one_that_was_seen(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a first look and the lock another run came, of another source, and was killed."""
    other = place.folder / "converted"
    shutil.copytree(place.model, other)
    flip(other / "model-00001-of-00002.safetensors")
    place.killed()

    def another_run() -> None:
        executor = Inline(lambda: os.kill(os.getpid(), signal.SIGKILL), 6)
        run = partial(repack, other, place.out, overwrite=True, executor=executor)
        assert faults.run(run).end == "killed"

    meanwhile(monkeypatch, another_run)
    assert repack(place.model, place.out, resume=True).resumed_shards == 0
    api.verify(place.out, against=place.model, workers=1)


def test_the_lock_of_a_folder_that_is_gone_is_none(
    place: Place, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run has finished it before it was locked here."""
    place.killed()
    meanwhile(monkeypatch, lambda: faults.run(lambda: repack(place.model, place.out, resume=True)))
    with pytest.raises(UsageError, match="exists"):
        repack(place.model, place.out, resume=True)
    assert tree(place.out) == whole and place.is_clean


def test_a_folder_that_is_gone_is_made_again(
    place: Place, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.killed()
    meanwhile(monkeypatch, lambda: shutil.rmtree(place.partial))
    repack(place.model, place.out, overwrite=True)
    assert tree(place.out) == whole and place.is_clean


@pytest.mark.parametrize("verb", ["repack", "recover"])
def test_the_lock_of_a_folder_that_another_run_has_made_again_is_not_held(
    place: Place, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """It went away and came back, and the other run is writing into it."""
    another_conversion(place.out)
    place.killed(overwrite=True)
    place.out.rename(place.partial / "old")
    held: list[int] = []

    def made_again() -> None:
        aside = place.folder / "aside"
        place.partial.rename(aside)
        shutil.copytree(aside, place.partial)
        held.append(os.open(place.partial, os.O_RDONLY))
        lock(held[0], places.fcntl.LOCK_EX)

    lock = places.fcntl.flock
    meanwhile(monkeypatch, made_again)
    if verb == "repack":
        with pytest.raises(UsageError, match="being written by another run"):
            repack(place.model, place.out, resume=True)
    else:
        recover(place.out)
    os.close(*held)
    assert not place.out.exists() and (place.partial / "old").is_dir()
