"""The same plan on a Ray cluster of two nodes; skipped where Ray is not installed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import cli
from support.models import repack, tree
from support.paths import ROOT
from support.stores import MemoryStore

from ctconvert import api
from ctconvert.errors import ConversionError, CtconvertError, UsageError, VerificationError
from ctconvert.output import Output
from ctconvert.progress import Progress, Silent
from ctconvert.store.local import LocalStore
from ctconvert.work.cluster import Ray
from ctconvert.work.jobs import Context, Done, Job
from ctconvert.work.journal import read_journal
from ctconvert.work.verify import verify_output

if TYPE_CHECKING:
    from .conftest import Place

ray = pytest.importorskip("ray")
Whole = dict[str, str]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores, and two nodes; each has room for the workers of two runs."""
    from ray.cluster_utils import Cluster

    changed = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "RAY_USAGE_STATS_ENABLED": "0"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        made.add_node(num_cpus=2, object_store_memory=80 << 20)
    yield made
    ray.shutdown()
    made.shutdown()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def executor(cluster: Any) -> Ray:
    return Ray(cluster.address, 1, "cpu")


class Told(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.bytes = 0

    def advance(self, count: int) -> None:
        self.bytes += count

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass(frozen=True)
class Where(Job):
    """Says where it runs; takes its time, or what carries it with it."""

    name: str
    file: str | None = None
    seconds: float = 0.0
    once: str | None = None
    error: Exception | None = None

    @property
    def writes(self) -> str | None:
        return self.file

    def run(self, context: Context) -> Done:
        if self.error is not None:
            raise self.error
        if self.once is not None and not Path(self.once).exists():
            Path(self.once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            context.check_running()
            time.sleep(0.01)
        return Done(self, {self.name: str(os.getpid())})


def context_of(folder: Path, **more: Any) -> Context:
    return Context(LocalStore(folder), **more)


def test_a_cluster_gives_the_same_bytes(place: Place, whole: Whole, executor: Ray) -> None:
    told = Told()
    report = repack(place.model, place.out, executor=executor, progress=told)
    assert tree(place.out) == whole and place.is_clean
    assert told.bytes >= 2 * (report.output_bytes - 3 * 4096)  # headers apart; made, and verified


def test_files_have_one_machine_each_and_both_work(tmp_path: Path, executor: Ray) -> None:
    jobs = [Where(f"{n}", f"file {n // 5}", 0.05) for n in range(40)]
    found: dict[str, set[str]] = {}
    for done in executor.run(jobs, context_of(tmp_path)):
        assert done.job in jobs
        found.setdefault(str(done.job.writes), set()).update(done.hashes.values())
    assert len(found) == 8 and all(len(places) == 1 for places in found.values())
    assert len(set.union(*found.values())) == 2


def test_a_lost_worker_is_replaced(tmp_path: Path, executor: Ray) -> None:
    told = Told()
    jobs = [Where(f"{n}", f"file {n // 5}", 0.02) for n in range(20)]
    jobs[7] = Where("7", "file 1", once=str(tmp_path / "died"))
    done = [item.job.name for item in executor.run(jobs, context_of(tmp_path, progress=told))]
    assert sorted(done, key=int) == [job.name for job in jobs]
    assert "was lost" in told.notes[0]


def test_a_job_that_kills_its_worker_is_told_of(tmp_path: Path, executor: Ray) -> None:
    jobs = [Deadly("deadly")]
    with pytest.raises(ConversionError, match="deadly: lost with its worker 3 times"):
        list(executor.run(jobs, context_of(tmp_path)))


@dataclass(frozen=True)
class Deadly(Job):
    name: str

    def run(self, context: Context) -> Done:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_the_first_error_stops_the_others_and_is_raised(tmp_path: Path, executor: Ray) -> None:
    jobs = [Where("long", seconds=60), Where("wrong", error=ConversionError("no", file="f"))]
    before = time.monotonic()
    with pytest.raises(ConversionError, match="no") as error:
        list(executor.run(jobs, context_of(tmp_path)))
    assert error.value.file == "f" and time.monotonic() - before < 30


def test_damage_is_told_as_it_is_here(place: Place, executor: Ray) -> None:
    repack(place.model, place.out)
    shard = place.out / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VerificationError, match="damaged"):
        verify_output(Output.open(place.out), executor, Silent())


def test_an_actor_that_outlives_its_run_writes_nothing(place: Place, executor: Ray) -> None:
    from ctconvert.store.writer import LocalSink

    folder = place.folder / "converted"
    folder.mkdir()
    context = context_of(place.model, sink=LocalSink(folder))

    def jobs() -> Iterator[Job]:
        yield Where("first")
        folder.rename(place.folder / "out")
        folder.mkdir()
        yield Where("second", seconds=0.1)

    with pytest.raises(Exception) as error:
        list(executor.run(jobs(), context))
    assert type(error.value).__name__ == "CancelledError"


def test_a_node_killed_midway(place: Place, whole: Whole, cluster: Any, executor: Ray) -> None:
    class Killing(Told):
        def advance(self, count: int) -> None:
            """At the first result: the node of a worker that is at work."""
            if count and not self.bytes:
                seat = next(seat for seat in executor._seats if seat.running)
                (node,) = (node for node in cluster.worker_nodes if node.node_id == seat.node)
                cluster.remove_node(node, allow_graceful=False)
            super().advance(count)

    cluster.add_node(num_cpus=2, object_store_memory=80 << 20)  # beside which one goes
    told = Killing()
    repack(place.model, place.out, executor=executor, progress=told)
    assert tree(place.out) == whole and place.is_clean
    assert "was lost" in told.notes[0]


def test_the_command_killed_and_resumed(place: Place, whole: Whole, cluster: Any) -> None:
    asked = [
        *("repack", str(place.model), str(place.out), "--target", "triton", "--device", "cpu"),
        *("--max-shard-size", "15000", "--executor", "ray", "--address", cluster.address),
    ]
    run = subprocess.Popen(
        [sys.executable, "-m", "ctconvert", *asked],
        env=os.environ | cli.environment(),
        stderr=subprocess.PIPE,
    )
    until = time.monotonic() + 90
    while len(read_journal(place.journal)) < 3 and time.monotonic() < until and run.poll() is None:
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert run.returncode == -signal.SIGKILL and not place.out.exists()
    again = cli.program(*asked, "--resume")
    assert again.returncode == 0, again.stderr
    assert tree(place.out) == whole and place.is_clean


def test_what_cannot_be(place: Place, cluster: Any) -> None:
    with pytest.raises(UsageError, match="threads or ray"):
        api.repack(place.model, place.out, target="triton", executor="slurm")
    with pytest.raises(UsageError, match="directory on storage that every node sees"):
        api.repack("org/name", place.out, target="triton", executor="ray", address=cluster.address)
    with pytest.raises(UsageError, match="no cluster is started"):
        Ray("local", None, "cpu")
    with pytest.raises(UsageError, match="no node of the cluster"):
        Ray(cluster.address, None, "cuda")
    with pytest.raises(CtconvertError, match="storage that every node sees"):
        list(Ray(cluster.address, 1, "cpu").run([], Context(MemoryStore({}))))
