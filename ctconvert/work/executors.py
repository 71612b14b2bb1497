"""What runs jobs: threads of this process. An executor knows nothing of weights.

To add one: a class with :meth:`Executor.run`. A job can be pickled, and so can a store and a local
sink; another process needs nothing else.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from ctconvert.errors import UsageError
from ctconvert.work.jobs import Context, Done, Job

#: The most threads that are ever of use, and that a machine can be trusted to start.
MOST_WORKERS = 256


class Executor(ABC):
    """Runs jobs somewhere."""

    #: Whether that is this machine, which sees at once what it has written.
    here: bool = True
    #: How many jobs are done at once, in one process.
    workers: int = 1

    @abstractmethod
    def run(self, jobs: Iterable[Job], context: Context) -> Generator[Done, None, None]:
        """Runs every job once and gives results as they come, in any order.

        ``jobs`` is drawn from in the caller's thread, little ahead of the work. The first error of
        a job, and whatever the caller raises, stops the others and is raised when they have ended.
        """


class Threads(Executor):
    """Threads; most of the work is outside Python's lock."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(self, jobs: Iterable[Job], context: Context) -> Generator[Done, None, None]:
        pool = ThreadPoolExecutor(self.workers)
        ended: SimpleQueue[Done | BaseException] = SimpleQueue()
        running = 0
        try:
            for job in jobs:
                pool.submit(_run, job, context, ended)
                running += 1
                while running > 2 * self.workers:
                    yield _next(ended)
                    running -= 1
            for _ in range(running):
                yield _next(ended)
        finally:
            context.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            if (torch := sys.modules.get("torch")) is not None:
                # threads to come have again what this one has, whatever jobs chose for their own
                torch.set_num_threads(torch.get_num_threads())


def _run(job: Job, context: Context, ended: SimpleQueue[Done | BaseException]) -> None:
    try:
        ended.put(job.run(context))
    except BaseException as error:  # noqa: BLE001 (raised in the caller's thread)
        ended.put(error)


def _next(ended: SimpleQueue[Done | BaseException]) -> Done:
    """What ended next.

    Futures are not waited for: a signal in the midst of that leaves their locks taken, for which
    the workers would then wait for ever.
    """
    found = ended.get()
    if isinstance(found, BaseException):
        raise found
    return found


def worker_count(workers: int | None) -> int:
    """The number of threads; at most 8 by default, more do not help one disk.

    Raises:
        UsageError: fewer than one were asked for.
    """
    if workers is None:
        return max(2, min(8, os.cpu_count() or 2))
    if not 1 <= workers <= MOST_WORKERS:
        raise UsageError(f"--workers {workers}: it must lie between 1 and {MOST_WORKERS}")
    return workers
