"""N processes that each make a share of an output, and the joining of them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace
from support import cli, faults
from support.changes import another_conversion, flip
from support.executors import Inline
from support.models import SHARDS, options, plan_of, repack, tree

from ctconvert import api
from ctconvert.errors import ConversionError, UsageError
from ctconvert.records import Shard
from ctconvert.store.local import LocalStore
from ctconvert.work.shares import LOCK, Share, shards_of, share

if TYPE_CHECKING:
    from .conftest import Place

Whole = dict[str, str]


def make(place: Place, index: int, count: int, **more: Any) -> Any:
    return repack(place.model, place.out, share=Share(index, count), **more)


def join(place: Place, **more: Any) -> Any:
    return repack(place.model, place.out, commit=True, **more)


# --- which files are whose ------------------------------------------------------------------------


def least_largest(sizes: list[int], count: int) -> int:
    """By trying every way to cut."""
    if count == 1 or not sizes:
        return sum(sizes)
    return min(
        max(sum(sizes[:cut]), least_largest(sizes[cut:], count - 1))
        for cut in range(len(sizes) + 1)
    )


def test_shares_are_neighbours_and_as_even_as_can_be(small_model: Path) -> None:
    chance, whole = random.Random(5), plan_of(LocalStore(small_model))
    for case in range(60):
        sizes = [chance.randint(1, 9) for _ in range(case % 9)]
        count = chance.randint(1, 5)
        shards = tuple(Shard(str(number), size, ()) for number, size in enumerate(sizes))
        plan = replace(whole, shards=shards)
        found = [shards_of(plan, Share(index, count)) for index in range(1, count + 1)]
        assert [shard for shards in found for shard in shards] == list(plan.shards)
        largest = max(sum(shard.size for shard in shards) for shards in found)
        assert largest == least_largest(sizes, count), (sizes, count)


@pytest.mark.parametrize(("index", "count"), [(0, 2), (3, 2), (1, 0), (1, 100_000)])
def test_what_is_no_share(index: int, count: int) -> None:
    with pytest.raises(UsageError, match="from 1/N to N/N"):
        share(index, count)


# --- made and joined ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, SHARDS, SHARDS + 2])
def test_shares_joined_are_the_bytes_of_one_run(place: Place, whole: Whole, count: int) -> None:
    reports = [make(place, index, count) for index in range(count, 0, -1)]
    assert sum(report.shards for report in reports) == SHARDS
    assert sum(report.modules for report in reports) == 6
    assert [report.part for report in reports] == [f"{i}/{count}" for i in range(count, 0, -1)]
    assert not place.out.exists()
    report = join(place)
    assert report.part is None and report.shards == SHARDS
    assert tree(place.out) == whole and place.is_clean


def test_processes_at_once_one_killed_midway(place: Place, whole: Whole) -> None:
    asked = ["--target", "triton", "--max-shard-size", "15000", "--device", "cpu"]
    command = [sys.executable, "-m", "ctconvert", "repack", str(place.model), str(place.out)]

    def start(index: int, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *asked, "--part", f"{index}/3", "--json", *more],
            env=cli.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    executor = Inline(lambda: os.kill(os.getpid(), signal.SIGKILL), 1)
    killed = faults.run(lambda: make(place, 2, 3, executor=executor))
    assert killed.end == "killed"
    refused = cli.run(*command[3:], *asked, "--part", "2/3")
    assert refused.code == 2 and "--resume to continue" in refused.stderr
    runs = [start(1), start(2, "--resume"), start(3)]
    for index, run in enumerate(runs, 1):
        out, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
        assert f'"part":"{index}/3"' in out.replace(" ", "")
    done = cli.run(*command[3:], *asked, "--commit")
    assert done.code == 0 and "verified" in done.stdout, done.stderr
    assert tree(place.out) == whole and place.is_clean


def test_a_share_begins_while_one_looks(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any look at what is there, its folder is there, at first without a lock."""
    other, listed = place.partial / Share(3, 3).folder, Path.iterdir

    def look(folder: Path) -> Iterator[Path]:
        found = list(listed(folder))
        if folder == place.partial:
            if other.is_dir():
                (other / LOCK).touch()
            other.mkdir(exist_ok=True)
        return iter(found)

    place.partial.mkdir()
    monkeypatch.setattr(Path, "iterdir", look)
    make(place, 1, 3)
    assert (other / LOCK).exists()


