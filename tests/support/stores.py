"""Fakes at the seams: a checkpoint in memory, and an executor that runs jobs where it is called."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Mapping

from ctconvert.errors import ConversionError
from ctconvert.store.base import Store
from ctconvert.work.executors import Executor
from ctconvert.work.jobs import Context, Done, Job


class MemoryStore(Store):
    """Files in memory."""

    where = "memory"
    id = "memory"

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)

    def sizes(self) -> Mapping[str, int]:
        return {name: len(data) for name, data in self.files.items()}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        data = self.files[name][offset : offset + len(buffer)]
        if len(data) < len(buffer):
            raise ConversionError(f"{self.path(name)}: ends at byte {offset + len(data)}")
        buffer[:] = data

    def fingerprint(self, name: str) -> str:
        return hashlib.sha256(self.files[name]).hexdigest()


class Inline(Executor):
    """Runs jobs one after the other in the caller's thread."""

    def run(self, jobs: Iterable[Job], context: Context) -> Generator[Done, None, None]:
        for job in jobs:
            yield job.run(context)
