"""Jobs: plain data that can be pickled, and one function each that does the work.

A job needs its own records, a store to read and a sink to write, which :class:`Context` holds;
whoever runs it need know nothing of weights. These here move and hash bytes; those that transform
weights are in :mod:`ctconvert.work.transforming`.
"""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from blake3 import blake3

from ctconvert import records
from ctconvert.errors import VerificationError
from ctconvert.progress import Progress, Silent
from ctconvert.store.base import CHUNK, Store
from ctconvert.store.safetensors import TensorEntry
from ctconvert.store.writer import Sink
from ctconvert.work.budget import Budget, CancelledError
from ctconvert.work.journal import Piece

T = TypeVar("T")


class _Once:
    """A value that the first who needs it makes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.done = False
        self.value: Any = None


@dataclass
class Context:
    """What jobs share.

    Args:
        source: what they read.
        sink: where they write.
        against: what they compare with; of a build, what it has written.
        device: where transforms run, as ``--device`` names it: ``cuda`` is all of them.
        memory: bytes that jobs may hold between them.
        progress: told of bytes done.
    """

    source: Store
    sink: Sink | None = None
    against: Store | None = None
    device: str = "cpu"
    memory: int = 256 << 20
    progress: Progress = field(default_factory=Silent)

    def __post_init__(self) -> None:
        self.budget = Budget(self.memory)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._once: dict[object, _Once] = {}

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What ``make`` gives, which is called once for all jobs of this process that ask."""
        with self._lock:
            found = self._once.setdefault(key, _Once())
        with found.lock:
            if not found.done:
                found.value, found.done = make(), True
        value: T = found.value
        return value

    def stop(self) -> None:
        """Makes every job end soon: another one failed, or the run was interrupted."""
        self._stop.set()
        self.budget.cancel()

    def check_running(self) -> None:
        """Raises CancelledError after :meth:`stop`."""
        if self._stop.is_set():
            raise CancelledError


@dataclass(frozen=True)
class Done:
    """What came of a job: the hash of what it wrote or read, by full name.

    ``pieces`` are what it wrote of tensors that it did not write all of.
    """

    job: Job
    hashes: dict[str, str] = field(default_factory=dict)
    pieces: dict[str, Piece] = field(default_factory=dict)


class Job(ABC):
    """A piece of work that can be run anywhere, given a :class:`Context`."""

    name: str

    @property
    def writes(self) -> str | None:
        """The output file that it writes to, None where it writes nothing."""
        return None

    @abstractmethod
    def run(self, context: Context) -> Done:
        """Does it.

        Raises:
            CancelledError: the context was stopped.
            CtconvertError: it failed.
        """


@dataclass(frozen=True)
class PartJob(Job):
    """What is done with a module's units from ``first`` up to ``last``; all where that is None.

    The first part also does what is done once for the module.
    """

    item: records.Convert | records.Restore
    first: int = 0
    last: int | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.item.name

    @property
    def writes(self) -> str:
        return self.item.made[0].file

    @property
    def count(self) -> int:
        """How many units the module has."""
        item = self.item
        return len((item.modules[0] if isinstance(item, records.Restore) else item).units)

    @property
    def units(self) -> range:
        return range(self.first, self.count if self.last is None else self.last)


class TensorWriter:
    """An output tensor, or ``length`` bytes of it from ``start`` on, being written in order."""

    def __init__(
        self, context: Context, entry: TensorEntry, start: int = 0, length: int | None = None
    ) -> None:
        assert context.sink is not None
        self._sink = context.sink
        self._progress = context.progress
        self._entry = entry
        self._start = start
        self._length = entry.nbytes if length is None else length
        self._done = 0
        self._digest = blake3()

    def put(self, data: memoryview) -> None:
        """Writes and hashes the next bytes."""
        if self._done + len(data) > self._length:
            raise AssertionError(f"{self._entry.name}: too many bytes for {self._entry.spec}")
        self._sink.write(self._entry.file, self._entry.offset + self._start + self._done, data)
        self._digest.update(data)
        self._done += len(data)
        self._progress.advance(len(data))

    @property
    def whole(self) -> bool:
        """Whether this is all of the tensor."""
        return self._length == self._entry.nbytes

    def finish(self) -> Piece:
        """What was written, and its hash."""
        if self._done != self._length:
            raise AssertionError(
                f"{self._entry.name}: {self._done} of {self._length} bytes were written"
            )
        return Piece(self._start, self._length, self._digest.hexdigest())