def test_a_finished_part_is_not_made_twice(place: Place, whole: Whole) -> None:
    make(place, 1, 2)
    with pytest.raises(UsageError, match=r"unfinished.*resume=True"):
        make(place, 1, 2)
    again = Inline()
    make(place, 1, 2, executor=again, resume=True)
    assert again.wrote == []
    make(place, 2, 2, resume=True)
    join(place, verify=False)
    assert tree(place.out) == whole


def test_each_source_file_is_hashed_once(place: Place) -> None:
    hashed: list[str] = []
    for index in (1, 2, 3):
        executor = Inline()
        make(place, index, 3, executor=executor)
        hashed += [job.name for job in executor.ran if job.name.endswith(".safetensors")]
    assert sorted(hashed) == sorted(path.name for path in place.model.glob("*.safetensors"))


# --- what cannot be joined ------------------------------------------------------------------------


def refused(place: Place, message: str, **more: Any) -> None:
    """The joining is, in one line, and nothing is changed."""
    before = tree(place.partial)
    with pytest.raises(UsageError, match=message) as error:
        join(place, **more)
    assert "\n" not in str(error.value)
    after = tree(place.partial)
    assert {n: h for n, h in (after or {}).items() if not n.endswith("lock")} == {
        n: h for n, h in (before or {}).items() if not n.endswith("lock")
    }


def test_a_missing_and_an_unfinished_part_are_named(place: Place, whole: Whole) -> None:
    refused(place, "holds no parts")
    make(place, 1, 3)
    refused(place, "part 2/3 is missing")
    executor = Inline(lambda: os.kill(os.getpid(), signal.SIGKILL), 1)
    assert faults.run(lambda: make(place, 2, 3, executor=executor)).end == "killed"
    make(place, 3, 3)
    refused(place, "part 2/3 is unfinished, 0 of 1 files")
    make(place, 2, 3, resume=True)
    join(place)
    assert tree(place.out) == whole


def test_a_part_of_other_options(place: Place) -> None:
    make(place, 1, 2)
    make(place, 2, 2, asked=options(max_shard_size=15_001))
    refused(place, "part 2/2 was made with other options")
    with pytest.raises(UsageError, match="other options"):
        make(place, 2, 2, resume=True)
    make(place, 2, 2, overwrite=True)
    join(place)


def test_parts_of_other_counts(place: Place) -> None:
    make(place, 1, 2)
    with pytest.raises(UsageError, match="holds parts of 2, and this is part 1/3"):
        make(place, 1, 3)
    shutil.copytree(place.partial / Share(1, 2).folder, place.partial / Share(1, 3).folder)
    refused(place, "holds parts of 2 and of 3")


def test_the_source_changed_between(place: Place) -> None:
    make(place, 1, 2)
    flip(place.model / "model-00001-of-00002.safetensors")
    make(place, 2, 2)
    refused(place, r"part 1/2 was made of another source: model-00001-of-00002\.safetensors")
    make(place, 1, 2, resume=True)
    join(place)
    api.verify(place.out, against=place.model, workers=1)


