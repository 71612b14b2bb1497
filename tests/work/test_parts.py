"""Stacks of experts are made in parts: every worker has some, and a kill loses few."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import faults
from support.executors import Inline, Processes
from support.folders import quick_folder
from support.models import (
    EXPERT_MATRIX,
    EXPERTS,
    options,
    plan_of,
    repack,
    restore,
    tree,
    write_experts,
)

from ctconvert import api
from ctconvert.errors import ConversionError, VerificationError
from ctconvert.output import Output
from ctconvert.store.local import LocalStore
from ctconvert.work import parts
from ctconvert.work.executors import Threads
from ctconvert.work.jobs import Context, PartJob
from ctconvert.work.journal import PartDone, Piece, ShardDone, read_journal
from ctconvert.work.parts import Pieces, SealJob, jobs_of, part_of
from ctconvert.work.transforming import CompareJob, ConvertJob, RestoreJob

#: The first stack's tensors fill a shard, and so do the second's.
ASKED = options(target="cuda", fuse=True, max_shard_size=60_000)


@pytest.fixture(autouse=True)
def two_experts_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """14 kB are the sources of two experts' gate and up."""
    monkeypatch.setattr(parts, "GRAIN", 4 * EXPERT_MATRIX + 100)


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


@pytest.fixture(params=[False, True], ids=["one by one", "3-D"])
def model(request: pytest.FixtureRequest, folder: Path) -> Path:
    return write_experts(folder / "model", request.param)


def cut(jobs: list[Any]) -> list[tuple[str, int, int]]:
    return [
        key
        for job in jobs
        if isinstance(job, PartJob) and (key := part_of(job)) and job.units != range(job.count)
    ]


