"""Two runs of one output at once."""

from __future__ import annotations

import os
import shutil
import signal
from typing import TYPE_CHECKING

import pytest
from support import faults
from support.changes import another_conversion, flip
from support.executors import Inline
from support.models import repack, tree

from ctconvert import api
from ctconvert.errors import UsageError
from ctconvert.store.places import recover
from ctconvert.work import staging

if TYPE_CHECKING:
    from .conftest import Place

Whole = dict[str, str]


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
    lock, came = staging.fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not came:
            came.append(True)
            ended = faults.run(
                lambda: repack(
                    other,
                    place.out,
                    overwrite=True,
                    executor=Inline(lambda: os.kill(os.getpid(), signal.SIGKILL), 6),
                )
            )
            assert ended.end == "killed"
        lock(descriptor, operation)

    monkeypatch.setattr(staging.fcntl, "flock", late)
    assert repack(place.model, place.out, resume=True).resumed_shards == 0
    api.verify(place.out, against=place.model, workers=1)
