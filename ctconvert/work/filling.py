"""Makes the shards of a plan: runs its jobs, records what is finished, takes over what was."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from ctconvert.planning.memory import budget
from ctconvert.planning.place import readers
from ctconvert.progress import Progress
from ctconvert.records import Copy, Item, Plan, Restore, Shard
from ctconvert.store.base import Store
from ctconvert.store.direct import DiskStore
from ctconvert.store.local import LocalStore
from ctconvert.store.safetensors import TensorEntry
from ctconvert.store.writer import LocalSink
from ctconvert.work.executors import Executor
from ctconvert.work.jobs import Context, Done, HashJob, Job
from ctconvert.work.journal import Key, PartDone
from ctconvert.work.parts import (
    Pieces,
    SealJob,
    bytes_of,
    check_of,
    checks,
    hash_of,
    jobs_of,
    part_of,
    wanted_parts,
)
from ctconvert.work.staging import Staging


@dataclass
class Filling:
    """The shards of one build, being made.

    Args:
        plan: what they are.
        store: what they are made of.
        staging: where, and what of it is finished.
        executor, progress, device: as the build's settings have them.
        hashed: the source files to hash.
        check: read every shard but the last ones back while others are made.
    """

    plan: Plan
    store: Store
    staging: Staging
    executor: Executor
    progress: Progress
    device: str
    hashed: Collection[str]
    check: bool = False
    #: BLAKE3 hash of every tensor that is whole.
    hashes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._shards = {shard.name: shard for shard in self.plan.shards}
        self._items = {
            entry.name: item
            for item in self.plan.items
            if not isinstance(item, Copy)
            for entry in item.made
        }
        self._missing: dict[str, set[str]] = {}
        self._unmade: dict[str, int] = {}
        self._pieces = Pieces()
        self._sealing: deque[SealJob] = deque()
        #: The source files of each shard, and how many shards still read each.
        self._readers: dict[str, list[str]] = {}
        self._reading: Counter[str] = Counter()
        #: Source files whose hash is on its way.
        self._unhashed: set[str] = set()
        #: What is to be read back, what was, and the fingerprints of files before they were.
        self._checks: deque[HashJob] = deque()
        self._checked: list[HashJob] = []
        self._prints: dict[str, str] = {}

    # --- what an earlier run has finished ---------------------------------------------------------

    def take_over(self) -> int:
        """Keeps what is finished and still as the journal says; returns how many shards."""
        staging = self.staging
        with closing(LocalStore(staging.folder)) as made:
            whole = self._whole_shards(made)
            parts = self._whole_parts(made, whole)
        begun = {entry.file for part in parts.values() for entry in self._entries(part)}
        staging.keep_only(whole, begun, parts)
        self.know()
        if whole or parts:
            modules = len({item for item, _, _ in parts})
            also = f" and of others {modules} modules or parts" if parts else ""
            self.progress.note(f"{len(whole)} of {len(self.plan.shards)} shards{also} taken over")
        return len(whole)

    def know(self) -> None:
        """Takes the hashes of what is finished from the journal."""
        for hashes in self.staging.shards.values():
            self.hashes |= hashes

    def _whole_shards(self, made: LocalStore) -> set[str]:
        """The shards whose every tensor has the hash that the journal says."""
        plan, staging = self.plan, self.staging
        jobs: dict[HashJob, str] = {}
        whole: set[str] = set()
        for shard in plan.shards:
            hashes = staging.shards.get(shard.name)
            if hashes is None or hashes.keys() != set(shard.tensors):
                continue
            if self._begins_well(made, shard.name):
                whole.add(shard.name)
                jobs |= {hash_of(plan.entries[name]): hashes[name] for name in shard.tensors}
        whole -= {job.file for job in self._wrong(jobs, made)}
        return whole

    def _whole_parts(self, made: LocalStore, whole: set[str]) -> dict[Key, PartDone]:
        """The finished parts of items of other shards, which lie there as the journal says."""
        jobs: dict[HashJob, str] = {}
        parts: dict[Key, PartDone] = {}
        for key in wanted_parts(self.plan, self.staging.parts):
            part = self.staging.parts[key]
            files = {entry.file for entry in self._entries(part)}
            if not files & whole and all(self._begins_well(made, file) for file in files):
                parts[key] = part
                jobs |= checks(part, self.plan)
        wrong = set(self._wrong(jobs, made))
        return {
            key: part for key, part in parts.items() if not wrong & checks(part, self.plan).keys()
        }

    def _begins_well(self, made: LocalStore, name: str) -> bool:
        """Whether a shard has its size and its header."""
        shard = self._shards[name]
        header = self.plan.header(shard)
        return made.sizes().get(name) == shard.size and made.read(name, 0, len(header)) == header

    def _wrong(self, wanted: Mapping[HashJob, str], made: LocalStore) -> list[HashJob]:
        """The jobs that find another hash than they should."""
        if wanted:
            self.progress.phase("checking", sum(job.length for job in wanted))
        context = Context(made, progress=self.progress)
        found = ((d.job, d.hashes[d.job.name]) for d in self.executor.run(wanted, context))
        return [job for job, have in found if isinstance(job, HashJob) and have != wanted[job]]

    def _entries(self, part: PartDone) -> list[TensorEntry]:
        return [self.plan.entries[name] for name in (*part.tensors, *part.pieces)]

    # --- what this run makes ----------------------------------------------------------------------

    def fill(self, left: Sequence[Shard], sink: LocalSink) -> None:
        """Makes the shards that are not there, and hashes the source beside.

        Raises:
            CtconvertError: a job failed.
        """
        items: dict[str, list[Item]] = {shard.name: [] for shard in left}
        for item in self.plan.items:
            file = item.made[0].file
            if file in items:
                items[file].append(item)
        self._missing = {shard.name: set(shard.tensors) for shard in left}
        label = "converting" if self.plan.kind == "converted" else "restoring"
        done = sum(bytes_of(part, self.plan) for part in self.staging.parts.values())
        total = sum(self.plan.entries[name].nbytes for shard in left for name in shard.tensors)
        self.progress.phase(label, total - done)
        self._run(self._jobs(left, items, sink), sink)
        while self._sealing:
            self._run(self._seals(), sink)
        if lacking := [name for names in self._missing.values() for name in names]:
            raise AssertionError(f"no job has made {lacking[0]}")

    def _jobs(
        self, left: Sequence[Shard], items: dict[str, list[Item]], sink: LocalSink
    ) -> Iterator[Job]:
        self._readers = readers(self.plan)
        self._reading = Counter(file for shard in left for file in self._readers[shard.name])
        hashing = self._source_jobs()
        self._unhashed = set(hashing)
        parts = dict(self.staging.parts)  # as they were: those that this run makes come to it
        begun = {entry.file for part in parts.values() for entry in self._entries(part)}
        for shard in left:
            for file in self._readers[shard.name]:
                if (ahead := hashing.pop(file, None)) is not None:
                    yield ahead
            if shard.name not in begun:
                sink.create(shard.name, self.plan.header(shard), shard.size)
            if not items[shard.name]:
                self._finish_shard(shard, sink)
            for item in items[shard.name]:
                for job in jobs_of(item):
                    key = part_of(job)
                    if key is None or key not in parts:
                        yield job
                    else:
                        self._take(Done(job, parts[key].tensors, parts[key].pieces), sink)
                    yield from self._seals()
                # as much as is made: the disk reads and writes at once
                yield from self._next_checks(len(item.made))
        yield from hashing.values()

    def seen(self, made: Store) -> set[str]:
        """The tensors that were read back, of files that are what they were before that."""
        same = {name for name, found in self._prints.items() if made.fingerprint(name) == found}
        return {job.name for job in self._checked if job.file in same}

    def _source_jobs(self) -> dict[str, Job]:
        """Hashes of the source's files that are not known; read in order, they read ahead.

        What is kept beside the output, and read on, may have been lost since it was hashed.
        """
        return {
            file.name: HashJob(file.name, file.name, 0, file.size, counted=False, of_source=True)
            for file in self.plan.source.hashed
            if file.name in self.hashed
            and (
                file.name not in self.staging.sources
                or (self._reading[file.name] and self.store.stated_sha256(file.name) is not None)
            )
        }

    def _release(self, file: str) -> None:
        """Gives up a source file that no shard needs again."""
        if file not in self._unhashed and not self._reading[file]:
            self.store.release(file)

    def _seals(self) -> Iterator[Job]:
        while self._sealing:
            yield self._sealing.popleft()

    def _next_checks(self, count: int) -> Iterator[Job]:
        for _ in range(min(count, len(self._checks))):
            yield self._checks.popleft()

    def _run(self, jobs: Iterable[Job], sink: LocalSink) -> None:
        with closing(DiskStore(self.staging.folder)) as made:
            context = Context(
                self.store,
                sink,
                made,
                device=self.device,
                memory=budget(self.plan, self.executor.workers),
                progress=self.progress,
            )
            with closing(self.executor.run(jobs, context)) as results:
                for done in results:
                    if isinstance(done.job, HashJob) and done.job.made:
                        self._checked.append(done.job)
                        continue
                    if isinstance(done.job, HashJob):
                        for name, digest in done.hashes.items():
                            self.staging.finished_source(name, digest)
                            self._unhashed.discard(name)
                            self._release(name)
                        continue
                    if (key := part_of(done.job)) is not None:
                        self.staging.finished_part(PartDone(*key, done.hashes, done.pieces))
                    self._take(done, sink)

    def _take(self, done: Done, sink: LocalSink) -> None:
        """Notes what there is now, and finishes the shards that lack nothing more."""
        for name, piece in done.pieces.items():
            if seal := self._pieces.add(self.plan.entries[name], piece):
                self._sealing.append(seal)
        self.hashes |= done.hashes
        self._tell_made(done)
        for name in done.hashes:
            file = self.plan.entries[name].file
            self._missing[file].discard(name)
            if not self._missing[file]:
                self._finish_shard(self._shards[file], sink)

    def _tell_made(self, done: Done) -> None:
        """Tells of the modules whose last tensor this is."""
        for name in done.hashes:
            item = self._items.get(name)
            if item is None:
                continue
            left = self._unmade.get(item.name, len(item.made)) - 1
            self._unmade[item.name] = left
            if left:
                continue
            if isinstance(item, Restore):
                for source in dict.fromkeys(s.name for m in item.modules for s in m.sources):
                    self.progress.module(source, None)
            else:
                self.progress.module(item.name, item.recipe.layout)

    def _finish_shard(self, shard: Shard, sink: LocalSink) -> None:
        self._prints[shard.name] = sink.finish(shard.name)
        self.staging.finished_shard(shard.name, {name: self.hashes[name] for name in shard.tensors})
        if self.check:
            path = str(self.staging.folder / shard.name)
            for name in shard.tensors:
                job = check_of(self.plan.entries[name], self.hashes[name], path)
                self._checks.append(replace(job, made=True, counted=False))
        for file in self._readers[shard.name]:
            self._reading[file] -= 1
            self._release(file)
