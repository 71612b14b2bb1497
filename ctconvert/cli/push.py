"""``ctconvert push``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctconvert.cli.failures import failures
from ctconvert.cli.options import Json, JsonEvents, Workers
from ctconvert.cli.sink import Sink
from ctconvert.cli.text import size

if TYPE_CHECKING:
    from ctconvert.records import Pushed


def push(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A converted checkpoint's directory.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="A Hub id: org/name.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make REPO a private one, where it is made.")
    ] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of a commit.")
    ] = False,
    branch: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="Push to this branch, made where it is not there."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")
    ] = False,
    json_: Json = False,
    json_events: JsonEvents = None,
    workers: Workers = None,
) -> None:
    """Put a converted checkpoint on the Hub, with a model card."""
    sink = Sink(json_, json_events)
    with failures(sink):
        from ctconvert import api

        with sink.progress() as progress:
            found = api.push(
                out,
                repo,
                private=private,
                create_pr=create_pr,
                branch=branch,
                dry_run=dry_run,
                workers=workers,
                progress=progress,
            )
        sink.show(found, print_pushed)


def print_pushed(sink: Sink, found: Pushed) -> None:
    """What was pushed, for people."""
    there = f"{found.repo}@{found.revision}"
    what = f"{len(found.uploaded)} of {found.files} files, {size(found.upload_bytes)}"
    if found.dry_run:
        made = ", which would be made" if found.created else ""
        sink.line(f"{there}{made}: {what}, would be sent; nothing was")
        for name in found.uploaded:
            sink.line(f"send {name}")
        for name in found.removed:
            sink.line(f"remove {name}")
    else:
        sink.line(f"{there}: {what}, sent, and all {found.files} are there as they are here")
        sink.line(found.pull_request or found.url or "")
    sink.notes(found.notes)
