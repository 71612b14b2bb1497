"""Runs jobs on a Ray cluster that is there already.

Every node has an actor, or one for each of its GPUs, whose threads run jobs as :class:`Threads`
does. All jobs that write one output file go to one actor: network file systems write whole pages,
and of two machines that write parts of one page the later undoes what the earlier wrote. What an
actor wrote is on the storage before its job counts as done. A job whose actor is lost is run again
by another, and writes the same bytes to the same place.

Actors need what the jobs need: this package in the same version, and source and output under the
paths that they have here. Only the process that calls makes files, keeps the journal and commits.
"""

from __future__ import annotations

import copy
import pickle
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

from ctconvert.errors import ConversionError, UsageError
from ctconvert.progress import Progress
from ctconvert.store.base import Store
from ctconvert.store.local import LocalStore
from ctconvert.store.writer import LocalSink, Sink
from ctconvert.version import __version__
from ctconvert.work.budget import CancelledError
from ctconvert.work.executors import Executor
from ctconvert.work.jobs import Context, Done, Job

#: Threads of an actor, at most, where nobody says how many; more do not help one disk.
_MOST_THREADS = 8
#: Seconds to wait for the first actor, and for jobs to end that are stopped.
_PATIENCE = 120.0
#: How often a job is given to an actor before it is to blame for their loss.
_MOST_TRIES = 3
#: Jobs that wait for one actor, at most.
_MOST_WAITING = 256


@dataclass(frozen=True)
class _Shared:
    """What the jobs of one run share, as it is sent to actors; see :class:`Context`.

    ``place`` is the inode of the sink's directory: an actor that outlives its run must not write
    into what another has put in its place.
    """

    source: Store
    sink: Sink | None
    against: Store | None
    device: str
    memory: int
    place: int | None


@dataclass(frozen=True)
class _Outcome:
    """What came of a job: its result, or its error; and the bytes that it told of."""

    hashes: dict[str, str] = field(default_factory=dict)
    pieces: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None
    bytes: int = 0


class _Counted(Progress):
    """Adds up what a job tells."""

    def __init__(self) -> None:
        self.bytes = 0

    def advance(self, count: int) -> None:
        self.bytes += count


