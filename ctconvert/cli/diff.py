"""``ctconvert diff``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ctconvert.cli.failures import failures
from ctconvert.cli.options import Json, JsonEvents, Workers, directories
from ctconvert.cli.sink import Sink
from ctconvert.cli.text import collapse
from ctconvert.errors import DifferenceError

if TYPE_CHECKING:
    from ctconvert.records import Differing

_Checkpoint = "A checkpoint, source or converted: a directory, or a Hub id: org/name[@revision]."


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_Checkpoint, autocompletion=directories)],
    b: Annotated[str, typer.Argument(metavar="B", help=_Checkpoint, autocompletion=directories)],
    json_: Json = False,
    json_events: JsonEvents = None,
    workers: Workers = None,
) -> None:
    """Compare the decoded weights of two checkpoints."""
    sink = Sink(json_, json_events)
    with failures(sink):
        from ctconvert import api

        with sink.progress() as progress:
            found = api.diff(a, b, workers=workers, progress=progress)
        sink.show(found, _print)
        if found.differences:
            first, count = found.differences[0], len(found.differences) - 1
            also = f"; {count} other module{'s' * (count > 1)} too" if count else ""
            raise DifferenceError(
                f"{found.a} and {found.b} differ in {first.module}: {first.what}: "
                f"{first.first}{also}",
                module=first.module,
            )


def _print(sink: Sink, found: Differing) -> None:
    if not found.differences:
        sink.line(
            f"{found.a} and {found.b}: {found.modules} modules hold the same codes and scales, and "
            f"{found.tensors} other tensors are equal"
        )
        return
    rows = [
        (one.module, (one.what.rpartition(".")[2], _count(one.elements)))
        for one in found.differences
    ]
    sink.table(["module", "differs in", "elements", "count"], collapse(rows))


def _count(elements: int) -> str:
    return str(elements) if elements else "all"
