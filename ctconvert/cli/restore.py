"""``ctconvert restore``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctconvert.cli.failures import failures, resumes
from ctconvert.cli.options import (
    Device,
    Json,
    JsonEvents,
    Out,
    Resume,
    Workers,
    directories,
    parse_size,
)
from ctconvert.cli.sink import Sink
from ctconvert.cli.text import size

if TYPE_CHECKING:
    from ctconvert.records import Report


def restore(
    out: Out,
    dest: Annotated[
        Path,
        typer.Argument(metavar="DEST", help="Directory to make.", autocompletion=directories),
    ],
    device: Device = "auto",
    json_: Json = False,
    json_events: JsonEvents = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest output file.")] = "5GB",
    workers: Workers = None,
    resume: Resume = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing DEST.")
    ] = False,
) -> None:
    """Turn a converted checkpoint back into the one it was made from."""
    sink = Sink(json_, json_events)
    with failures(sink, device, advice=resumes()):
        from ctconvert import api

        with sink.progress() as progress:
            report = api.restore(
                out,
                dest,
                device=device,
                max_shard_size=parse_size(max_shard_size),
                workers=workers,
                resume=resume,
                overwrite=overwrite,
                progress=progress,
            )
        sink.show(report, _print)


def _print(sink: Sink, report: Report) -> None:
    sink.line(
        f"{report.out}: {report.modules} modules restored, {report.copied_tensors} tensors "
        f"copied, {size(report.output_bytes)} in {report.shards} file(s)"
    )