class _Actor:
    """Runs jobs on a node; its methods are called by several threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._contexts: dict[int, Context] = {}

    def version(self) -> str:
        return __version__

    def run(self, number: int, sent: bytes, job: Job) -> _Outcome:
        """A job of the ``number``-th run. Stores are opened anew, to see what others wrote."""
        counted = _Counted()
        shared: _Shared = pickle.loads(sent)
        sink = shared.sink
        try:
            context = copy.copy(self._context(number, shared))
            context.source, context.against = shared.source, shared.against
            context.sink, context.progress = sink, counted
            if isinstance(sink, LocalSink) and sink.root.stat().st_ino != shared.place:
                raise CancelledError
            done = job.run(context)
            if isinstance(sink, LocalSink):
                sink.finish_all()
            return _Outcome(done.hashes, done.pieces, bytes=counted.bytes)
        except Exception as error:  # noqa: BLE001 (raised where it is told)
            return _Outcome(error=error)
        finally:
            if isinstance(sink, LocalSink):
                sink.close()
            for store in (shared.source, shared.against):
                if store is not None:
                    store.close()

    def _context(self, number: int, shared: _Shared) -> Context:
        """What is one for all jobs of a run: the memory they may hold, and what is made once."""
        with self._lock:
            if number not in self._contexts:
                made = Context(shared.source, device=shared.device, memory=shared.memory)
                self._contexts = {number: made}
            return self._contexts[number]

    def stop(self, number: int) -> None:
        """Makes the jobs of a run end soon."""
        with self._lock:
            if number in self._contexts:
                self._contexts[number].stop()


@dataclass(eq=False)
class _Seat:
    """An actor as the caller sees it; ``greeting`` is its answer to come, None when it came."""

    handle: Any
    node: str
    where: str
    gpus: int
    threads: int
    greeting: Any
    waiting: deque[Job] = field(default_factory=deque)
    running: dict[Any, Job] = field(default_factory=dict)

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.running)


class Ray(Executor):
    """The nodes of a Ray cluster.

    Args:
        address: of the cluster, as ``ray.init`` takes it; none is ever started.
        workers: threads of each actor; chosen by its node where None.
        device: as ``--device`` names it: GPUs are asked for where it may be one.

    Raises:
        UsageError: Ray is not installed, or there is no such cluster.
    """

    here = False

    def __init__(self, address: str, workers: int | None, device: str) -> None:
        self._ray = _connected(address)
        self._workers = workers
        self.workers = workers or _MOST_THREADS
        self._device = device
        self._seats: list[_Seat] = []
        self._runs = 0
        #: How often a job, by its identity, was lost.
        self._tries: Counter[int] = Counter()
        #: Which actor has an output file.
        self._owners: dict[str, _Seat] = {}
        self._homeless: list[Job] = []
        for node in self._ray.nodes():
            self._settle(node)
        if not self._seats:
            raise UsageError(f"--executor ray: no node of the cluster at {address} takes jobs")

    def run(self, jobs: Iterable[Job], context: Context) -> Generator[Done, None, None]:
        self._runs += 1
        sink = context.sink
        place = sink.root.stat().st_ino if isinstance(sink, LocalSink) else None
        parts = (context.source, sink, context.against, context.device, context.memory, place)
        for store in (context.source, context.against):
            if store is not None and not isinstance(store, LocalStore):
                raise UsageError(
                    f"{store.where}: --executor ray reads from storage that every node sees; "
                    "download it there and name the directory"
                )
        sent = self._ray.put(pickle.dumps(_Shared(*parts)))
        left, drawn = iter(jobs), False
        self._owners, self._tries = {}, Counter()
        try:
            while True:
                seats = self._ready()
                for job in self._homeless:
                    self._give(job, seats)
                self._homeless = []
                while not drawn and _hungry(seats):
                    if (drawn_job := next(left, None)) is None:
                        drawn = True
                    else:
                        self._give(drawn_job, seats)
                for seat in seats:
                    while seat.waiting and len(seat.running) <= seat.threads:
                        job = seat.waiting.popleft()
                        seat.running[seat.handle.run.remote(self._runs, sent, job)] = job
                running = [ref for seat in seats for ref in seat.running]
                if not running:
                    return
                done, _ = self._ray.wait(running, timeout=0.2)
                for ref in done:
                    yield from self._taken(ref, context)
        finally:
            context.stop()
            self._stop()

    def _taken(self, ref: Any, context: Context) -> Generator[Done, None, None]:
        """The result of a job that has ended; its error is raised."""
        seat = next((seat for seat in self._seats if ref in seat.running), None)
        if seat is None:  # lost since, and the job is given to another
            return
        try:
            found: _Outcome = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            raise ConversionError(f"{seat.where}: a job could not be run: {_last(error)}") from None
        except self._ray.exceptions.RayError:
            self._lose(seat, context)
            return
        job = seat.running.pop(ref)
        self._tries.pop(id(job), None)
        if found.error is not None:
            raise found.error
        context.progress.advance(found.bytes)
        yield Done(job, found.hashes, found.pieces)

    def _lose(self, seat: _Seat, context: Context) -> None:
        """Goes on without an actor, and with another on its node where that is still there."""
        self._ray.kill(seat.handle)
        self._seats.remove(seat)
        self._owners = {file: owner for file, owner in self._owners.items() if owner is not seat}
        lost = list(seat.running.values())
        self._homeless += [*lost, *seat.waiting]
        for node in self._ray.nodes():
            if node["NodeID"] == seat.node:
                self._settle(node, one=True)
        context.progress.note(f"a worker on {seat.where} was lost; {len(lost)} jobs are run again")
        for job in lost:
            self._tries[id(job)] += 1
            if self._tries[id(job)] >= _MOST_TRIES:
                raise ConversionError(
                    f"{job.name}: lost with its worker {_MOST_TRIES} times, the last on "
                    f"{seat.where}; look at its memory, or use fewer --workers"
                )

    def _give(self, job: Job, seats: list[_Seat]) -> None:
        file = job.writes
        seat = None if file is None else self._owners.get(file)
        if seat is None:
            seat = min(seats, key=lambda seat: seat.load / seat.threads)
            if file is not None:
                self._owners[file] = seat
        seat.waiting.append(job)

    def _settle(self, node: dict[str, Any], one: bool = False) -> None:
        """Asks for the actors of a node; for one of them, in the place of one that was lost."""
        has = node["Resources"]
        cores, gpus = int(has.get("CPU", 0)), int(has.get("GPU", 0))
        kind = self._device.partition(":")[0]
        if not node["Alive"] or cores < 1 or (kind not in ("auto", "cpu") and not gpus):
            return
        gpus = 0 if kind == "cpu" else min(gpus, cores)
        threads = self._workers or min(_MOST_THREADS, cores // max(1, gpus))
        pinned = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            node["NodeID"], soft=False
        )
        for _ in range(1 if one else max(1, gpus)):
            handle = (
                self._ray.remote(_Actor)
                .options(
                    num_cpus=min(threads, cores // max(1, gpus)),
                    num_gpus=min(gpus, 1),
                    max_concurrency=threads + 2,
                    scheduling_strategy=pinned,
                )
                .remote()
            )
            where = str(node.get("NodeManagerAddress") or node["NodeID"])
            seat = _Seat(handle, node["NodeID"], where, gpus, threads, handle.version.remote())
            self._seats.append(seat)

    def _ready(self) -> list[_Seat]:
        """The actors that have answered; waits for the first.

        Raises:
            ConversionError: there is none, or an actor is of another version.
        """
        until, rounds = time.monotonic() + _PATIENCE, 0
        while True:
            for seat in [seat for seat in self._seats if seat.greeting is not None]:
                if not self._ray.wait([seat.greeting], timeout=0)[0]:
                    continue
                try:
                    version = self._ray.get(seat.greeting)
                except self._ray.exceptions.RayError as error:
                    self._seats.remove(seat)
                    self._refused = f"{seat.where}: {_last(error)}"
                    continue
                if version != __version__:
                    raise ConversionError(
                        f"{seat.where} has ctconvert {version}, and this is {__version__}; install "
                        "the same everywhere"
                    )
                seat.greeting = None
            if found := [seat for seat in self._seats if seat.greeting is None]:
                return found
            if not self._seats:  # a node that is lost is listed for a while
                rounds += 1
                if rounds > _MOST_TRIES:
                    raise ConversionError(f"no worker of the Ray cluster is left: {self._refused}")
                time.sleep(1)
                for node in self._ray.nodes():
                    self._settle(node)
            if time.monotonic() > until:
                raise ConversionError(
                    f"no node of the Ray cluster had room for a worker in {_PATIENCE:.0f} s"
                )
            time.sleep(0.1)

    _refused = "its nodes are gone"

    def _stop(self) -> None:
        """Waits for what still runs; nothing is kept of it."""
        running = [ref for seat in self._seats for ref in seat.running]
        for seat in self._seats:
            seat.waiting.clear()
            if seat.running:
                seat.handle.stop.remote(self._runs)
            seat.running.clear()
        self._homeless = []
        if running:
            self._ray.wait(running, num_returns=len(running), timeout=_PATIENCE)


def _hungry(seats: list[_Seat]) -> bool:
    """Whether an actor has too little to do, and not too much is drawn already."""
    drawn = sum(seat.load for seat in seats)
    return drawn < _MOST_WAITING * len(seats) and any(s.load <= s.threads for s in seats)


def _last(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _connected(address: str) -> Any:
    """Ray, connected to a cluster."""
    if address == "local":
        raise UsageError("--address local: no cluster is started; start one and name its address")
    before = signal.getsignal(signal.SIGTERM)
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise UsageError("--executor ray needs Ray: pip install 'ctconvert[ray]'") from None
    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"--address {address}: no Ray cluster answers: {_last(error)}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # which Ray takes for its own
    return ray
