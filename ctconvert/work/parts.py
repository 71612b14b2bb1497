"""Stacks of experts in parts: jobs of a few units each, and the hashes of the tensors they share.

A tensor's hash is that of its bytes in order, which the jobs of one stack write in any order.
Each gives the hash of its own piece, made of the bytes in memory; when all pieces are there, a
:class:`SealJob` reads the tensor back once, for its hash and to see every piece again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blake3 import blake3

from ctconvert.errors import ConversionError
from ctconvert.records import Convert, Copy, Item, Plan
from ctconvert.store.base import CHUNK
from ctconvert.store.safetensors import TensorEntry
from ctconvert.work.importing import load_torch
from ctconvert.work.jobs import Context, CopyJob, Done, HashJob, Job, PartJob
from ctconvert.work.journal import Key, PartDone, Piece

#: Source bytes that a job of a stack reads, about: enough to be worth a line in the journal, and
#: little enough to keep every worker busy and to lose little where a run is killed.
GRAIN = 64 << 20


def ranges(item: Convert) -> list[tuple[int, int]]:
    """The units of a module, cut into ranges of about :data:`GRAIN` bytes."""
    count = len(item.units)
    step = max(1, GRAIN // max(1, item.input_bytes))
    return [(first, min(first + step, count)) for first in range(0, count, step)]


def jobs_of(item: Item) -> list[Job]:
    """The jobs that make an item of a plan."""
    if isinstance(item, Copy):
        return [CopyJob(item)]
    load_torch()
    from ctconvert.work.transforming import ConvertJob, RestoreJob

    if isinstance(item, Convert):
        return [ConvertJob(item, *units) for units in ranges(item)]
    return [RestoreJob(item, *units) for units in ranges(item.modules[0])]


@dataclass(frozen=True)
class SealJob(Job):
    """The hash of a tensor that lies in the output in pieces, each of which is looked at again."""

    entry: TensorEntry
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.entry.name

    def run(self, context: Context) -> Done:
        assert context.against is not None
        entry, whole = self.entry, blake3()
        with context.budget.hold(min(CHUNK, entry.nbytes)):
            for piece in self.pieces:
                own = blake3()
                offset = entry.offset + piece.start
                for data in context.against.pieces(entry.file, offset, piece.length):
                    context.check_running()
                    whole.update(data)
                    own.update(data)
                if own.hexdigest() != piece.blake3:
                    raise ConversionError(
                        f"tensor {entry.name} in {context.against.path(entry.file)}: reads back as "
                        "other bytes than were written; look at the disk, then run again",
                        file=context.against.path(entry.file),
                    )
        return Done(self, {entry.name: whole.hexdigest()})


class Pieces:
    """The pieces of the tensors that are written in parts, until they are whole."""

    def __init__(self) -> None:
        self._found: dict[str, dict[int, Piece]] = {}

    def add(self, entry: TensorEntry, piece: Piece) -> SealJob | None:
        """Takes a piece of a tensor; what is to be done where it was the last one."""
        found = self._found.setdefault(entry.name, {})
        found[piece.start] = piece
        if sum(item.length for item in found.values()) < entry.nbytes:
            return None
        del self._found[entry.name]
        return SealJob(entry, tuple(found[start] for start in sorted(found)))


def part_of(job: Job) -> Key | None:
    """Which units of a module a job makes; None of other jobs, which are no module's."""
    if not isinstance(job, PartJob):
        return None
    return job.name, job.units.start, job.units.stop


def wanted_parts(plan: Plan, parts: Mapping[Key, PartDone]) -> list[Key]:
    """Those of the parts in a journal that jobs of this plan would make, of the same tensors."""
    names = {name for name, _, _ in parts}
    found = []
    for item in plan.items:
        for job in jobs_of(item) if item.name in names else ():
            key = part_of(job)
            if key is not None and key in parts and _fits(parts[key], plan):
                found.append(key)
    return found


def _fits(part: PartDone, plan: Plan) -> bool:
    """Whether its bytes are all within tensors of the plan."""
    names = {*part.tensors, *part.pieces}
    return names <= plan.entries.keys() and all(
        piece.start >= 0 <= piece.length and piece.start + piece.length <= plan.entries[name].nbytes
        for name, piece in part.pieces.items()
    )


def checks(part: PartDone, plan: Plan) -> dict[HashJob, str]:
    """What must still lie in the output where an earlier run has finished a part."""
    jobs = {hash_of(plan.entries[name]): digest for name, digest in part.tensors.items()}
    for name, piece in part.pieces.items():
        entry = plan.entries[name]
        offset = entry.offset + piece.start
        jobs[HashJob(name, entry.file, offset, piece.length)] = piece.blake3
    return jobs


def hash_of(entry: TensorEntry) -> HashJob:
    return HashJob(entry.name, entry.file, entry.offset, entry.nbytes)


def check_of(entry: TensorEntry, digest: str, path: str) -> HashJob:
    """Reads a tensor of an output, which must have this hash; ``path`` names its file."""
    what = f"tensor {entry.name} in {path}"
    return HashJob(entry.name, entry.file, entry.offset, entry.nbytes, digest, what)


def bytes_of(part: PartDone, plan: Plan) -> int:
    """How much of the output it is."""
    return sum(job.length for job in checks(part, plan))
