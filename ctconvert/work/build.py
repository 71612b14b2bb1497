"""The one lifecycle of everything that makes a directory: check, stage, run, verify, commit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ctconvert.errors import BadInputError, ConversionError, CtconvertError, UsageError
from ctconvert.output import Output
from ctconvert.planning.make import refuse
from ctconvert.planning.place import disk_bytes, index_of, spool_bytes
from ctconvert.progress import Progress
from ctconvert.records import (
    FORMAT_VERSION,
    LARGEST_MANIFEST,
    FileRecord,
    Manifest,
    Plan,
    Report,
    SourceRecord,
    Tool,
    to_json,
)
from ctconvert.store.base import Store
from ctconvert.store.checkpoint import CONFIG, INDEX, MANIFEST
from ctconvert.store.direct import DiskStore
from ctconvert.store.hub import to_download
from ctconvert.store.local import LocalStore
from ctconvert.store.places import JOURNAL, check_links, check_place, recover
from ctconvert.store.writer import LocalSink
from ctconvert.version import __version__
from ctconvert.work.executors import Executor
from ctconvert.work.filling import Filling
from ctconvert.work.jobs import Context, HashJob
from ctconvert.work.joining import Joining
from ctconvert.work.journal import Commit, Identity, read_journal
from ctconvert.work.shares import Share, hashed_by, share_of
from ctconvert.work.staging import Staging, begun_in, discard_leftovers, root_of
from ctconvert.work.verify import verify_output

#: Tensors from which on the size of the manifest is worth a look.
_MANY = 100_000


@dataclass(frozen=True)
class Settings:
    """How a build runs; nothing of it shapes the bytes of the output.

    Args:
        executor: what runs the jobs.
        device: where transforms run, as ``--device`` names it.
        resume: take over what an earlier, killed run has finished.
        overwrite: replace what is there.
        verify: read the output back and check every hash before it appears.
        progress: told of bytes done.
        share: make this share alone, in a folder of its own in the partial output.
        commit: make nothing, but join the shares that are there.
    """

    executor: Executor
    progress: Progress
    device: str = "cpu"
    resume: bool = False
    overwrite: bool = False
    verify: bool = True
    share: Share | None = None
    commit: bool = False


def build(plan: Plan, store: Store, out: Path, settings: Settings) -> Report:
    """Makes a planned checkpoint under ``out``.

    Args:
        plan: without refusals; of the whole, where a share is made, too.
        store: what the plan was made of.
        out: the directory to make; its parent is made where missing.
        settings: how.

    Raises:
        UnsupportedError: the plan has refusals.
        UsageError: ``out`` exists, overlaps the source or holds what files of it are links to; a
            share is not there to be joined, or not of this plan.
        BadInputError: the source's data is damaged (a NaN scale, a code out of range).
        ConversionError: the disk is full, a transform failed, or the source changed meanwhile.
    """
    refuse(plan)
    _check_manifest(plan)
    if settings.resume and settings.overwrite:
        raise UsageError("--resume and --overwrite contradict each other; give one of them")
    if settings.share is not None and settings.commit:
        raise UsageError("--part and --commit contradict each other; give one of them")
    local = store if isinstance(store, LocalStore) else None
    out = check_place(None if local is None else local.root, out)
    if local is not None:
        check_links(local, out)
    recover(out)
    made = plan if settings.share is None else share_of(plan, settings.share)
    settings.progress.plan(made)
    with closing(store):
        taken_over = settings.resume or settings.commit
        if taken_over and (done := _complete(plan, store, out, settings)):
            return done
        if settings.share is not None and not made.shards:
            settings.progress.note(
                f"part {settings.share} makes nothing: there are {len(plan.shards)} output files; "
                "a smaller --max-shard-size makes more of them"
            )
        resumed = _Build(plan, made, store, out, settings).run()
    return _report(made, out, resumed, settings.share)


def _check_manifest(plan: Plan) -> None:
    """Raises UsageError where the manifest would be larger than what is read."""
    if len(plan.entries) < _MANY:
        return
    size = len(to_json(plan, indent=1)) + sum(len(name) + 80 for name in plan.entries)
    if size > LARGEST_MANIFEST:
        advice = (
            "--expert-parallel, or fewer ranks" if plan.options.tensor_parallel > 1 else "--fuse"
        )
        raise UsageError(
            f"its manifest would have {size} bytes, and {LARGEST_MANIFEST} are the most that is "
            f"read: use {advice}"
        )


def _asked(plan: Plan) -> str:
    """A hash of what was asked for, by which an unfinished run is known again."""
    asked = [__version__, FORMAT_VERSION, plan.kind, to_json(plan.options).decode()]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _complete(plan: Plan, store: Store, out: Path, settings: Settings) -> Report | None:
    """The report of an output that an earlier run has completed, or None.

    Raises:
        UsageError: it is there, the source has changed since, and no unfinished run was to
            replace it.
        VerificationError: it is damaged.
    """
    if not (out / MANIFEST).is_file():
        return None
    with closing(LocalStore(out)) as local:
        try:
            manifest = Manifest.load(local)
        except CtconvertError:
            return None  # not this program's: the staging says what may be done with it
        if manifest.plan.options != plan.options or manifest.plan.kind != plan.kind:
            return None
        committed = Commit(manifest.manifest_sha256) in read_journal(root_of(out) / JOURNAL)
        if settings.overwrite and not committed:
            return None  # another one, which the shares are to replace
        if not _made_of(manifest, plan, store, settings):
            begun = begun_in(root_of(out, settings.share))
            if begun is not None and begun.overwrite and begun.identity.options == _asked(plan):
                return None
            raise UsageError(
                f"{out} is complete, but the source has changed since it was made; use --overwrite "
                "to convert it again"
            )
        if settings.verify and settings.share is None:
            verify_output(Output(local), settings.executor, settings.progress)
    discard_leftovers(out, _asked(plan))
    settings.progress.note(f"{out} is already complete")
    return _report(plan, out, resumed=len(plan.shards))


def _made_of(manifest: Manifest, plan: Plan, store: Store, settings: Settings) -> bool:
    """Whether an output was made of this very source: by its plan, and the bytes of its files."""
    if manifest.plan.digest() != plan.digest():
        return False
    settings.progress.note(f"{store.where}: comparing it with what the output was made of")
    names = [file.name for file in (*plan.source.hashed, *plan.side_files)]
    # the plan names the commit, whose files never change: what the Hub states need not be read
    names = [name for name in names if store.stated_sha256(name) is None]
    recorded = {record.name: record.sha256 for record in manifest.files}
    recorded |= {record.name: record.blake3 for record in manifest.sources}
    small = {file.name for file in plan.side_files}
    context = Context(store, progress=settings.progress)
    sizes = store.sizes()
    settings.progress.phase("comparing", sum(sizes[name] for name in names))
    jobs = [
        HashJob(name, name, 0, sizes[name], algorithm="sha256" if name in small else "blake3")
        for name in names
    ]
    with closing(settings.executor.run(jobs, context)) as results:
        return all(
            recorded.get(name) == digest for done in results for name, digest in done.hashes.items()
        )


class _Build:
    """One run of the lifecycle, from an open staging to a commit."""

    def __init__(self, plan: Plan, made: Plan, store: Store, out: Path, settings: Settings) -> None:
        self.plan = plan
        self.made = made
        self.store = store
        self.settings = settings
        self.watched = [file.name for file in (*plan.source.files, *plan.side_files)]
        self.prints = {name: store.fingerprint(name) for name in self.watched}
        identity = Identity(_asked(plan), plan.digest(), self.prints)
        self.staging = Staging(out, identity, settings.share, settings.commit)
        self.hashes: dict[str, str] = {}

    def run(self) -> int:
        """Returns how many shards were taken over."""
        if not self.settings.commit:
            return self._run(None)
        with closing(Joining(self.plan, self.store, self.staging)) as joining:
            joining.check()
            return self._run(joining)

    def _run(self, joining: Joining | None) -> int:
        settings, staging, share = self.settings, self.staging, self.settings.share
        taken_over = settings.resume or joining is not None
        sink = staging.open(resume=taken_over, overwrite=settings.overwrite)
        try:
            if staging.note:
                settings.progress.note(staging.note)
            filling = Filling(
                self.made,
                self.store,
                staging,
                settings.executor,
                settings.progress,
                settings.device,
                {file.name for file in self.plan.source.hashed}
                if share is None
                else hashed_by(self.plan, share, self.store),
                check=settings.verify and share is None and settings.executor.here,
            )
            resumed = filling.take_over()
            if joining is not None:
                joining.move()
                filling.know()
                resumed = len(staging.shards)
            left = [shard for shard in self.made.shards if shard.name not in staging.shards]
            done = self.made.tensor_bytes - sum(shard.size for shard in left)
            kept = self._kept() if left and self.store.keep_in(staging.source) else 0
            staging.check_space(disk_bytes(self.made) - done + kept)
            filling.fill(left, sink)
            if share is not None:
                sink.sync()
                self._check_unchanged()
                return resumed
            self.hashes = filling.hashes
            manifest = self._finish(sink)
            self._check_unchanged()
            if settings.verify:
                output = Output(DiskStore(staging.folder))
                seen = filling.seen(output.store)
                verify_output(output, settings.executor, settings.progress, seen)
            staging.commit(manifest.manifest_sha256)
        except BadInputError:
            self.store.close()  # it may still be fetching
            staging.discard()  # nothing in it can be of use: the source must change
            raise
        finally:
            sink.close()
            staging.close()
        return resumed

    def _kept(self) -> int:
        """Bytes of source files that lie beside the output at a time, at most."""
        source = self.plan.source
        files = {file.name: file.size for file in source.files}
        return min(spool_bytes(self.made), to_download(source.id, source.revision, files))

    def _finish(self, sink: LocalSink) -> Manifest:
        """Everything but the shards; the manifest last."""
        plan, files = self.plan, []
        for shard in plan.shards:
            digest = hashlib.sha256(plan.header(shard)).hexdigest()
            files.append(FileRecord(shard.name, shard.size, digest))
        made = {CONFIG: plan.config.encode()}
        if len(plan.shards) > 1:
            index = index_of(plan.shards, plan.entries)
            made[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
        for name, data in made.items():
            sink.put(name, data)
            files.append(FileRecord(name, len(data), hashlib.sha256(data).hexdigest()))
        for file in plan.side_files:
            digests = _Hashing(self.store.pieces(file.name))
            sink.put(file.name, digests)
            self.store.check_sha256(file.name, digests.hexdigest())
            files.append(FileRecord(file.name, digests.size, digests.hexdigest()))
        sizes = self.store.sizes()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            tool=Tool("ctconvert", __version__),
            plan=plan,
            tensor_hash="blake3",
            tensors={entry.name: self.hashes[entry.name] for entry in plan.entries.values()},
            files=tuple(files),
            sources=tuple(
                SourceRecord(file.name, sizes[file.name], self.staging.sources[file.name])
                for file in plan.source.hashed
            ),
        )
        data = manifest.dump()
        sink.put(MANIFEST, data)
        sink.sync()
        return Manifest.parse(data, MANIFEST)

    def _check_unchanged(self) -> None:
        """Raises ConversionError where the source is no longer what it was at the beginning."""
        for name, before in self.prints.items():
            try:
                same = self.store.fingerprint(name) == before
            except ConversionError:
                same = False
            if not same:
                self.staging.discard()
                raise ConversionError(
                    f"{self.store.path(name)}: changed while it was being converted; nothing was "
                    "kept",
                    file=self.store.path(name),
                )


class _Hashing:
    """Pieces of a file on their way, hashed and counted."""

    def __init__(self, pieces: Iterable[memoryview]) -> None:
        self._pieces = pieces
        self._digest = hashlib.sha256()
        self.size = 0

    def __iter__(self) -> Iterator[memoryview]:
        for piece in self._pieces:
            self._digest.update(piece)
            self.size += len(piece)
            yield piece

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _report(plan: Plan, out: Path, resumed: int, share: Share | None = None) -> Report:
    converted = plan.kind == "converted"
    sources: Mapping[str, int] = {file.name: file.size for file in plan.source.files}
    return Report(
        out=str(out),
        target=plan.options.target,
        layouts=plan.layouts(),
        modules=len(plan.modules if converted else plan.restored),
        copied_tensors=len(plan.copies),
        kept=plan.kept,
        shards=len(plan.shards),
        resumed_shards=resumed,
        source_bytes=sum(sources.values()),
        output_bytes=plan.tensor_bytes,
        side_files=tuple(file.name for file in plan.side_files),
        notes=plan.notes,
        part=None if share is None else str(share),
    )
