"""A run that ends before any of its operations leaves OUT whole, and can be finished.

Every scenario is run once undisturbed to count its operations; then it is run again for each of
them and stopped there (:mod:`support.faults` says how). After each stop OUT must be what it was or
the new checkpoint, byte for byte, ``verify`` must pass on it, and the same command with
``--resume`` must give the bytes of the undisturbed run and leave nothing beside it.

    CTCONVERT_SWEEP=full python -m pytest tests/work/test_kill_sweep.py

stops at every operation; without it, at one in some dozens of them.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
from support import faults
from support.faults import Fault, How
from support.folders import quick_folder
from support.models import (
    EXPERT_MATRIX,
    options,
    repack,
    restore,
    tree,
    write_experts,
    write_model,
)

from ctconvert import api
from ctconvert.errors import UsageError
from ctconvert.store import direct, writer
from ctconvert.store.base import BLOCK
from ctconvert.work import parts, staging
from ctconvert.work.executors import Threads
from ctconvert.work.journal import Begin, read_journal
from ctconvert.work.shares import Share

FULL = os.environ.get("CTCONVERT_SWEEP") == "full"
#: One operation in so many, where the sweep is not full.
STRIDE = 24
WRITES = ("write", "pwrite")


class Place:
    """The models, outputs made of them, and a folder ``here`` where each case is played."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "model", seed=1)
        self.older = write_model(folder / "older" / "model", seed=2)
        self.experts = write_experts(folder / "experts" / "model")
        self.converted = folder / "converted" / "out"
        repack(self.model, self.converted)
        self.here = folder / "here"
        self.out = self.here / "out"
        self.partial = self.here / "out.partial"

    def clear(self) -> None:
        shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir()

    def repack(self, **flags: bool) -> None:
        repack(self.model, self.out, **flags)

    def stack(self, **flags: bool) -> None:
        """Experts in jobs of two or four."""
        asked = options(target="cuda", fuse=True, max_shard_size=60_000)
        grain, parts.GRAIN = parts.GRAIN, 4 * EXPERT_MATRIX
        try:
            repack(self.experts, self.out, asked=asked, **flags)
        finally:
            parts.GRAIN = grain

    def restore(self, **flags: bool) -> None:
        restore(self.converted, self.out, **flags)

    def share(self, index: int, **flags: bool) -> None:
        repack(self.model, self.out, share=Share(index, 2), **flags)

    def join(self, **flags: bool) -> None:
        """As it is given again: by itself it takes over what it had begun."""
        repack(self.model, self.out, commit=True, overwrite=flags.get("overwrite", False))

    def shares(self, **flags: bool) -> None:
        """All of it; what was begun is run again, up to what was joined already."""
        try:
            self.join()
        except UsageError:
            for index in (1, 2):
                self.share(index, **flags)
            self.join(**flags)

    def without_exchange(self, **flags: bool) -> None:
        """A conversion where the system cannot exchange two directories."""
        staging.exchange = lambda a, b: False  # in a child: for good
        self.repack(**flags)


@dataclass(frozen=True)
class Scenario:
    """What is there, and what is run.

    ``before`` prepares the folder, ``run`` is the command, ``flags`` what it is first given, and
    ``finish`` the command that finishes it where that is another.
    """

    before: Callable[[Place], object]
    run: Callable[..., None]
    flags: tuple[str, ...] = ()

    def first(self, place: Place) -> Callable[[], None]:
        return lambda: self.run(place, **dict.fromkeys(self.flags, True))

    def again(self, place: Place, flag: str) -> None:
        command = Place.repack if self.run is Place.without_exchange else self.run
        command(place, **{flag: True})


def stopped(
    place: Place, action: Callable[[], object], at: Callable[[tuple[str, ...]], int]
) -> None:
    """Runs something in a child that is killed before an operation, chosen among all of them."""
    shutil.copytree(place.here, place.here.with_name("count"))
    trace = faults.run(action).trace
    shutil.rmtree(place.here)
    place.here.with_name("count").rename(place.here)
    assert faults.run(action, Fault(at(trace))).end == "killed"


def half_way(trace: tuple[str, ...]) -> int:
    return len(trace) // 2


def last_rename(trace: tuple[str, ...]) -> int:
    return len(trace) - trace[::-1].index("rename")