def test_the_source_changes_while_a_part_is_made(place: Place) -> None:
    make(place, 1, 2)
    executor = Inline(lambda: flip(place.model / "model-00002-of-00002.safetensors"), 1)
    with pytest.raises(ConversionError, match="changed while it was being converted"):
        make(place, 2, 2, executor=executor)
    refused(place, "part 1/2 was made of another source")
    assert not (place.partial / Share(2, 2).folder).exists()


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: os.truncate(path, 99)])
def test_a_file_that_is_gone_is_told_of_its_part(
    place: Place, whole: Whole, harm: Callable[[Any], object]
) -> None:
    for index in (1, 2):
        make(place, index, 2)
    (path,) = (place.partial / Share(2, 2).folder / "checkpoint").iterdir()
    harm(path)
    refused(place, f"part 2/2 lacks {path.name}", verify=False)
    make(place, 2, 2, resume=True)
    join(place)
    assert tree(place.out) == whole


def test_damage_is_found_and_only_that_part_is_made_again(place: Place, whole: Whole) -> None:
    for index in (1, 2):
        make(place, index, 2)
    (path,) = (place.partial / Share(2, 2).folder / "checkpoint").iterdir()
    flip(path)
    with pytest.raises(Exception, match="damaged"):
        join(place)
    for _ in range(2):
        with pytest.raises(UsageError, match="part 2/2 lacks"):
            join(place)
    with pytest.raises(UsageError, match=r"being joined.*overwrite=True"):
        make(place, 2, 2, resume=True)
    make(place, 2, 2, overwrite=True)
    join(place)
    assert tree(place.out) == whole and place.is_clean


# --- beside other runs ----------------------------------------------------------------------------


def test_a_part_is_locked_and_others_are_not(place: Place, whole: Whole) -> None:
    def meanwhile() -> None:
        with pytest.raises(UsageError, match="being written by another run"):
            make(place, 1, 2, resume=True)
        make(place, 2, 2)
        with pytest.raises(UsageError, match="part 1/2 is being written by another run"):
            join(place)

    make(place, 1, 2, executor=Inline(meanwhile, 1))
    join(place)
    assert tree(place.out) == whole


def test_all_and_parts_of_it_are_not_mixed(place: Place) -> None:
    make(place, 1, 2)
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UsageError, match=r"holds parts of a conversion; join them"):
            repack(place.model, place.out, **flags)
    shutil.rmtree(place.partial)
    place.killed()
    with pytest.raises(UsageError, match="a conversion that is not in parts"):
        make(place, 1, 2, resume=True)


def test_what_is_not_ours_is_in_the_way(place: Place) -> None:
    place.partial.mkdir()
    (place.partial / "mine").write_text("x")
    with pytest.raises(UsageError, match="in the way"):
        make(place, 1, 2)
    with pytest.raises(UsageError, match="holds no parts"):
        join(place)
    assert tree(place.partial) is not None and (place.partial / "mine").exists()


def test_an_output_is_replaced_if_it_is_told(place: Place, whole: Whole) -> None:
    another_conversion(place.out)
    old = tree(place.out)
    with pytest.raises(UsageError, match="exists"):
        make(place, 1, 2)
    for index in (1, 2):
        make(place, index, 2, overwrite=True)
    refused(place, "exists")
    assert tree(place.out) == old
    join(place, overwrite=True)
    assert tree(place.out) == whole and place.is_clean


def test_done_is_done(place: Place, whole: Whole) -> None:
    """An array of jobs that is run again, and a joining that is."""
    for index in (1, 2):
        make(place, index, 2)
    join(place)
    again = Inline()
    make(place, 1, 2, resume=True, executor=again)
    join(place, executor=again)
    assert again.wrote == [] and tree(place.out) == whole and place.is_clean


def test_what_contradicts_itself(place: Place) -> None:
    with pytest.raises(UsageError, match="contradict"):
        make(place, 1, 2, commit=True)
    with pytest.raises(UsageError, match="whole output"):
        api.repack(place.model, place.out, target="triton", part=(1, 2), push_to="a/b")
    for text in ("2", "1/", "a/b", "0/2", "3/2"):
        found = cli.run("repack", place.model, place.out, "-t", "triton", "--part", text)
        assert found.code == 2 and "I/N" in found.stderr
