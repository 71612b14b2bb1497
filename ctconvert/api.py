"""The verbs as functions. They raise :class:`ctconvert.errors.CtconvertError` and print nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctconvert.checkpoint.source import LocalFiles, Source, open_files
from ctconvert.description import describe
from ctconvert.errors import UsageError
from ctconvert.inspection import inspection
from ctconvert.planning import Options, Plan, make_plan
from ctconvert.progress import Progress, Silent


def _options(
    target: str,
    fuse: bool,
    keep_unsupported: bool,
    layout: Mapping[str, str] | None,
    max_shard_size: int,
) -> Options:
    overrides = tuple((layout or {}).items())
    return Options(target, fuse, keep_unsupported, overrides, max_shard_size)


def inspect(model: str | Path, *, target: str | None = None) -> dict[str, Any]:
    """What a checkpoint holds: schemes by module, sizes, oddities; reads headers only.

    Args:
        model: a directory or a Hub id (``org/name``, ``org/name@revision``).
        target: also say what each module would become for it, or why it cannot.

    Returns:
        the content of ``ctconvert inspect --json``.

    Raises:
        UsageError: there is no such model or target.
        BadInputError: the checkpoint is damaged or contradicts itself.
    """
    options = None if target is None else Options(target, keep_unsupported=True)
    description = describe(Source.open(open_files(str(model), download=False)))
    return inspection(description, None if options is None else make_plan(description, options))


def plan(
    model: str | Path,
    *,
    target: str,
    fuse: bool = False,
    keep_unsupported: bool = False,
    layout: Mapping[str, str] | None = None,
    max_shard_size: int = 5_000_000_000,
    download: bool = False,
) -> Plan:
    """Decides layout, name, dtype, shape, shard and offset of every output tensor.

    Args:
        model: a directory or a Hub id.
        target: one of ``ctconvert.layouts.TARGETS``.
        fuse: join q/k/v and gate/up projections.
        keep_unsupported: copy modules without a layout instead of refusing them.
        layout: layout by module name pattern (glob, or ``re:`` and a regular expression).
        max_shard_size: bytes of tensors in one output file; a module is never split.
        download: fetch a Hub model's files now, so that the plan can be carried out.

    Returns:
        the plan; ``plan.refusals`` lists what no layout takes.

    Raises:
        UsageError: there is no such model, target or layout.
        BadInputError: the checkpoint is damaged or contradicts itself.
    """
    options = _options(target, fuse, keep_unsupported, layout, max_shard_size)
    return make_plan(describe(Source.open(open_files(str(model), download=download))), options)


def default_out(model: str | Path, target: str) -> Path:
    """``MODEL-TARGET`` beside a directory; in the current one for a Hub id."""
    path = Path(model).expanduser()
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
    layout: Mapping[str, str] | None = None,
    max_shard_size: int = 5_000_000_000,
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Converts a compressed-tensors checkpoint into a kernel-ready one.

    Args:
        model, target, fuse, keep_unsupported, layout, max_shard_size: as for :func:`plan`.
        out: the directory to make; ``MODEL-TARGET`` beside the model where not given.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``xpu``: where transforms run.
        workers: threads that read, transform and write; chosen by the machine where None.
        resume: take over the finished shards of a killed run.
        overwrite: replace an existing output.
        verify: read the output back and check every hash.
        progress: told of bytes done.

    Returns:
        the report, the content of ``ctconvert repack --json``.

    Raises:
        UsageError, BadInputError: as for :func:`plan`; ``out`` exists or overlaps the source.
        UnsupportedError: the target has no layout for a module.
        ConversionError: the disk is full, or a transform failed.
    """
    from ctconvert import device as devices
    from ctconvert.execution import execute

    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other; give one of them")
    chosen = devices.resolve(device)
    destination = Path(out) if out is not None else default_out(model, target)
    planned = plan(
        model,
        target=target,
        fuse=fuse,
        keep_unsupported=keep_unsupported,
        layout=layout,
        max_shard_size=max_shard_size,
        download=True,
    )
    return execute(
        planned,
        destination,
        device=chosen,
        workers=worker_count(workers),
        resume=resume,
        overwrite=overwrite,
        verify=verify,
        progress=progress or Silent(),
    )


def verify(
    out: str | Path,
    *,
    against: str | Path | None = None,
    kernels: bool = False,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Proves an output: every byte against the manifest, and with ``against`` every code and scale.

    Args:
        out: a converted checkpoint.
        against: the model it was made from, a directory or a Hub id.
        kernels: also run every module's kernel against the reference.
        device: where the kernels run.
        workers: threads.
        progress: told of bytes done.

    Returns:
        the report, the content of ``ctconvert verify --json``.

    Raises:
        VerificationError: something differs; the message names the tensor, module or file.
    """
    from ctconvert.verification import verify_against, verify_files

    count, shown = worker_count(workers), progress or Silent()
    report = verify_files(Path(out), shown, count)
    if against is not None:
        files = open_files(str(against), download=True)
        assert isinstance(files, LocalFiles)
        report["against"] = verify_against(Path(out), Source.open(files), shown, count)
    if kernels:
        from msgspec.structs import asdict

        from ctconvert.runtime.proof import verify_kernels

        runs = map(asdict, verify_kernels(Path(out), device, shown))
        report["kernels"] = {run.pop("layout"): run for run in runs}
    return report


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
) -> dict[str, Any]:
    """Turns a converted checkpoint back into the compressed-tensors one it was made from.

    Codes, scales, zero points and every other tensor equal the source's bit for bit; the kept
    values of 2:4 sparse weights may differ in the sign of zeros and in which zero is kept.

    Args:
        out: a converted checkpoint; it is verified first.
        dest: the directory to make.
        device, max_shard_size, workers, resume, overwrite, progress: as for :func:`repack`.

    Returns:
        the report, the content of ``ctconvert restore --json``.

    Raises:
        VerificationError: the converted checkpoint is damaged.
        UsageError: ``dest`` exists or overlaps ``out``.
        ConversionError: the disk is full.
    """
    from ctconvert import device as devices
    from ctconvert import restoring

    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other; give one of them")
    return restoring.restore(
        Path(out),
        Path(dest),
        device=devices.resolve(device),
        workers=worker_count(workers),
        resume=resume,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        progress=progress or Silent(),
    )


def worker_count(workers: int | None) -> int:
    """The number of threads; at most 8 by default, more do not help one disk.

    Raises:
        UsageError: fewer than one were asked for.
    """
    if workers is None:
        return max(2, min(8, os.cpu_count() or 2))
    if workers < 1:
        raise UsageError(f"--workers {workers}: at least one is needed")
    return workers