def cleaning_up(trace: tuple[str, ...]) -> int:
    return last_rename(trace) + 2  # a folder is synced in between


def nothing(place: Place) -> None:
    pass


def an_older_output(place: Place) -> None:
    repack(place.model, place.out, asked=options(max_shard_size=1_000_000))


def an_output_of_an_older_source(place: Place) -> None:
    repack(place.older, place.out)


def the_same_output(place: Place) -> None:
    place.repack()


def a_half_made_output(place: Place) -> None:
    stopped(place, place.repack, half_way)


def a_half_replaced_output(place: Place) -> None:
    an_older_output(place)
    stopped(place, lambda: place.repack(overwrite=True), half_way)


def an_output_that_was_moved_aside(place: Place) -> None:
    """Killed between the two renames."""
    an_older_output(place)
    stopped(place, lambda: place.without_exchange(overwrite=True), last_rename)
    assert not place.out.exists()


def a_commit_without_the_cleaning_up(place: Place) -> None:
    stopped(place, place.repack, cleaning_up)
    assert place.out.exists() and place.partial.exists()


def shares_to_join(place: Place) -> None:
    for index in (1, 2):
        place.share(index)


def shares_to_replace(place: Place) -> None:
    an_older_output(place)
    for index in (1, 2):
        place.share(index, overwrite=True)


def a_half_joined_output(place: Place) -> None:
    shares_to_join(place)
    stopped(place, place.join, half_way)


def an_older_restored_checkpoint(place: Place) -> None:
    restore(place.converted, place.out, max_shard_size=1_000_000)


