"""``ctconvert repack``, and what a dry run of it shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctconvert.cli.failures import failures, resumes
from ctconvert.cli.options import (
    Device,
    Dtype,
    Json,
    JsonEvents,
    Model,
    Resume,
    Workers,
    directories,
    parse_layouts,
    parse_part,
    parse_size,
    pattern_layouts,
    targets,
)
from ctconvert.cli.push import print_pushed
from ctconvert.cli.sink import Sink
from ctconvert.cli.text import collapse, shape_text, size
from ctconvert.layouts import TARGETS
from ctconvert.store.hub import at_revision, to_download

if TYPE_CHECKING:
    from ctconvert.planning.outline import Outline
    from ctconvert.records import Report


def repack(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT",
            help="Directory to make; MODEL-TARGET beside MODEL.",
            autocompletion=directories,
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            "-t",
            help=f"What the kernels run on: {', '.join(TARGETS)}.",
            autocompletion=targets,
        ),
    ] = ...,  # type: ignore[assignment]
    device: Device = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; read and write no weight data.")
    ] = False,
    json_: Json = False,
    json_events: JsonEvents = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest output file; a module is never split.")
    ] = "5GB",
    workers: Workers = None,
    resume: Resume = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing OUT.")
    ] = False,
    fuse: Annotated[
        bool,
        typer.Option("--fuse/--no-fuse", help="Join q/k/v and gate/up projections, stack experts."),
    ] = False,
    keep_unsupported: Annotated[
        bool,
        typer.Option(
            "--keep-unsupported", help="Copy modules that no layout takes instead of refusing."
        ),
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Convert these modules alone, by glob or re:regex."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Copy these modules, by glob or re:regex."),
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=LAYOUT",
            help="Layout for modules by glob or re:regex.",
            autocompletion=pattern_layouts,
        ),
    ] = None,
    dtype: Dtype = None,
    revision: Annotated[
        str | None,
        typer.Option(metavar="REVISION", help="Of a Hub id: a branch, tag or commit."),
    ] = None,
    local_copy: Annotated[
        bool, typer.Option("--local-copy", help="Download a Hub model into the local cache first.")
    ] = False,
    tensor_parallel: Annotated[
        int,
        typer.Option(metavar="RANKS", help="Cut modules for as many ranks, each its own files."),
    ] = 1,
    expert_parallel: Annotated[
        bool, typer.Option("--expert-parallel", help="Ranks have whole experts, not slices.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read the output back and check it.")
    ] = True,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Make one of N shares of OUT's files; N such runs make all of it."
        ),
    ] = None,
    commit: Annotated[
        bool, typer.Option("--commit", help="Join the parts that --part has made into OUT.")
    ] = False,
    executor: Annotated[
        str, typer.Option(metavar="[threads|ray]", help="What runs it: ray, a cluster's nodes.")
    ] = "threads",
    address: Annotated[str, typer.Option(help="Of the Ray cluster; none is started.")] = "auto",
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Then put it on the Hub, as `push` does.")
    ] = None,
) -> None:
    """Convert a compressed-tensors checkpoint into a kernel-ready one."""
    sink = Sink(json_, json_events)
    with failures(sink, device, advice="" if dry_run else resumes()):
        from ctconvert import api

        layouts, shard = parse_layouts(layout or []), parse_size(max_shard_size)
        share = None if part is None else parse_part(part)
        model = at_revision(model, revision)
        if dry_run:
            from ctconvert.planning.make import refuse
            from ctconvert.planning.outline import outline
            from ctconvert.work.executors import worker_count

            plan = api.plan(
                model,
                target=target,
                fuse=fuse,
                keep_unsupported=keep_unsupported,
                include=include or [],
                exclude=exclude or [],
                layout=layouts,
                max_shard_size=shard,
                dtype=dtype,
                tensor_parallel=tensor_parallel,
                expert_parallel=expert_parallel,
            )
            sink.planned(plan)
            source = plan.source
            files = {file.name: file.size for file in (*source.files, *plan.side_files)}
            download = to_download(source.id, source.revision, files)
            taken = outline(plan, worker_count(workers), download, local_copy)
            sink.show(taken, _print_outline)
            refuse(plan)
            return
        with sink.progress() as progress:
            report = api.repack(
                model,
                out,
                target=target,
                fuse=fuse,
                keep_unsupported=keep_unsupported,
                include=include or [],
                exclude=exclude or [],
                layout=layouts,
                max_shard_size=shard,
                dtype=dtype,
                tensor_parallel=tensor_parallel,
                expert_parallel=expert_parallel,
                device=device,
                local_copy=local_copy,
                workers=workers,
                resume=resume,
                overwrite=overwrite,
                verify=verify,
                part=share,
                commit=commit,
                executor=executor,
                address=address,
                push_to=push,
                progress=progress,
            )
        sink.show(report, lambda sink, report: _print(sink, report, verify))


def _print(sink: Sink, report: Report, verified: bool) -> None:
    made = ", ".join(f"{count} x {name}" for name, count in report.layouts.items())
    if report.part is not None:
        ended = "; when all parts are made, join them with --commit"
    else:
        ended = ", verified" if verified else ", not verified"
    sink.line(
        f"{report.out}: {'' if report.part is None else f'part {report.part}: '}"
        f"{report.modules} modules ({made or 'none'}), {report.copied_tensors} tensors copied, "
        f"{size(report.output_bytes)} in {report.shards} file(s){ended}"
    )
    for refusal in report.kept:
        sink.line(f"kept unchanged: {refusal.module}: {refusal.reason}")
    sink.notes(report.notes)
    if report.pushed is not None:
        print_pushed(sink, report.pushed)


def _print_outline(sink: Sink, plan: Outline) -> None:
    rows = [
        (
            module.name,
            (
                module.format,
                module.weights,
                module.layout,
                shape_text(module.shape, module.experts),
                size(module.bytes),
            ),
        )
        for module in plan.modules
    ]
    sink.table(
        ["module", "format", "weights", "layout", "N x K", "bytes each", "count"], collapse(rows)
    )
    sink.line(f"{len(plan.copied)} tensors are copied unchanged")
    for refusal in plan.kept:
        sink.line(f"kept unchanged: {refusal}")
    sink.notes(plan.notes)
    for shard in plan.shards:
        sink.line(f"{shard.name}: {len(shard.tensors)} tensors, {size(shard.bytes)}")
    download = f"to download: {size(plan.download_bytes)}; " if plan.download_bytes else ""
    sink.line(
        f"{download}disk needed: {size(plan.disk_bytes)}; peak memory about "
        f"{size(plan.peak_memory_bytes)}; nothing was written"
    )
