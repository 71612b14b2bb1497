"""The executor that a user names, and what it asks of a source."""

from __future__ import annotations

from pathlib import Path

from ctconvert.errors import UsageError
from ctconvert.store.hub import home_path
from ctconvert.work.executors import Executor, Threads, worker_count


def executor_named(name: str, workers: int | None, address: str, device: str) -> Executor:
    """The executor of ``--executor``, ``threads`` or ``ray``.

    Raises:
        UsageError: it is neither, or it cannot be had.
    """
    count = worker_count(workers)
    if name == "threads":
        return Threads(count)
    if name != "ray":
        raise UsageError(f"--executor {name}: it must be threads or ray")
    from ctconvert.work.cluster import Ray

    return Ray(address, workers, device)


def directory_of(model: str | Path) -> Path:
    """The whole path of a model that other machines read, too.

    Raises:
        UsageError: it is no directory. What is streamed from the Hub is compared with its hash by
            the process that read it, which on a cluster are several.
    """
    path = home_path(model)
    if not path.is_dir():
        raise UsageError(
            f"{model}: --executor ray reads a directory on storage that every node sees; download "
            "the model there first"
        )
    return path.absolute()