SCENARIOS = {
    "repack": Scenario(nothing, Place.repack),
    "repack --overwrite": Scenario(an_older_output, Place.repack, ("overwrite",)),
    "repack --overwrite, older source": Scenario(
        an_output_of_an_older_source, Place.repack, ("overwrite",)
    ),
    "repack --overwrite, the same again": Scenario(the_same_output, Place.repack, ("overwrite",)),
    "repack --overwrite, no exchange": Scenario(
        an_older_output, Place.without_exchange, ("overwrite",)
    ),
    "repack --resume": Scenario(a_half_made_output, Place.repack, ("resume",)),
    "repack --resume, to replace": Scenario(a_half_replaced_output, Place.repack, ("resume",)),
    "repack --resume, moved aside": Scenario(
        an_output_that_was_moved_aside, Place.repack, ("resume",)
    ),
    "repack --resume, committed": Scenario(
        a_commit_without_the_cleaning_up, Place.repack, ("resume",)
    ),
    "repack in parts": Scenario(nothing, Place.shares),
    "repack --commit": Scenario(shares_to_join, Place.join),
    "repack --commit --overwrite": Scenario(shares_to_replace, Place.join, ("overwrite",)),
    "repack --commit, again": Scenario(a_half_joined_output, Place.join),
    "repack experts": Scenario(nothing, Place.stack),
    "restore": Scenario(nothing, Place.restore),
    "restore --overwrite": Scenario(an_older_restored_checkpoint, Place.restore, ("overwrite",)),
}


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Codes go past the page cache, as those of large modules do, and scales through it."""
    with quick_folder() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(writer, "LARGE", BLOCK)
        patched.setattr(direct, "LEAST", BLOCK)
        place = Place(folder)
        gc.collect()
        gc.freeze()  # what is there now need not be copied into every child
        yield place
        gc.unfreeze()


class Case:
    """A scenario prepared: its state kept aside, its operations counted, its result known."""

    def __init__(self, place: Place, scenario: Scenario) -> None:
        self.place, self.scenario = place, scenario
        place.clear()
        scenario.before(place)
        self.kept = place.folder / "kept"
        shutil.rmtree(self.kept, ignore_errors=True)
        place.here.rename(self.kept)
        #: What OUT may be: as it was (before it was moved aside, too), or the new checkpoint.
        self.old = tree(self.kept / "out") or tree(self.kept / "out.partial" / "old")
        self.reset()
        ended = faults.run(scenario.first(place))
        assert ended.end == "done"
        self.trace = ended.trace
        self.new = tree(place.out)
        assert self.new is not None and not place.partial.exists()

    def reset(self) -> None:
        shutil.rmtree(self.place.here, ignore_errors=True)
        shutil.copytree(self.kept, self.place.here, symlinks=True)

    def play(self, fault: Fault) -> None:
        """One stop, and what must be true after it."""
        place = self.place
        self.reset()
        ended = faults.run(self.scenario.first(place), fault)
        at = min(fault.at, len(self.trace))
        where = f"{fault.how} at {fault.at} of {len(self.trace)} ({self.trace[at - 1]})"
        if fault.how in ("kill", "tear", "lose"):
            assert ended.end == "killed", where
        elif fault.how == "interrupt":
            assert ended.end == "interrupted", where
        else:  # the cleaning up may fail: the checkpoint is there
            assert ended.end == "done" or ended.end.startswith("ConversionError: "), where
        opened = faults.descriptors()
        self.check_whole(where)
        self.finish(where)
        assert tree(place.out) == self.new, where
        assert [path.name for path in place.here.iterdir()] == ["out"], where
        assert faults.descriptors() == opened, where

    def check_whole(self, where: str) -> None:
        """OUT is the old checkpoint or the new one; absent where it was, or put back by verify."""
        place = self.place
        found = tree(place.out)
        aside = tree(place.partial / "old")
        if found is None and aside is None:
            assert self.old is None, where
            return
        assert found in (self.old, self.new) if found else aside == self.old, where
        api.verify(place.out, workers=1)
        assert tree(place.out) == (found or self.old), where

    def finish(self, where: str) -> None:
        place = self.place
        before = tree(place.out)
        journal = read_journal(place.partial / "journal.jsonl")
        replaces = bool(journal) and isinstance(journal[0], Begin) and journal[0].overwrite
        try:
            self.scenario.again(place, "resume")
        except UsageError as error:
            # nothing on record says that OUT may be replaced
            assert before == self.old and before is not None and not replaces, (where, error)
            assert "overwrite=True" in str(error) and tree(place.out) == before, where
            self.scenario.again(place, "overwrite")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SCENARIOS)
def test_stopped_before_any_operation(
    place: Place, name: str, record_property: Callable[[str, object], None]
) -> None:
    case = Case(place, SCENARIOS[name])
    played = 0
    for turn, how in enumerate(get_args(How)):
        points = [
            index
            for index, operation in enumerate(case.trace, 1)
            if how != "tear" or operation in WRITES
        ]
        stride = 1 if FULL else min(STRIDE, max(1, len(points) // 2))
        offset = (list(SCENARIOS).index(name) * 5 + turn * 7) % stride
        for at in points[offset::stride]:
            case.play(Fault(at, how))
            played += 1
    record_property("cases", played)
    assert played >= 4
    print(f"{name}: {len(case.trace)} operations, {played} cases")


@pytest.mark.parametrize("name", ["repack", "repack --overwrite", "restore --overwrite"])
def test_the_operations_are_the_same_every_time(place: Place, name: str) -> None:
    """Or else the n-th of a second run would be another one than that of the first."""
    first, second = (Case(place, SCENARIOS[name]) for _ in range(2))
    assert first.trace == second.trace
    kinds = {"open", "write", "pwrite", "truncate", "fsync", "mkdir", "unlink", "rmdir"}
    assert kinds <= set(first.trace)
    assert ("exchange" if name.endswith("overwrite") else "rename") in first.trace


@pytest.mark.parametrize("seed", range(40 if FULL else 4))
def test_killed_at_any_time_with_four_threads(place: Place, seed: int) -> None:
    """Threads write in any order; time, not a count, says where the run is killed."""
    place.clear()
    an_older_output(place)
    old = tree(place.out)
    chance = random.Random(seed)
    child = os.fork()
    if child == 0:
        faults.torch.set_num_threads(1)
        repack(place.model, place.out, executor=Threads(4), overwrite=True)
        os._exit(0)
    time.sleep(chance.uniform(0, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    new = tree(place.converted)
    assert tree(place.out) in (old, new)
    api.verify(place.out, workers=1)
    try:
        repack(place.model, place.out, executor=Threads(4), resume=True)
    except UsageError:
        assert tree(place.out) == old
        repack(place.model, place.out, executor=Threads(4), overwrite=True)
    assert tree(place.out) == new and not place.partial.exists()
