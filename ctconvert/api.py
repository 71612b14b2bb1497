"""The verbs as functions. They raise :class:`ctconvert.errors.CtconvertError` and print nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from ctconvert.errors import CtconvertError, UsageError
from ctconvert.output import Output
from ctconvert.planning.asked import check_shard_size, no_collection, options_of
from ctconvert.planning.choose import check_options, dtype_named
from ctconvert.planning.describe import describe
from ctconvert.planning.inspection import (
    Inspection,
    converted_inspection,
    inspection,
    is_converted,
)
from ctconvert.planning.make import make_plan, restore_plan
from ctconvert.progress import Progress, Silent
from ctconvert.publishing import push
from ctconvert.records import Differing, Examination, Options, Plan, Pushed, Report, Verified
from ctconvert.store.checkpoint import MANIFEST, Checkpoint
from ctconvert.store.hub import home_path, open_store

__all__ = [
    "CtconvertError",
    "Differing",
    "Examination",
    "Inspection",
    "Plan",
    "Progress",
    "Pushed",
    "Report",
    "Verified",
    "default_out",
    "diff",
    "doctor",
    "inspect",
    "plan",
    "push",
    "repack",
    "restore",
    "verify",
]


def inspect(
    model: str | Path, *, target: str | None = None, dtype: str | None = None
) -> Inspection:
    """What a checkpoint holds: schemes by module, sizes, oddities; reads headers only.

    Args:
        model: a directory or a Hub id (``org/name``, ``org/name@revision``), source or converted.
        target: also say what each module would become for it, or why it cannot; of a source.
        dtype: as for :func:`plan`.

    Returns:
        the content of ``ctconvert inspect --json``.

    Raises:
        UsageError: there is no such model or target.
        BadInputError: the checkpoint is damaged or contradicts itself.
        VerificationError: it is a converted one, and damaged.
    """
    options = None
    if target is not None:
        options = Options(target=target, keep_unsupported=True, dtype=dtype_named(dtype))
    if options is not None:
        check_options(options)
    with no_collection():
        checkpoint = Checkpoint(open_store(str(model), download=False))
        if is_converted(checkpoint.config) and MANIFEST in checkpoint.store.sizes():
            if target is not None:
                raise UsageError(
                    f"{model} is kernel-ready already; --target is for what it was made from"
                )
            output = Output(checkpoint.store)
            return converted_inspection(output.store, output.plan)
        description = describe(checkpoint)
        return inspection(description, None if options is None else make_plan(description, options))


def doctor(
    model: str | Path,
    *,
    target: str | None = None,
    tensor_parallel: Sequence[int] = (1,),
    data: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Examination:
    """Tells what will go wrong with a checkpoint before it is served.

    Args:
        model: a directory or a Hub id.
        target: also look for what no layout of it takes.
        tensor_parallel: numbers of ranks over which the model shall be split.
        data: read the weights too, not headers alone.
        workers: threads.
        progress: told of bytes done.

    Returns:
        the content of ``ctconvert doctor --json``; something is wrong where it has ``errors``.

    Raises:
        UsageError: there is no such model or target.
        BadInputError: it is no compressed-tensors checkpoint, or a file is damaged.
        ConversionError: it changed meanwhile.
    """
    from ctconvert.work.choosing import threads
    from ctconvert.work.examining import examine

    executor = threads(workers) if data else None
    checkpoint = Checkpoint(open_store(str(model), download=False))
    with no_collection():
        return examine(checkpoint, target, tuple(tensor_parallel), executor, progress or Silent())


def plan(
    model: str | Path,
    *,
    target: str,
    fuse: bool = False,
    keep_unsupported: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layout: Mapping[str, str] | None = None,
    max_shard_size: int = 5_000_000_000,
    dtype: str | None = None,
    tensor_parallel: int = 1,
    expert_parallel: bool = False,
    download: bool = False,
) -> Plan:
    """Decides layout, name, dtype, shape, shard and offset of every output tensor.

    Args:
        model: a directory or a Hub id.
        target: one of ``ctconvert.layouts.TARGETS``.
        fuse: join q/k/v and gate/up projections; stack experts that are one by one.
        keep_unsupported: copy modules without a layout instead of refusing them.
        include: patterns (glob, or ``re:`` and a regular expression) of the quantised modules to
            convert; all where empty. The others are copied.
        exclude: patterns of quantised modules to copy.
        layout: layout by module name pattern (glob, or ``re:`` and a regular expression).
        max_shard_size: bytes of tensors in one output file; a module is never split.
        dtype: ``bfloat16`` or ``float16``, of the activations, which the bytes of some layouts
            depend on; config.json's where None, and bfloat16 where it names none.
        tensor_parallel: the number of ranks for each of which modules are cut, as an engine of
            that size has them.
        expert_parallel: ranks have whole experts, not a share of each.
        download: fetch a Hub model's files now, so that the plan can be carried out.

    Returns:
        the plan; its ``refusals`` list what no layout takes.

    Raises:
        UsageError: there is no such model, target or layout.
        BadInputError: the checkpoint is damaged or contradicts itself.
    """
    options = options_of(
        target,
        fuse,
        keep_unsupported,
        include,
        exclude,
        layout,
        max_shard_size,
        dtype,
        tensor_parallel,
        expert_parallel,
    )
    with no_collection():
        return make_plan(describe(Checkpoint(open_store(str(model), download=download))), options)


def default_out(model: str | Path, target: str) -> Path:
    """``MODEL-TARGET`` beside a directory; in the current one for a Hub id."""
    path = home_path(model)
    if path.is_dir():
        path = path.resolve()
        return path.with_name(f"{path.name}-{target}")
    return Path(f"{str(model).partition('@')[0].rpartition('/')[2]}-{target}")


def repack(
    model: str | Path,
    out: str | Path | None = None,
    *,
    target: str,
    device: str = "auto",
    fuse: bool = False,
    keep_unsupported: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layout: Mapping[str, str] | None = None,
    max_shard_size: int = 5_000_000_000,
    dtype: str | None = None,
    local_copy: bool = False,
    tensor_parallel: int = 1,
    expert_parallel: bool = False,
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    part: tuple[int, int] | None = None,
    commit: bool = False,
    executor: str = "threads",
    address: str = "auto",
    push_to: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Converts a compressed-tensors checkpoint into a kernel-ready one.

    Args:
        model, target, fuse, keep_unsupported, include, exclude, layout, max_shard_size, dtype,
            tensor_parallel, expert_parallel: as for :func:`plan`.
        out: the directory to make; ``MODEL-TARGET`` beside the model where not given.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``xpu``: where transforms run; without
            an index, on all of that kind.
        local_copy: download a Hub model into the local cache first; else its files are fetched
            as they are needed, and kept beside ``out`` no longer than that.
        workers: threads that read, transform and write; chosen by the machine where None.
        resume: take over the finished modules of a killed run.
        overwrite: replace an existing output.
        verify: read the output back and check every hash.
        part: ``(i, n)``: make the i-th of n shares of the output's files, from 1 on, beside
            ``out``; n processes on any machines that see both make all of it, at once or not.
        commit: make nothing, but join the parts, all of which must be there.
        executor: ``threads``, or ``ray``: a Ray cluster's nodes, which see both under these paths.
        address: of that cluster, which is not started.
        push_to: the Hub repository to :func:`push` it to.
        progress: told of bytes done.

    Returns:
        the report, the content of ``ctconvert repack --json``.

    Raises:
        UsageError, BadInputError: as for :func:`plan`; ``out`` exists or overlaps the source; a
            part to join is missing, unfinished or of another conversion.
        UnsupportedError: the target has no layout for a module.
        ConversionError: the disk is full, or a transform failed.
    """
    from ctconvert.work.build import Settings, build
    from ctconvert.work.choosing import device_named, directory_of, executor_named
    from ctconvert.work.shares import share

    if part is not None and push_to is not None:
        raise UsageError("--push is for a whole output; give it with --commit, not with --part")
    destination = default_out(model, target) if out is None else home_path(out)
    chosen = executor_named(executor, workers, address, device)
    if executor == "ray":  # whose nodes have other current directories
        model, destination = directory_of(model), destination.absolute()
    settings = Settings(
        executor=chosen,
        progress=progress or Silent(),
        device=device if executor == "ray" else device_named(device),
        resume=resume,
        overwrite=overwrite,
        verify=verify,
        share=None if part is None else share(*part),
        commit=commit,
    )
    options = options_of(
        target,
        fuse,
        keep_unsupported,
        include,
        exclude,
        layout,
        max_shard_size,
        dtype,
        tensor_parallel,
        expert_parallel,
    )
    if push_to is not None:
        from ctconvert.publishing.upload import Place, check_place

        check_place(Place(push_to))
    store = open_store(str(model), download=local_copy)
    with no_collection():
        planned = make_plan(describe(Checkpoint(store)), options)
    report = build(planned, store, destination, settings)
    if push_to is None:
        return report
    return replace(report, pushed=push(destination, push_to, workers=workers, progress=progress))


