"""Fills output shards from many threads at once, in bounded memory, hashing as it writes."""

from __future__ import annotations

import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    Future,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager

import torch

from ctconvert.budget import Budget, CancelledError
from ctconvert.checkpoint.header import Shard, TensorEntry
from ctconvert.checkpoint.source import Reader
from ctconvert.checkpoint.staging import Staging
from ctconvert.checkpoint.writer import ShardWriter
from ctconvert.device import is_out_of_memory
from ctconvert.errors import ConversionError
from ctconvert.memory import Memory
from ctconvert.progress import Progress
from ctconvert.specs import TensorSpec

#: Bytes read, copied or hashed at once where no transform needs a whole tensor.
CHUNK = 8 << 20


class Work(ABC):
    """One unit of work: it reads what it needs and puts the bytes of its output tensors."""

    name: str
    outputs: Mapping[str, TensorSpec]

    @abstractmethod
    def run(self, stream: Stream) -> None:
        """Puts every byte of every output tensor, each tensor's in order."""


class Stream:
    """The worker threads and what they share.

    Args:
        reader: the open input files.
        staging: where shards are written and recorded.
        memory: the budgets in bytes.
        device: where transforms run.
        workers: threads.
        progress: told of bytes written.
    """

    def __init__(
        self,
        reader: Reader,
        staging: Staging,
        memory: Memory,
        device: torch.device,
        workers: int,
        progress: Progress,
    ) -> None:
        self.reader = reader
        self.staging = staging
        self.device = device
        self.workers = workers
        self.progress = progress
        #: SHA-256 of every finished tensor, by full name.
        self.hashes: dict[str, str] = {}
        self.reading = Budget(memory.read)
        self.working = Budget(memory.work)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._open: dict[str, _Tensor] = {}

    def fill(
        self,
        shards: Sequence[Shard],
        works: Sequence[Work],
        label: str,
        beside: Sequence[Callable[[], None]] = (),
    ) -> int:
        """Makes every shard that is not already finished, running the works that fill it.

        Args:
            shards: all shards of the output.
            works: all works, in the order of their outputs.
            label: what to call it in the progress.
            beside: callables to run on a thread of their own meanwhile.

        Returns:
            how many shards an earlier run had finished.
        """
        todo = [shard for shard in shards if not self._reused(shard)]
        resumed = len(shards) - len(todo)
        if resumed:
            self.progress.note(f"{resumed} of {len(shards)} shards taken over")
        self.progress.phase(label, sum(shard.size for shard in todo))
        place = {name: shard.name for shard in todo for name in shard.specs}
        share: dict[str, list[Work]] = {shard.name: [] for shard in todo}
        for work in works:
            shard_name = place.get(next(iter(work.outputs)))
            if shard_name is not None:
                share[shard_name].append(work)
        with _torch_threads(max(1, (os.cpu_count() or 1) // self.workers)):
            self._run(todo, share, beside)
        return resumed

    def _run(
        self,
        todo: Sequence[Shard],
        share: Mapping[str, list[Work]],
        beside: Sequence[Callable[[], None]],
    ) -> None:
        writers: list[_SharedShard] = []
        with ThreadPoolExecutor(self.workers) as pool, ThreadPoolExecutor(1) as other:
            futures: set[Future[None]] = {other.submit(task) for task in beside}
            try:
                for shard in todo:
                    works = share[shard.name]
                    writers.append(_SharedShard(self, shard, len(works)))
                    for work in works:
                        futures.add(pool.submit(self._run_one, work, writers[-1]))
                        while len(futures) > 4 * self.workers:
                            futures = _reap(futures, FIRST_COMPLETED)
                while futures:
                    futures = _reap(futures, FIRST_EXCEPTION)
            finally:
                self._stop.set()
                self.reading.cancel()
                self.working.cancel()
                pool.shutdown(wait=True, cancel_futures=True)
                other.shutdown(wait=True, cancel_futures=True)
                for writer in writers:
                    writer.close()

    def _run_one(self, work: Work, writer: _SharedShard) -> None:
        try:
            self.check_running()
            for name, spec in work.outputs.items():
                self._open[name] = _Tensor(writer, name, spec.nbytes)
            work.run(self)
            for name in work.outputs:
                self.hashes[name] = self._open.pop(name).finish()
            writer.work_done()
        except CancelledError:
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            advice = "fewer --workers" if self.device.type == "cpu" else "--device cpu"
            raise ConversionError(
                f"{work.name}: out of memory on {self.device}; use {advice}"
            ) from None

    def check_running(self) -> None:
        """Raises CancelledError where another thread failed or the run was interrupted."""
        if self._stop.is_set():
            raise CancelledError

    def put(self, name: str, data: memoryview) -> None:
        """Writes and hashes the next bytes of a tensor of the work that calls it."""
        self._open[name].put(data)
        self.progress.advance(len(data))

    def copy(self, name: str, entries: Sequence[TensorEntry]) -> None:
        """Puts input tensors one after the other, unchanged."""
        size = min(CHUNK, max(entry.nbytes for entry in entries))
        with self.reading.hold(size):
            buffer = memoryview(bytearray(size))
            for entry in entries:
                for start in range(0, entry.nbytes, CHUNK):
                    self.check_running()
                    part = buffer[: min(CHUNK, entry.nbytes - start)]
                    self.reader.read_into(entry.file, entry.offset + start, part)
                    self.put(name, part)

    def hash_file(self, name: str, size: int) -> str:
        """The hash of an input file; read in order, it also reads ahead of the workers."""
        buffer = memoryview(bytearray(CHUNK))
        digest = hashlib.sha256()
        for start in range(0, size, CHUNK):
            self.check_running()
            part = buffer[: min(CHUNK, size - start)]
            self.reader.read_into(name, start, part)
            digest.update(part)
        return digest.hexdigest()

    def recorded(self, record: Callable[[], None]) -> None:
        """Runs a journal entry with no other at the same time."""
        with self._lock:
            record()

    def _reused(self, shard: Shard) -> bool:
        """Whether a finished shard of an earlier run is whole; if so its hashes are taken over."""
        tensors = self.staging.shards.get(shard.name)
        path = self.staging.folder / shard.name
        if tensors is None or tensors.keys() != shard.specs.keys() or not path.exists():
            return False
        with path.open("rb") as file:
            if path.stat().st_size != shard.size or file.read(len(shard.header)) != shard.header:
                return False
            for name, spec in shard.specs.items():
                digest = hashlib.sha256()
                for start in range(0, spec.nbytes, CHUNK):
                    digest.update(file.read(min(CHUNK, spec.nbytes - start)))
                if digest.hexdigest() != tensors[name]:
                    return False
        self.hashes |= tensors
        return True


class Copy(Work):
    """A tensor that stays as it is."""

    def __init__(self, entry: TensorEntry) -> None:
        self.name = entry.name
        self.outputs = {entry.name: entry.spec}
        self.entry = entry

    def run(self, stream: Stream) -> None:
        stream.copy(self.name, [self.entry])


class _Tensor:
    """An output tensor being written, in order."""

    def __init__(self, writer: _SharedShard, name: str, nbytes: int) -> None:
        self.writer = writer
        self.name = name
        self.nbytes = nbytes
        self.done = 0
        self.digest = hashlib.sha256()

    def put(self, data: memoryview) -> None:
        self.writer.write(self.name, data, self.done)
        self.digest.update(data)
        self.done += len(data)

    def finish(self) -> str:
        if self.done != self.nbytes:
            raise AssertionError(f"{self.name}: {self.done} of {self.nbytes} bytes were written")
        return self.digest.hexdigest()


class _SharedShard:
    """A shard that several workers fill; the first opens it, the last finishes it."""

    def __init__(self, stream: Stream, shard: Shard, works: int) -> None:
        self._stream = stream
        self._writer = ShardWriter(stream.staging.folder, shard)
        self._left = works
        self._opened = False
        self._lock = threading.Lock()

    def _open(self) -> None:
        with self._lock:
            if not self._opened:
                self._writer.open()
                self._opened = True

    def write(self, name: str, data: memoryview, start: int) -> None:
        self._open()
        self._writer.write(name, data, start)

    def work_done(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if not last:
            return
        self._open()  # every tensor of it may be empty
        self._writer.finish()
        shard, stream = self._writer.shard, self._stream
        hashes = {name: stream.hashes[name] for name in shard.specs}
        stream.recorded(lambda: stream.staging.finished_shard(shard.name, hashes))

    def close(self) -> None:
        self._writer.close()


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """The workers are the parallelism; torch's own threads share what is left of the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _reap(futures: set[Future[None]], until: str) -> set[Future[None]]:
    """Raises what a finished future raised; wakes often, so that Ctrl-C is noticed."""
    done, left = wait(futures, timeout=0.2, return_when=until)
    for future in done:
        future.result()
    return left
