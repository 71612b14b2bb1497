"""Where a worker's thread transforms: a device, and there a stream of its own.

Threads are given the devices that were asked for in turn. Their copies and kernels are then ordered
among one thread's alone, and several modules are on their way at once, on every device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ctconvert.transforms.device import every, on_device
from ctconvert.work.jobs import Context


@dataclass
class Lane:
    """A device and a stream on it, made when it is first needed; None on the CPU."""

    device: torch.device
    stream: Any = None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes both what the thread's copies and kernels go to."""
        if self.device.type == "cpu":
            yield
            return
        backend = torch.get_device_module(self.device)
        with on_device(self.device):
            if self.stream is None:
                self.stream = backend.Stream()
            with backend.stream(self.stream):
                yield


class Lanes:
    """The lanes of a run, one a thread.

    Args:
        name: as ``--device`` has it; without an index, all devices of that kind.
    """

    def __init__(self, name: str) -> None:
        self.devices = every(name)
        self._own = threading.local()
        self._lock = threading.Lock()
        self._given = 0
        self._first: dict[object, threading.Lock | None] = {}

    def mine(self) -> Lane:
        """The calling thread's."""
        found: Lane | None = getattr(self._own, "lane", None)
        if found is None:
            with self._lock:
                device = self.devices[self._given % len(self.devices)]
                self._given += 1
            found = self._own.lane = Lane(device)
        return found

    @contextmanager
    def compiling(self, key: object) -> Iterator[None]:
        """The first thread to come with a key goes alone, for its kernels may have to be compiled.

        Threads that come together would each compile the same. On the CPU nobody waits.
        """
        with self._lock:
            lock = self._first.setdefault(key, threading.Lock())
        if self.devices[0].type == "cpu":
            lock = None
        if lock is None:
            yield
            return
        with lock:
            alone = self._first[key] is not None
            if alone:
                yield
                self._first[key] = None
        if not alone:
            yield


def lanes_of(context: Context) -> Lanes:
    """The lanes of all jobs of a context in this process."""
    return context.once(Lanes, partial(Lanes, context.device))