def written(job: Job, writers: Mapping[str, TensorWriter], hashes: dict[str, str]) -> Done:
    """What came of a job that wrote tensors, by full name, and had ``hashes`` of others."""
    pieces = {}
    for name, writer in writers.items():
        piece = writer.finish()
        if writer.whole:
            hashes[name] = piece.blake3
        else:
            pieces[name] = piece
    return Done(job, hashes, pieces)


def copy_tensors(context: Context, sources: Sequence[TensorEntry], output: TensorEntry) -> str:
    """Puts input tensors one after the other into an output tensor; returns its hash."""
    writer = TensorWriter(context, output)
    with context.budget.hold(min(CHUNK, output.nbytes)):
        for entry in sources:
            for part in context.source.pieces(entry.file, entry.offset, entry.nbytes):
                context.check_running()
                writer.put(part)
    return writer.finish().blake3


@dataclass(frozen=True)
class CopyJob(Job):
    """A tensor that stays as it is."""

    item: records.Copy

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.item.name

    @property
    def writes(self) -> str:
        return self.item.output.file

    def run(self, context: Context) -> Done:
        return Done(self, {self.name: copy_tensors(context, [self.item.source], self.item.output)})


@dataclass(frozen=True)
class HashJob(Job):
    """The hash of a tensor, or of a whole file; checked where ``expected`` is given.

    Read in order beside a conversion, it also reads a source file ahead.

    Args:
        name: of the tensor or file.
        file: the file it lies in.
        offset, length: its bytes.
        expected: its hash.
        algorithm: of the hash.
        of_source: it is a whole file of a source, and what the store states of it is checked too.
        what: how a message names it.
        counted: whether the progress counts its bytes.
        made: it lies in what is compared with, of a build what it has written, not in the source.
    """

    name: str
    file: str
    offset: int
    length: int
    expected: str | None = None
    what: str = ""
    counted: bool = True
    algorithm: Literal["blake3", "sha256"] = "blake3"
    of_source: bool = False
    made: bool = False

    def run(self, context: Context) -> Done:
        store = context.against if self.made else context.source
        assert store is not None
        digest: Any = blake3() if self.algorithm == "blake3" else hashlib.sha256()
        stated = hashlib.sha256() if self._stated(context) else None
        with context.budget.hold(min(CHUNK, self.length)):
            for part in store.pieces(self.file, self.offset, self.length):
                context.check_running()
                digest.update(part)
                if stated is not None:
                    stated.update(part)
                if self.counted:
                    context.progress.advance(len(part))
        found = digest.hexdigest()
        if stated is not None:
            context.source.check_sha256(self.file, stated.hexdigest())
        if self.expected is not None and found != self.expected:
            raise VerificationError(
                f"{self.what}: damaged: its bytes have changed",
                file=store.path(self.file),
            )
        return Done(self, {self.name: found})

    def _stated(self, context: Context) -> bool:
        return self.of_source and context.source.stated_sha256(self.file) is not None


@dataclass(frozen=True)
class CompareBytesJob(Job):
    """A tensor of an output that must be tensors of a source, one after the other, unchanged."""

    made: TensorEntry
    originals: tuple[TensorEntry, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.made.name

    def run(self, context: Context) -> Done:
        assert context.against is not None
        position = self.made.offset
        with context.budget.hold(2 * min(CHUNK, self.made.nbytes)):
            for entry in self.originals:
                left = context.source.pieces(self.made.file, position, entry.nbytes)
                right = context.against.pieces(entry.file, entry.offset, entry.nbytes)
                for have, want in zip(left, right, strict=True):
                    context.check_running()
                    if have != want:
                        raise VerificationError(
                            f"tensor {self.made.name} differs from the source's"
                        )
                    context.progress.advance(len(want))
                position += entry.nbytes
        return Done(self)