def whole(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files of a conversion whose stacks are one job each."""
    with monkeypatch.context() as patch:
        patch.setattr(parts, "GRAIN", 1 << 40)
        executor = Inline()
        repack(model, out, asked=ASKED, executor=executor)
        assert not cut(executor.ran)
    found = tree(out)
    assert found is not None
    return found


def same_tensors(a: Path, b: Path) -> None:
    left, right = ({}, {})
    for found, where in ((left, a), (right, b)):
        for path in where.glob("*.safetensors"):
            found |= load_file(path)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_parts_give_the_bytes_of_the_whole(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(model, folder / "whole", monkeypatch)
    for name, workers in (("out", 1), ("again", 4)):
        executor = Inline() if workers == 1 else Threads(workers)
        repack(model, folder / name / "whole", asked=ASKED, executor=executor)
        assert tree(folder / name / "whole") == expected
        if isinstance(executor, Inline):
            keys = cut(executor.ran)
            assert keys
            for stack in {key[0] for key in keys}:
                ranges = [key[1:] for key in keys if key[0] == stack]
                assert len(ranges) > 1
                assert [first for first, _ in ranges] == [0] + [last for _, last in ranges[:-1]]
                assert ranges[-1][1] == EXPERTS
    out = folder / "out" / "whole"
    api.verify(out, against=model, workers=2)
    executor = Inline()
    restore(out, folder / "back", executor=executor)
    assert cut([job for job in executor.ran if isinstance(job, RestoreJob)])
    same_tensors(model, folder / "back")


def test_parts_in_other_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_experts(folder / "model")
    expected = whole(model, folder / "out", monkeypatch)
    processes = Processes(2)
    repack(model, folder / "b" / "out", asked=ASKED, executor=processes)
    processes.close()
    assert tree(folder / "b" / "out") == expected


@pytest.mark.parametrize("after", [2, 4, 6])
def test_a_kill_in_the_middle_of_a_stack(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """What the journal says is finished is not done again, and the bytes are the same."""
    expected = whole(model, folder / "whole" / "out", monkeypatch)
    out = folder / "out"
    executor = Inline(lambda: os.kill(os.getpid(), signal.SIGKILL), after)
    ended = faults.run(lambda: repack(model, out, asked=ASKED, executor=executor))
    assert ended.end == "killed" and not out.exists()
    journal = read_journal(folder / "out.partial" / "journal.jsonl")
    done = {(e.item, e.first, e.last) for e in journal if isinstance(e, PartDone)}
    assert done
    again = Inline()
    repack(model, out, asked=ASKED, executor=again, resume=True)
    assert tree(out) == expected
    keys = cut([job for job in again.ran if isinstance(job, ConvertJob)])
    finished = {e.name for e in journal if isinstance(e, ShardDone)}
    plan = plan_of(LocalStore(model), ASKED)
    left = {
        key
        for item in plan.modules
        if item.made[0].file not in finished
        for key in cut(jobs_of(item))
    }
    assert set(keys) == left - done and len(keys) == len(set(keys))


def test_a_kill_in_the_middle_of_restoring(model: Path, folder: Path) -> None:
    converted, back = folder / "converted", folder / "back"
    repack(model, converted, asked=ASKED)
    restore(converted, folder / "whole" / "back", max_shard_size=60_000)
    executor = Inline(lambda: os.kill(os.getpid(), signal.SIGKILL), 3)
    faults.run(lambda: restore(converted, back, max_shard_size=60_000, executor=executor))
    again = Inline()
    restore(converted, back, max_shard_size=60_000, executor=again, resume=True)
    assert tree(back) == tree(folder / "whole" / "back")
    same_tensors(model, back)
    assert len(cut(again.ran)) < sum(
        len(cut(jobs_of(item))) for item in Output.open(back).plan.items
    )


def test_a_part_that_changed_since_is_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_experts(folder / "model")
    expected = whole(model, folder / "whole" / "out", monkeypatch)
    out = folder / "out"
    executor = Inline(lambda: os.kill(os.getpid(), signal.SIGKILL), 2)
    faults.run(lambda: repack(model, out, asked=ASKED, executor=executor))
    journal = read_journal(folder / "out.partial" / "journal.jsonl")
    first, second = (entry for entry in journal if isinstance(entry, PartDone))
    plan = plan_of(LocalStore(model), ASKED)
    name, piece = next(iter(second.pieces.items()))
    entry = plan.entries[name]
    with (folder / "out.partial" / "checkpoint" / entry.file).open("r+b") as file:
        file.seek(entry.offset + piece.start + piece.length - 1)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    again = Inline()
    repack(model, out, asked=ASKED, executor=again, resume=True)
    keys = cut([job for job in again.ran if isinstance(job, ConvertJob)])
    assert (second.item, second.first, second.last) in keys
    assert (first.item, first.first, first.last) not in keys
    assert tree(out) == expected


def test_another_cut_takes_over_nothing_that_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_experts(folder / "model")
    expected = whole(model, folder / "whole" / "out", monkeypatch)
    out = folder / "out"
    executor = Inline(lambda: os.kill(os.getpid(), signal.SIGKILL), 3)
    faults.run(lambda: repack(model, out, asked=ASKED, executor=executor))
    monkeypatch.setattr(parts, "GRAIN", 30_000)
    repack(model, out, asked=ASKED, resume=True)
    assert tree(out) == expected


def test_a_piece_that_reads_back_as_something_else_is_an_error(folder: Path) -> None:
    """Between the write and the hash of the whole."""
    model = write_experts(folder / "model")

    class Spoiling(Inline):
        def run(self, jobs: Any, context: Context) -> Any:
            for job in jobs:
                if isinstance(job, SealJob):
                    path = folder / "out.partial" / "checkpoint" / job.entry.file
                    with path.open("r+b") as file:
                        file.seek(job.entry.offset)
                        file.write(b"\x5a\xa5")
                yield job.run(context)

    with pytest.raises(ConversionError, match=r"w2_qweight in .*reads back as other bytes"):
        repack(model, folder / "out", asked=ASKED, executor=Spoiling())
    assert not (folder / "out").exists()


def test_pieces_are_sealed_in_order_when_all_are_there() -> None:
    from ctconvert.specs import TensorSpec
    from ctconvert.store.safetensors import TensorEntry

    entry = TensorEntry("x", "f", 100, TensorSpec("I32", (3, 2)))
    made = [Piece(start, 8, "0" * 64) for start in (8, 0, 16)]
    pieces = Pieces()
    assert pieces.add(entry, made[0]) is None and pieces.add(entry, made[1]) is None
    assert pieces.add(entry, made[2]) == SealJob(entry, (made[1], made[0], made[2]))


def test_a_comparison_is_cut_too(folder: Path) -> None:
    model = write_experts(folder / "model")
    out = folder / "out"
    repack(model, out, asked=ASKED)
    from ctconvert.store.checkpoint import Checkpoint
    from ctconvert.work.verify import _comparisons

    jobs = _comparisons(Output.open(out), Checkpoint(LocalStore(model)))
    compared = [job for job in jobs if isinstance(job, CompareJob)]
    assert len(compared) == 4 + 2  # of two and of four experts
    # an expert of the last part, changed: it is named
    outputs = [entry for job in compared for entry in job.item.outputs]
    entry = next(entry for entry in outputs if entry.name.endswith("w13_scales"))
    with (out / entry.file).open("r+b") as file:
        file.seek(entry.offset + 6 * entry.nbytes // EXPERTS)
        file.write(b"\x80\x3f")
    jobs = _comparisons(Output.open(out), Checkpoint(LocalStore(model)))
    with pytest.raises(
        VerificationError, match=r"experts\.w13 \(expert 6\): scale of .*6\.gate_proj"
    ):
        for job in jobs:
            job.run(Context(LocalStore(out), against=LocalStore(model)))
