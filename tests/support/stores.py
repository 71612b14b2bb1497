"""Stores and sinks for tests: in memory, recording, failing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from ctconvert.errors import ConversionError
from ctconvert.store.base import Store


class MemoryStore(Store):
    """Files in a dictionary, which may be changed under the reader's hands."""

    def __init__(self, files: dict[str, bytes], where: str = "memory") -> None:
        self.files = files
        self.where = self.id = where
        self._sizes = {name: len(data) for name, data in files.items()}

    def sizes(self) -> Mapping[str, int]:
        return self._sizes

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        data = self.files[name][offset : offset + len(buffer)]
        if len(data) != len(buffer):
            raise ConversionError(f"{self.path(name)}: ends at byte {offset + len(data)}")
        buffer[:] = data

    def fingerprint(self, name: str) -> str:
        return hashlib.sha256(self.files[name]).hexdigest()


class MemorySink:
    """Files that exist at their full size once :meth:`create` was called."""

    def __init__(self) -> None:
        self.files: dict[str, bytearray] = {}

    def create(self, name: str, header: bytes, size: int) -> None:
        self.files[name] = bytearray(size)
        self.write(name, 0, memoryview(header))

    def write(self, name: str, offset: int, data: memoryview) -> None:
        file = self.files[name]
        assert offset + len(data) <= len(file), f"{name}: written past its end"
        file[offset : offset + len(data)] = data


class WatchedStore(Store):
    """Another store: counts and records its reads, and fails the ``fail_at``-th of them."""

    def __init__(self, inner: Store, fail_at: int = 0) -> None:
        self.inner = inner
        self.where, self.id, self.revision = inner.where, inner.id, inner.revision
        self.fail_at = fail_at
        #: (file, offset, length) of every read, in order.
        self.reads: list[tuple[str, int, int]] = []
        self.closed = 0

    def sizes(self) -> Mapping[str, int]:
        return self.inner.sizes()

    def left_out(self) -> Mapping[str, str]:
        return self.inner.left_out()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.reads.append((name, offset, len(buffer)))
        if len(self.reads) == self.fail_at:
            raise ConversionError(f"{self.path(name)}: cannot read: Input/output error")
        self.inner.read_into(name, offset, buffer)

    def fingerprint(self, name: str) -> str:
        return self.inner.fingerprint(name)

    def close(self) -> None:
        self.closed += 1
        self.inner.close()


def files_of(store: Store) -> dict[str, bytes]:
    """Every file of a store, read whole."""
    return {name: store.read(name) for name in store.sizes()}


class Plain:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.plans: list[object] = []
        self.modules: list[tuple[str, str | None]] = []
        self.phases: list[tuple[str, int]] = []
        self.done = 0

    def plan(self, plan: object) -> None:
        self.plans.append(plan)

    def module(self, name: str, layout: str | None) -> None:
        self.modules.append((name, layout))

    def phase(self, label: str, total: int) -> None:
        self.phases.append((label, total))

    def advance(self, count: int) -> None:
        self.done += count

    def note(self, text: str) -> None:
        self.notes.append(text)

    def __reduce__(self) -> Any:
        raise TypeError("a progress stays in its process")
