"""Proves an output: its bytes against its manifest, its codes and scales against the source."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import closing

from msgspec.structs import replace

from ctconvert.errors import VerificationError
from ctconvert.output import Output
from ctconvert.planning.describe import describe
from ctconvert.planning.make import joined_rows
from ctconvert.planning.memory import budget, dense_bytes
from ctconvert.progress import Progress
from ctconvert.records import Compared, Judged, SourceModule, Verified
from ctconvert.specs import differing_field
from ctconvert.store.checkpoint import CONFIG, Checkpoint
from ctconvert.store.safetensors import TensorEntry, total_bytes
from ctconvert.work.executors import Executor
from ctconvert.work.importing import load_torch
from ctconvert.work.jobs import CompareBytesJob, Context, HashJob, Job
from ctconvert.work.parts import check_of, ranges


def verify_output(
    output: Output, executor: Executor, progress: Progress, seen: Collection[str] = ()
) -> Verified:
    """Checks every byte of an output against its manifest, in one pass.

    Args:
        output: what is checked.
        executor: what reads.
        progress: told of bytes read.
        seen: tensors that have been read back already, and are what they should be.

    Raises:
        VerificationError: something differs; the message names the tensor or the file.
        ConversionError: it is no longer the output that was opened.
    """
    store, manifest = output.store, output.manifest
    entries = sorted(output.plan.entries.values(), key=lambda entry: (entry.file, entry.offset))
    left = [entry for entry in entries if entry.name not in seen]
    progress.phase("verifying", total_bytes(left))
    jobs: list[Job] = [
        HashJob(
            record.name,
            record.name,
            0,
            record.size,
            record.sha256,
            store.path(record.name),
            counted=False,
            algorithm="sha256",
        )
        for record in output.whole_files()
    ]
    jobs += [
        check_of(entry, manifest.tensors[entry.name], store.path(entry.file)) for entry in left
    ]
    with closing(store):
        for _ in executor.run(jobs, Context(store, progress=progress)):
            pass
        output.check_unchanged()
    return Verified(
        checkpoint=store.where,
        tensors=len(entries),
        modules=len(output.plan.modules),
        files=len(manifest.files) + 1,
        bytes=sum(record.size for record in manifest.files),
    )


def verify_independently(
    output: Output, checkpoint: Checkpoint, executor: Executor, progress: Progress
) -> Judged:
    """Compares the weights of an output with what compressed-tensors decodes of the source.

    Args:
        output: a converted checkpoint, which :func:`verify_against` has compared.
        checkpoint: what it was made from.
        executor: what runs the comparisons.
        progress: told of source bytes done.

    Raises:
        VerificationError: a weight differs; the message names the module and the first element.
        ConversionError: the output or the source is no longer the one that was opened.
        UsageError: compressed-tensors is not installed.
    """
    from ctconvert.work.independent import judge, judge_jobs

    description = describe(checkpoint)
    items = []
    for item in output.plan.modules:
        sources = [description.modules[source.name].source for source in item.sources]
        assert all(sources)
        items.append(replace(item, sources=tuple(source for source in sources if source)))
    progress.phase("judging", sum(s.nbytes for item in items for s in item.sources))
    context = Context(
        output.store,
        against=checkpoint.store,
        memory=(256 << 20) + max(map(dense_bytes, items), default=0),
        progress=progress,
    )
    with closing(output.store), closing(checkpoint.store):
        judged = judge(judge_jobs(items, description), context, executor)
        _check_unchanged(output, checkpoint)
    return judged


def verify_against(
    output: Output, checkpoint: Checkpoint, executor: Executor, progress: Progress
) -> Compared:
    """Inverts every layout of an output and compares it with the source, bit for bit.

    Of a restored checkpoint there is nothing to invert: its tensors and its config.json must be the
    source's to the byte, and 2:4 sparse weights the same as dense ones.

    Args:
        output: a converted or restored checkpoint.
        checkpoint: what it was made from.
        executor: what runs the comparisons.
        progress: told of source bytes done.

    Raises:
        VerificationError: a code, scale, zero point or copied tensor differs, is missing, or is
            too many; the message names the module or the tensor.
        ConversionError: the output or the source is no longer the one that was opened.
    """
    load_torch()
    restored = output.plan.kind == "restored"
    jobs = (_restored_comparisons if restored else _comparisons)(output, checkpoint)
    copied = sum(isinstance(job, CompareBytesJob) for job in jobs)
    total = total_bytes(checkpoint.tensors.values())
    progress.phase("comparing", total)
    context = Context(
        output.store,
        against=checkpoint.store,
        memory=budget(output.plan, executor.workers, compare=True),
        progress=progress,
    )
    with closing(output.store), closing(checkpoint.store):
        for _ in executor.run(jobs, context):
            pass
        _check_unchanged(output, checkpoint)
    return Compared(
        checkpoint=output.where,
        source=checkpoint.store.where,
        modules=len(jobs) - copied if restored else len(output.plan.modules),
        copied_tensors=copied if restored else len(output.plan.copies),
        source_bytes=total,
    )


def _check_unchanged(output: Output, checkpoint: Checkpoint) -> None:
    """Raises ConversionError unless both are still what was opened, and so one with the other."""
    output.check_unchanged()
    checkpoint.check_unchanged()


def _comparisons(output: Output, checkpoint: Checkpoint) -> list[Job]:
    """What must be compared.

    Everything of the source must have its place in the output, and nothing else may be there.
    """
    from ctconvert.work.transforming import CompareJob

    where = checkpoint.store.where
    modules = describe(checkpoint).modules
    covered: set[str] = set()
    jobs: list[Job] = []
    for item in output.plan.modules:
        sources = []
        for recorded in item.sources:
            module = modules.get(recorded.name)
            if module is None or module.source is None:
                why = f": {module.reason}" if module is not None else ""
                raise VerificationError(
                    f"module {item.name}: its part {recorded.name} is no quantised module of "
                    f"{where}{why}",
                    module=item.name,
                )
            _check_same(item.name, recorded, module.source, where)
            sources.append(module.source)
            covered |= {entry.name for entry in module.source.tensors.values()}
            covered |= {entry.name for entry in module.source.beside.values()}
        found = replace(item, sources=tuple(sources))
        jobs += [CompareJob(found, *units) for units in ranges(found)]
        for local, joined in item.beside.items():
            originals = [source.beside[local] for source in sources]
            jobs.append(_bytes(joined, originals, found.stacked))
    for copy in output.plan.copies:
        entry = checkpoint.tensors.get(copy.name)
        if entry is None:
            raise VerificationError(f"tensor {copy.name}: not in {where}")
        covered.add(copy.name)
        jobs.append(_bytes(copy.output, [entry]))
    if missing := checkpoint.tensors.keys() - covered:
        raise VerificationError(f"tensor {min(missing)} of {where} has no place in the output")
    return jobs


def _restored_comparisons(output: Output, checkpoint: Checkpoint) -> list[Job]:
    """What must be compared of a restored checkpoint: every tensor of it."""
    from ctconvert.work.transforming import CompareSourcesJob

    where, made = checkpoint.store.where, output.plan.entries
    if output.plan.config != checkpoint.config_text:
        raise VerificationError(
            f"{output.store.path(CONFIG)} is not the one of {where}", file=output.store.path(CONFIG)
        )
    if missing := checkpoint.tensors.keys() - made.keys():
        raise VerificationError(f"tensor {min(missing)} of {where} is missing")
    if over := made.keys() - checkpoint.tensors.keys():
        raise VerificationError(f"tensor {min(over)}: not in {where}")
    jobs: list[Job] = []
    rest = dict(made)
    modules = describe(checkpoint).modules
    for source in output.plan.restored:
        if not source.weight.sparse:
            continue
        module = modules.get(source.name)
        if module is None or module.source is None:
            raise VerificationError(
                f"module {source.name}: no quantised module of {where}", module=source.name
            )
        _check_same(source.name, source, module.source, where)
        places = {local: made[entry.name] for local, entry in source.tensors.items()}
        jobs.append(CompareSourcesJob(replace(source, tensors=places), module.source))
        for local in places.keys() - source.values.keys():
            del rest[places[local].name]
    jobs += [_bytes(entry, [checkpoint.tensors[name]]) for name, entry in rest.items()]
    return jobs


def _check_same(name: str, recorded: SourceModule, found: SourceModule, where: str) -> None:
    """The same codes can mean other weights; raises VerificationError where they would."""
    if field := differing_field(recorded.weight, found.weight):
        have, want = getattr(recorded.weight, field), getattr(found.weight, field)
        raise VerificationError(
            f"module {name}: {field} of {recorded.name} is {have} in the output and "
            f"{want} in {where}",
            module=name,
        )
    if recorded.experts != found.experts or recorded.beside.keys() != found.beside.keys():
        raise VerificationError(
            f"module {name}: {recorded.name} of {where} holds other tensors or experts", module=name
        )


def _bytes(
    made: TensorEntry, originals: list[TensorEntry], stacked: int | None = None
) -> CompareBytesJob:
    if made.spec != joined_rows(originals, stacked):
        raise VerificationError(f"tensor {made.name}: {made.spec} is not the source's")
    return CompareBytesJob(made, tuple(originals))
