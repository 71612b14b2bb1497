"""Executors for tests: in the caller's thread, and in other processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from ctconvert.store.base import Store
from ctconvert.store.writer import Sink
from ctconvert.work.executors import Executor
from ctconvert.work.jobs import Context, CopyJob, Done, Job
from ctconvert.work.transforming import ConvertJob, RestoreJob


class Inline(Executor):
    """One job after the other, as they are drawn: nothing about a run is left to chance.

    Args:
        meanwhile: what happens to the world, once, when ``after`` items were made.
    """

    def __init__(self, meanwhile: Callable[[], object] | None = None, after: int = 3) -> None:
        #: The jobs that were run, in order.
        self.ran: list[Job] = []
        self._meanwhile = meanwhile
        self._after = after

    @property
    def wrote(self) -> list[str]:
        """The names of the items that were made, and not only hashed or compared."""
        return [job.name for job in self.ran if isinstance(job, ConvertJob | RestoreJob | CopyJob)]

    def run(self, jobs: Iterable[Job], context: Context) -> Generator[Done, None, None]:
        try:
            for job in jobs:
                self.ran.append(job)
                yield job.run(context)
                if self._meanwhile is not None and len(self.wrote) == self._after:
                    meanwhile, self._meanwhile = self._meanwhile, None
                    meanwhile()
        finally:
            context.stop()


@dataclass(frozen=True)
class _Parcel:
    """All that goes to another process with a job."""

    job: Job
    source: Store
    sink: Sink | None
    against: Store | None
    device: str

    def open(self) -> Done:
        context = Context(self.source, self.sink, self.against, self.device)
        return self.job.run(context)


class Processes(Executor):
    """Processes that share nothing with this one but the file system."""

    def __init__(self, workers: int = 2) -> None:
        start = multiprocessing.get_context("forkserver")
        start.set_forkserver_preload(["ctconvert.work.transforming", "compressed_tensors"])
        self._pool = ProcessPoolExecutor(workers, mp_context=start)

    def run(self, jobs: Iterable[Job], context: Context) -> Generator[Done, None, None]:
        for job in jobs:
            parcel = _Parcel(job, context.source, context.sink, context.against, context.device)
            yield self._pool.submit(parcel.open).result()

    def close(self) -> None:
        self._pool.shutdown()
