"""The executor and the device that a user names, and what an executor asks of a source."""

from __future__ import annotations

from pathlib import Path

from ctconvert.errors import UsageError
from ctconvert.store.hub import home_path
from ctconvert.work.executors import Executor, Threads, worker_count
from ctconvert.work.importing import load_torch


def threads(workers: int | None) -> Threads:
    """Threads of this process, as many as ``--workers`` says.

    Raises:
        UsageError: that is no number of them.
    """
    return Threads(worker_count(workers))


def device_named(name: str) -> str:
    """What ``--device`` names; all devices of a kind where it has no index.

    ``auto`` stays that, and is found when the first weight is transformed: something always is, and
    the source is being read by the time torch is there.

    Raises:
        UsageError: there is none of that name.
    """
    if name in ("auto", "cpu"):
        return name
    load_torch()
    from ctconvert.transforms.device import every

    found = every(name)
    return str(found[0]) if len(found) == 1 else found[0].type


def executor_named(name: str, workers: int | None, address: str, device: str) -> Executor:
    """The executor of ``--executor``, ``threads`` or ``ray``.

    Raises:
        UsageError: it is neither, or it cannot be had.
    """
    chosen = threads(workers)
    if name == "threads":
        return chosen
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