def verify(
    out: str | Path,
    *,
    against: str | Path | None = None,
    independent: bool = False,
    kernels: bool = False,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Proves an output: every byte against the manifest, and with ``against`` every code and scale.

    Args:
        out: a converted checkpoint, a directory or a Hub id.
        against: the model it was made from, a directory or a Hub id.
        independent: also compare the weights with what compressed-tensors' own decompressors
            make of ``against``.
        kernels: also run every module's kernel against the reference.
        device: where the kernels run.
        workers: threads.
        progress: told of bytes done.

    Returns:
        the report, the content of ``ctconvert verify --json``. Modules in its ``without_kernel``
        were not run, and the verb fails.

    Raises:
        UsageError: there is no such checkpoint, or ``independent`` without ``against``.
        VerificationError: something differs; the message names the tensor, module or file.
        ConversionError: the output or the model was exchanged or changed meanwhile.
    """
    from ctconvert.work.choosing import threads
    from ctconvert.work.verify import verify_against, verify_independently, verify_output

    if independent and against is None:
        raise UsageError("--independent compares with a source; name it by --against MODEL")
    shown, executor = progress or Silent(), threads(workers)
    output = Output.open(out, copy=kernels)
    if independent and output.plan.kind == "restored":
        raise UsageError(
            f"{out} is a restored checkpoint, whose tensors --against compares as they are; "
            "--independent is for converted ones"
        )
    found = verify_output(output, executor, shown)
    if against is not None:
        checkpoint = Checkpoint(open_store(str(against), download=False))
        compared = verify_against(output, checkpoint, executor, shown)
        found = replace(found, against=compared)
        if independent:
            judged = verify_independently(output, checkpoint, executor, shown)
            found = replace(found, independent=judged)
    if kernels:
        from ctconvert.work.importing import load_torch

        load_torch()
        from ctconvert.runtime.proof import verify_kernels

        proved = verify_kernels(output, device, shown)
        runs = {run.layout: run for run in proved.runs}
        found = replace(found, kernels=runs, without_kernel=proved.missing)
    return found


def diff(
    a: str | Path,
    b: str | Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Differing:
    """Compares the decoded weights of two checkpoints, source or converted each.

    Args:
        a, b: directories or Hub ids.
        workers: threads.
        progress: told of bytes done.

    Returns:
        the content of ``ctconvert diff --json``; equal where it has no ``differences``.

    Raises:
        UsageError: there is no such checkpoint.
        BadInputError: a source is damaged.
        VerificationError: a converted checkpoint is damaged.
        ConversionError: one of them changed meanwhile.
    """
    from ctconvert.store.places import recover
    from ctconvert.work.choosing import threads
    from ctconvert.work.importing import load_torch

    load_torch()
    from ctconvert.work.differing import diff as compare

    for model in (a, b):
        recover(home_path(model))
    left, right = (open_store(str(model), download=False) for model in (a, b))
    return compare(left, right, threads(workers), progress or Silent())


def restore(
    out: str | Path,
    dest: str | Path,
    *,
    device: str = "auto",
    max_shard_size: int = 5_000_000_000,
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Turns a converted checkpoint back into the compressed-tensors one it was made from.

    Codes, scales, zero points and every other tensor equal the source's bit for bit; the kept
    values of 2:4 sparse weights may differ in the sign of zeros and in which zero is kept.

    Args:
        out: a converted checkpoint, a directory or a Hub id; it is verified first.
        dest: the directory to make.
        device, max_shard_size, workers, resume, overwrite, progress: as for :func:`repack`.

    Returns:
        the report, the content of ``ctconvert restore --json``.

    Raises:
        VerificationError: the converted checkpoint is damaged.
        UsageError: ``dest`` exists or overlaps ``out``.
        ConversionError: the disk is full, or the converted checkpoint changed meanwhile.
    """
    from ctconvert.store.places import check_place
    from ctconvert.work.build import Settings, build
    from ctconvert.work.choosing import device_named, threads
    from ctconvert.work.verify import verify_output

    settings = Settings(
        executor=threads(workers),
        progress=progress or Silent(),
        device=device_named(device),
        resume=resume,
        overwrite=overwrite,
    )
    check_shard_size(max_shard_size)
    destination = home_path(dest)
    output = Output.open(out)
    if output.plan.kind == "restored":
        raise UsageError(f"{out} is a restored checkpoint already")
    check_place(Path(output.where), destination)
    verify_output(output, settings.executor, settings.progress)
    # The very store that was verified: under its path another checkpoint may stand by now.
    store = output.store
    planned = restore_plan(output.manifest, store.id, max_shard_size)
    return build(planned, store, destination, settings)
