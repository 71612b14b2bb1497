"""What ``--resume`` takes over of a killed run, and what it does not."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import faults
from support.changes import flip
from support.executors import Inline
from support.models import options, repack, restore, tree
from support.stores import Plain

from ctconvert import api
from ctconvert.errors import UsageError, VerificationError
from ctconvert.store.local import LocalStore
from ctconvert.store.safetensors import read_header
from ctconvert.work.journal import PartDone, read_journal

if TYPE_CHECKING:
    from .conftest import Place

Whole = dict[str, str]


def test_finished_shards_are_taken_over(place: Place, whole: Whole) -> None:
    finished = place.killed()
    with pytest.raises(UsageError, match=r"unfinished.*resume=True"):
        repack(place.model, place.out)
    with pytest.raises(UsageError, match="contradict"):
        repack(place.model, place.out, resume=True, overwrite=True)
    again = Inline()
    assert repack(place.model, place.out, executor=again, resume=True).resumed_shards == finished
    assert 0 < len(again.wrote) < 8
    assert tree(place.out) == whole and place.is_clean


def test_each_run_takes_over_what_all_before_it_have_finished(place: Place, whole: Whole) -> None:
    assert place.killed(after=4) == 1
    assert place.killed(after=3, resume=True) == 2
    assert repack(place.model, place.out, resume=True).resumed_shards == 2
    assert tree(place.out) == whole and place.is_clean


def test_finished_modules_are_taken_over(place: Place, whole: Whole) -> None:
    """Of one shard, too: by their bytes, so that what was damaged meanwhile is made again."""
    asked = options(max_shard_size=10**9)
    once, expected = Inline(), place.folder / "converted"
    repack(place.model, expected, asked=asked, executor=once)
    for damage in (False, True):
        killed = Inline(lambda: os.kill(os.getpid(), signal.SIGKILL), 4)
        faults.run(partial(repack, place.model, place.out, asked=asked, executor=killed))
        done = [one for one in read_journal(place.journal) if isinstance(one, PartDone)]
        assert len(done) >= 3 and place.finished() == []
        if damage:
            first = next(iter(done[0].tensors))
            found = read_header(LocalStore(place.built), "model.safetensors").tensors
            (entry,) = (one for one in found if one.name == first)
            flip(place.built / entry.file, entry.offset)
        again = Inline()
        repack(place.model, place.out, asked=asked, executor=again, resume=True)
        assert len(again.wrote) == len(once.wrote) - len(done) + damage
        assert tree(place.out) == tree(expected)
        shutil.rmtree(place.out)


def test_a_restoration_is_resumed_too(place: Place, converted: Path, restored: Whole) -> None:
    finished = place.killed(restore)
    assert restore(converted, place.out, resume=True).resumed_shards == finished
    assert tree(place.out) == restored and place.is_clean
    progress = Plain()
    assert restore(converted, place.out, resume=True, progress=progress).resumed_shards == 3
    assert any("already complete" in note for note in progress.notes)
    with pytest.raises(UsageError, match="exists"):
        restore(converted, place.out)
    with pytest.raises(UsageError, match="exists"):
        restore(converted, place.out, max_shard_size=1_000_000, resume=True)
    assert tree(place.out) == restored and place.is_clean


def test_a_complete_output_is_found_complete(place: Place, whole: Whole) -> None:
    repack(place.model, place.out)
    progress, again = Plain(), Inline()
    report = repack(place.model, place.out, resume=True, progress=progress, executor=again)
    assert report.resumed_shards == 3 and again.wrote == []
    assert any("already complete" in note for note in progress.notes)
    assert tree(place.out) == whole and place.is_clean


def test_a_damaged_output_is_not_found_complete(place: Place) -> None:
    repack(place.model, place.out)
    flip(place.out / "model-00002-of-00003.safetensors")
    with pytest.raises(VerificationError, match=r"tensor model\.layers"):
        repack(place.model, place.out, resume=True)


@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "tokenizer.json"])
def test_an_output_of_an_older_source_is_not_found_complete(place: Place, file: str) -> None:
    repack(place.model, place.out)
    before = tree(place.out)
    flip(place.model / file)
    with pytest.raises(UsageError, match=r"source has changed.*overwrite=True"):
        repack(place.model, place.out, resume=True)
    assert tree(place.out) == before
    repack(place.model, place.out, overwrite=True)
    assert api.verify(place.out, against=place.model, workers=1).against is not None


@pytest.mark.parametrize("journal", [None, b"", b'{"type":"begin"', b"\xff\n", b"5\n", b"{}\n"])
def test_other_options_never_replace_a_complete_output(
    place: Place, whole: Whole, journal: bytes | None
) -> None:
    """Not even beside a partial output that no longer says what it is."""
    repack(place.model, place.out)
    if journal is not None:
        place.partial.mkdir()
        place.journal.write_bytes(journal)
    for asked in (options(target="cuda"), options(max_shard_size=20_000)):
        for flags in ({"resume": True}, {}):
            with pytest.raises(UsageError, match="overwrite=True"):
                repack(place.model, place.out, asked=asked, **flags)
    assert tree(place.out) == whole
    assert repack(place.model, place.out, resume=True).resumed_shards == 3
    assert tree(place.out) == whole and place.is_clean


def test_other_options_take_nothing_over(place: Place, whole: Whole) -> None:
    place.killed()
    before = tree(place.partial)
    for asked in (options(target="cuda"), options(max_shard_size=20_000), options(fuse=True)):
        with pytest.raises(UsageError, match=r"other options.*overwrite=True"):
            repack(place.model, place.out, asked=asked, resume=True)
    assert tree(place.partial) == before
    assert repack(place.model, place.out, overwrite=True).resumed_shards == 0
    assert tree(place.out) == whole and place.is_clean


@pytest.mark.parametrize("text", [b"", b"\n", b"{}\n", b"5\n", b"\xff\xff\n", b'{"type":"begin"'])
def test_a_journal_without_its_first_line_vouches_for_nothing(
    place: Place, whole: Whole, text: bytes
) -> None:
    """It does not say what the shards were made of, and neither does what is added to it."""
    place.killed()
    lines = place.journal.read_bytes().splitlines(keepends=True)
    place.journal.write_bytes(text + b"".join(lines[1:]))
    assert repack(place.model, place.out, resume=True).resumed_shards == 0
    assert tree(place.out) == whole and place.is_clean


def test_a_torn_line_loses_nothing_else(place: Place, whole: Whole) -> None:
    """What later runs add after it must still be found."""
    assert place.killed(after=4) == 1
    with place.journal.open("ab") as file:
        file.write(b'{"type":"shard","name":"model-00002')
    assert place.killed(after=3, resume=True) == 2
    with place.journal.open("ab") as file:
        file.write(b"\0\0\0")
    assert repack(place.model, place.out, resume=True).resumed_shards == 2
    assert tree(place.out) == whole


@pytest.mark.parametrize(
    "damage",
    [flip, lambda path: flip(path, 12), lambda path: os.truncate(path, 1000), Path.unlink],
    ids=["data", "header", "cut", "missing"],
)
def test_a_damaged_shard_is_made_again(
    place: Place, whole: Whole, damage: Callable[[Path], None]
) -> None:
    finished = place.killed()
    damage(place.built / place.finished()[0])
    assert repack(place.model, place.out, resume=True).resumed_shards == finished - 1
    assert tree(place.out) == whole


def test_what_lies_among_the_shards_and_is_none_is_not_carried_along(
    place: Place, whole: Whole
) -> None:
    """Side files of an earlier attempt, shards that were not finished: they may be of any age."""
    place.killed()
    (place.built / "tokenizer.json").write_text("older")
    (place.built / "generation_config.json").write_text("no longer in the source")
    (place.built / "templates" / "x").mkdir(parents=True)
    repack(place.model, place.out, resume=True)
    assert tree(place.out) == whole and place.is_clean
    assert not (place.out / "templates" / "x").exists()


def test_a_leftover_empty_folder_is_no_hindrance(place: Place, whole: Whole) -> None:
    """As a kill leaves it before the journal exists, or at the very end."""
    for flags in ({}, {"resume": True}):
        place.partial.mkdir()
        repack(place.model, place.out, **flags)
        assert tree(place.out) == whole and place.is_clean
        place.partial.mkdir()
        repack(place.model, place.out, resume=True)
        assert place.is_clean
        shutil.rmtree(place.out)
