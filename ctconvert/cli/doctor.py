"""``ctconvert doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ctconvert.cli.failures import failures
from ctconvert.cli.options import Json, JsonEvents, Model, Workers, parse_counts, targets
from ctconvert.cli.sink import Sink
from ctconvert.cli.text import collapse
from ctconvert.errors import FindingsError

if TYPE_CHECKING:
    from ctconvert.records import Examination, Finding


def doctor(
    model: Model,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="Also look for what no layout of it takes.",
            autocompletion=targets,
        ),
    ] = None,
    tensor_parallel: Annotated[
        str,
        typer.Option(metavar="RANKS", help="Numbers of ranks, separated by commas: 1,2,4,8."),
    ] = "1",
    data: Annotated[
        bool, typer.Option("--data/--no-data", help="Read the weights, not headers alone.")
    ] = True,
    json_: Json = False,
    json_events: JsonEvents = None,
    workers: Workers = None,
) -> None:
    """Tell what will go wrong with a checkpoint before it is served."""
    sink = Sink(json_, json_events)
    with failures(sink):
        from ctconvert import api

        splits = parse_counts(tensor_parallel, "--tensor-parallel", "ranks", "1,2,4,8")
        with sink.progress() as progress:
            found = api.doctor(
                model,
                target=target,
                tensor_parallel=splits,
                data=data,
                workers=workers,
                progress=progress,
            )
        sink.show(found, _print)
        if found.errors:
            first = found.findings[0]
            where = f"{first.module}: " if first.module else ""
            also = f" (and {found.errors - 1} more)" if found.errors > 1 else ""
            raise FindingsError(f"{found.model}: {where}{_says(first)}{also}", module=first.module)


def _print(sink: Sink, found: Examination) -> None:
    rows = [(one.module or "", (one.severity, one.kind, _says(one))) for one in found.findings]
    if rows:
        sink.table(["module", "severity", "kind", "what", "count"], collapse(rows))
    read = "read" if found.data else "not read"
    counts = ((found.errors, "error"), (len(found.findings) - found.errors, "warning"))
    listed = ", ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in counts)
    sink.line(
        f"{found.model}: {found.modules} quantised modules, {listed}; the weights were {read}"
    )


def _says(finding: Finding) -> str:
    split = f"at {finding.split} ranks: " if finding.split is not None else ""
    return split + finding.message
