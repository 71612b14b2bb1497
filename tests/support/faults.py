"""Faults at every operation: a run in a forked process that is stopped before its n-th write.

An operation is whatever changes the file system: a file opened to be written, a write, a cut, an
fsync, a rename, an exchange, a folder or a name made or removed. Python's audit events announce
most of them; writes and fsyncs, which have no event, go through wrappers. A child process is
forked from this one, which has imported everything, so that a run takes some milliseconds.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ctconvert.errors import CtconvertError

#: ``kill``: SIGKILL before it. ``tear``: half of a write, then SIGKILL. ``lose``: the power fails
#: before it, and what was not synced is gone. ``interrupt``: Ctrl-C before it. ``fail``: the disk
#: is full, for it and for all that follow.
How = Literal["kill", "tear", "lose", "interrupt", "fail"]
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_EVENTS = {
    "os.rename": "rename",
    "os.remove": "unlink",
    "os.rmdir": "rmdir",
    "os.mkdir": "mkdir",
    "os.truncate": "truncate",
    "os.link": "link",
    "os.symlink": "symlink",
    "os.chmod": "chmod",
    "os.utime": "utime",
}


@dataclass(frozen=True)
class Fault:
    """What happens at the ``at``-th operation, counted from 1; nothing where it is 0."""

    at: int = 0
    how: How = "kill"


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    ``end`` is ``done``, ``killed``, ``interrupted``, or the line of a ctconvert error. ``trace``
    are the operations in order, empty where it was killed.
    """

    end: str
    trace: tuple[str, ...] = ()


class _Watch:
    """Counts operations in the child, and does what the fault says."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.trace: list[str] = []
        #: Files with unsynced changes, by inode: a descriptor, and their length before these.
        self._unsynced: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._active = False

    def operation(self, name: str) -> bool:
        """Told before each; True where only half of a write is to be done."""
        if not self._active:
            return False
        with self._lock:
            self.trace.append(name)
            count = len(self.trace)
        at, how = self.fault.at, self.fault.how
        if not at or count < at or (count > at and how != "fail"):
            return False
        if how == "tear" and name in ("write", "pwrite"):
            return True
        if how == "fail":
            if name in ("unlink", "rmdir"):
                return False  # a full disk refuses no removal
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if how == "lose":
            self._lose()
        os.kill(os.getpid(), signal.SIGINT if how == "interrupt" else signal.SIGKILL)
        return False

    def _changing(self, descriptor: int) -> None:
        """Told before a file's content changes."""
        found = os.fstat(descriptor)
        if self._active and found.st_ino not in self._unsynced:
            self._unsynced[found.st_ino] = os.dup(descriptor), found.st_size

    def _lose(self) -> None:
        """Cuts every file back to what of it was surely on the disk; names are kept."""
        self._active = False
        for descriptor, size in self._unsynced.values():
            os.truncate(descriptor, min(size, os.fstat(descriptor).st_size))

    def fsync(self, descriptor: int) -> None:
        """In the place of ``os.fsync``: what is on no disk needs no waiting for one."""
        self.operation("fsync")
        self._unsynced.pop(os.fstat(descriptor).st_ino, None)

    def write(self, name: str, file: int, write: Callable[[Any], int], data: Any) -> int:
        """One write, possibly half of it and then death."""
        torn = self.operation(name)
        self._changing(file)
        if torn:
            view = memoryview(data).cast("B")
            write(view[: len(view) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(data)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(args[2], int) and args[2] & _WRITING and args[0] != os.devnull:
                self.operation("open")
        elif event == "ctypes.dlsym":
            if args[1] == "renameat2":
                self.operation("exchange")
        elif event in _EVENTS:
            self.operation(_EVENTS[event])
            if event == "os.truncate" and isinstance(args[0], int):
                self._changing(args[0])

    def arm(self) -> None:
        """Wraps this process for good: it is a child that ends soon."""
        watch, pwrite, open_path = self, os.pwrite, Path.open

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                return watch.write("write", self.fileno(), super().write, data)

        def opened(path: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
            if set(mode) & set("wax+"):
                assert "b" in mode, "text is not written anywhere"
                return io.BufferedWriter(Raw(path, mode.replace("b", "")))
            return open_path(path, mode, *args, **more)

        def counted_pwrite(descriptor: int, data: Any, offset: int) -> int:
            return watch.write(
                "pwrite", descriptor, lambda part: pwrite(descriptor, part, offset), data
            )

        os.pwrite, os.fsync = counted_pwrite, self.fsync  # type: ignore[assignment]
        Path.open = opened  # type: ignore[assignment, method-assign]
        sys.addaudithook(self._audit)
        self._active = True

    def disarm(self) -> None:
        self._active = False


def run(action: Callable[[], object], fault: Fault = Fault()) -> Ended:
    """Does something in a child process, with a fault.

    Raises:
        AssertionError: the child raised what is no error of ctconvert's.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _child(action, fault, writer)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, os.WTERMSIG(status)
        return Ended("killed")
    assert text, "the child ended without a word"
    end, trace = json.loads(text)
    assert not end.startswith("Traceback"), end
    return Ended(end, tuple(trace))


def _child(action: Callable[[], object], fault: Fault, writer: int) -> None:
    import traceback

    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    watch = _Watch(fault)
    watch.arm()
    try:
        action()
        end = "done"
    except KeyboardInterrupt:
        end = "interrupted"
    except CtconvertError as error:
        end = f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: BLE001 (told to the parent, which fails)
        end = traceback.format_exc()
    watch.disarm()
    data = json.dumps([end, watch.trace]).encode()
    while data:
        data = data[os.write(writer, data) :]
    os._exit(0)


def descriptors() -> int:
    """How many files this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
