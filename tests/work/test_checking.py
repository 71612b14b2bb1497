"""Reading back: every tensor once, those of finished shards while others are made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.changes import flip, replaced_unseen, rewritten_unseen
from support.executors import Inline
from support.models import repack, tree

from ctconvert.errors import VerificationError
from ctconvert.output import Output
from ctconvert.work.executors import Threads
from ctconvert.work.jobs import HashJob

if TYPE_CHECKING:
    from .conftest import Place


def reads(executor: Inline) -> list[HashJob]:
    """What was read of the output, in order."""
    return [job for job in executor.ran if isinstance(job, HashJob) and job.expected is not None]


def test_every_tensor_is_read_back_once(place: Place, whole: dict[str, str]) -> None:
    executor = Inline()
    repack(place.model, place.out, executor=executor)
    assert tree(place.out) == whole
    plan = Output.open(place.out).plan
    found = Counter(job.name for job in reads(executor) if job.name in plan.entries)
    assert found == dict.fromkeys(plan.entries, 1)
    made = [job.file for job in reads(executor) if job.made]
    first, last = plan.shards[0], plan.shards[-1]
    assert made.count(first.name) == len(first.tensors)
    assert last.name not in made
    ahead = [isinstance(job, HashJob) and job.made for job in executor.ran].index(True)
    assert any(not isinstance(job, HashJob) for job in executor.ran[ahead:])


def test_without_verifying_nothing_is_read_back(place: Place) -> None:
    executor = Inline()
    repack(place.model, place.out, executor=executor, verify=False)
    assert not reads(executor)


@pytest.mark.parametrize("threads", [False, True], ids=["inline", "threads"])
def test_a_shard_that_is_damaged_on_the_disk(place: Place, threads: bool) -> None:
    """It is found while others are made, and again where the run is taken up."""

    def damage() -> None:
        shard = place.finished()[0]
        flip(place.built / shard, -1)

    with pytest.raises(VerificationError, match="damaged: its bytes have changed"):
        repack(place.model, place.out, executor=Inline(damage, 4))
    assert not place.out.exists()
    executor = Threads(3) if threads else Inline()
    repack(place.model, place.out, executor=executor, resume=True)
    assert place.is_clean


@pytest.mark.parametrize("change", [flip, replaced_unseen, rewritten_unseen])
def test_a_shard_that_changes_after_it_was_read_back(
    place: Place, change: Callable[[Path], None]
) -> None:
    """It is read again, with what was not read yet."""

    def damage() -> None:
        first = place.finished()[0]
        read = {job.name for job in reads(executor) if job.file == first}
        assert len(read) == 6
        change(place.built / first)

    executor = Inline(damage, 7)
    with pytest.raises(VerificationError, match="damaged: its bytes have changed"):
        repack(place.model, place.out, executor=executor)
    assert not place.out.exists()
