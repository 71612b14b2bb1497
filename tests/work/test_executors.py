"""A job needs its own records and two stores, and gives the same bytes wherever it runs."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from support.executors import Inline, Processes
from support.models import plan_of, repack, restore, tree, write_model
from support.stores import MemorySink, MemoryStore, files_of

from ctconvert import api
from ctconvert.errors import ConversionError
from ctconvert.output import Output
from ctconvert.progress import Silent
from ctconvert.store.checkpoint import Checkpoint
from ctconvert.store.local import LocalStore
from ctconvert.store.writer import LocalSink
from ctconvert.transforms.threads import stay_in_thread
from ctconvert.work.budget import CancelledError
from ctconvert.work.executors import Executor, Threads
from ctconvert.work.jobs import Context, Done, HashJob, Job
from ctconvert.work.parts import jobs_of
from ctconvert.work.verify import verify_against, verify_output

if TYPE_CHECKING:
    from .conftest import Place

Whole = dict[str, str]


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_threads_give_the_same_bytes(
    place: Place, whole: Whole, restored: Whole, workers: int
) -> None:
    repack(place.model, place.out, executor=Threads(workers))
    assert tree(place.out) == whole
    converted = place.folder / "converted"
    place.out.rename(converted)
    restore(converted, place.out, executor=Threads(workers))
    assert tree(place.out) == restored


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    pool = Processes(2)
    yield pool
    pool.close()


def test_processes_give_the_same_bytes(
    place: Place, whole: Whole, restored: Whole, processes: Processes
) -> None:
    repack(place.model, place.out, executor=processes)
    assert tree(place.out) == whole
    converted = place.folder / "converted"
    place.out.rename(converted)
    restore(converted, place.out, executor=processes)
    assert tree(place.out) == restored
    output, source = Output.open(converted), Checkpoint(LocalStore(place.model))
    verify_output(output, processes, Silent())
    assert verify_against(output, source, processes, Silent()).modules == 6


def test_an_error_in_another_process_is_the_same_error(place: Place, processes: Processes) -> None:
    converted = place.folder / "converted"
    repack(place.model, converted)
    shard = converted / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    output = Output.open(converted)
    with pytest.raises(Exception) as here:
        verify_output(output, Inline(), Silent())
    with pytest.raises(type(here.value)) as there:
        verify_output(output, processes, Silent())
    assert str(there.value) == str(here.value)


def test_jobs_stores_and_sinks_are_data(place: Place, tmp_path: Path) -> None:
    store = LocalStore(place.model)
    plan = plan_of(store)
    for job in (job for item in plan.items for job in jobs_of(item)):
        assert pickle.loads(pickle.dumps(job)) == job
    again = pickle.loads(pickle.dumps(store))
    assert again.sizes() == store.sizes() and again.where == store.where
    name = "tokenizer.json"
    assert again.fingerprint(name) == store.fingerprint(name)
    sink = LocalSink(tmp_path)
    sink.create("x", b"head", 8)
    pickle.loads(pickle.dumps(sink)).write("x", 4, memoryview(b"tail"))
    assert (tmp_path / "x").read_bytes() == b"headtail"


def test_jobs_know_nothing_of_files(place: Place, whole: Whole) -> None:
    """From memory to memory: what a shard holds is in its header and in its jobs."""
    store = MemoryStore(files_of(LocalStore(place.model)))
    plan, sink = plan_of(store), MemorySink()
    for shard in plan.shards:
        sink.create(shard.name, plan.header(shard), shard.size)
    for job in (job for item in plan.items for job in jobs_of(item)):
        job.run(Context(store, sink))
    repack(place.model, place.out)
    for shard in plan.shards:
        assert bytes(sink.files[shard.name]) == (place.out / shard.name).read_bytes()


# --- what every executor must do -----------------------------------------------------------------


@dataclass(frozen=True)
class Task(Job):
    """A job that does what it is told."""

    name: str
    seconds: float = 0.0
    error: Exception | None = None

    def run(self, context: Context) -> Done:
        context.check_running()
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return Done(self, {self.name: "0"})


EXECUTORS = [Inline(), Threads(1), Threads(4)]


@pytest.fixture
def context() -> Context:
    return Context(MemoryStore({"file": b"abc"}))


@pytest.mark.parametrize("executor", EXECUTORS, ids=["inline", "one thread", "four threads"])
def test_every_job_is_run_once(executor: Executor, context: Context) -> None:
    jobs = [Task(str(number)) for number in range(50)]
    done = [item.job.name for item in executor.run(jobs, context)]
    assert sorted(done, key=int) == [job.name for job in jobs]
    assert list(executor.run([], Context(context.source))) == []


@pytest.mark.parametrize("executor", EXECUTORS, ids=["inline", "one thread", "four threads"])
def test_the_first_error_stops_the_others_and_is_raised(
    executor: Executor, context: Context
) -> None:
    drawn = []

    def jobs() -> Iterator[Task]:
        for number in range(1000):
            drawn.append(number)
            yield Task(str(number), error=ConversionError("no") if number == 3 else None)

    with pytest.raises(ConversionError, match="no"):
        list(executor.run(jobs(), context))
    assert len(drawn) < 100
    with pytest.raises(CancelledError):
        context.check_running()


@pytest.mark.parametrize("executor", EXECUTORS, ids=["inline", "one thread", "four threads"])
def test_jobs_are_drawn_little_ahead_of_the_work(executor: Executor, context: Context) -> None:
    """A job may be made at the moment it is drawn: a file is created for it then."""
    drawn = []

    def jobs() -> Iterator[Task]:
        for number in range(40):
            drawn.append(number)
            yield Task(str(number), 0.001)

    running = executor.run(jobs(), context)
    for done, _ in enumerate(running, 1):
        assert len(drawn) - done <= 2 * 4 + 1


def test_threads_have_ended_when_a_run_is_given_up(context: Context) -> None:
    before = threading.active_count()
    running = Threads(4).run((Task(str(number), 0.01) for number in range(100)), context)
    next(running)
    running.close()
    assert threading.active_count() == before


def test_a_hash_that_is_expected_is_checked(context: Context) -> None:
    digest = HashJob("file", "file", 0, 3).run(context).hashes["file"]
    HashJob("file", "file", 0, 3, digest).run(context)
    with pytest.raises(Exception, match="the file: damaged"):
        HashJob("file", "file", 0, 2, digest, "the file").run(context)


def test_a_report_says_what_was_done(place: Place) -> None:
    report = api.repack(place.model, place.out, target="triton", workers=2)
    assert report.modules == 6 and report.layouts == {"triton-wna16": 6}
    assert report.copied_tensors == 2 and report.resumed_shards == 0
    assert set(report.side_files) == {"templates/chat.jinja", "tokenizer.json"}
    assert report.output_bytes == sum(p.stat().st_size for p in place.out.glob("*.safetensors"))
    back = api.restore(place.out, place.folder / "converted", workers=2)
    assert back.modules == 6 and back.target is None and back.kept == ()


def test_one_source_and_one_set_of_options_give_one_output(tmp_path: Path, whole: Whole) -> None:
    """Whatever the folder lies in, and whenever it is made."""
    model = write_model(tmp_path / "elsewhere" / "model")
    repack(model, tmp_path / "another name", executor=Threads(3))
    assert tree(tmp_path / "another name") == whole


@dataclass(frozen=True)
class Counting(Job):
    """Says how many threads torch has, once it stays in its own."""

    name: str = "counting"

    def run(self, context: Context) -> Done:
        before = torch.get_num_threads()
        stay_in_thread()
        return Done(self, {"before": str(before), "after": str(torch.get_num_threads())})


def test_workers_have_one_thread_each_and_leave_the_others_theirs() -> None:
    own = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        stay_in_thread()  # the main thread has its own
        assert torch.get_num_threads() == 3
        jobs = [Counting() for _ in range(4)]
        made = list(Threads(2).run(jobs, Context(MemoryStore({}))))
        assert {done.hashes["after"] for done in made} == {"1"}
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(own)


def test_no_lock_of_a_worker_is_taken_in_the_callers_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal there, just after it was taken, would leave the worker waiting for ever."""
    from concurrent.futures import _base

    def taken(self: object) -> None:
        raise AssertionError("futures are waited for")

    monkeypatch.setattr(_base._AcquireFutures, "__enter__", taken)  # type: ignore[attr-defined]
    jobs = [HashJob(str(place), "a", 0, 1) for place in range(20)]
    store = MemoryStore({"a": b"x"})
    assert len(list(Threads(2).run(jobs, Context(store)))) == 20
