"""``ctconvert layouts``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from ctconvert.cli.failures import failures
from ctconvert.cli.options import Json, targets
from ctconvert.cli.sink import Sink
from ctconvert.errors import UsageError
from ctconvert.names import meant


@dataclass(frozen=True)
class ListedLayout:
    """A layout: the tensors it takes and writes, the kernels that read them, who prefers it.

    ``dtype`` is that of the activations where its bytes depend on it.
    """

    name: str
    version: int
    takes: str
    writes: str
    read_by: str
    dtype: str | None
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """Every layout, and the order in which a target prefers them: ``layouts --json``.

    With a target, that target's alone, in its order. ``quantised_activations`` are those that a
    target prefers only for weights whose activations are quantised too.
    """

    layouts: tuple[ListedLayout, ...]
    targets: dict[str, tuple[str, ...]]
    quantised_activations: dict[str, tuple[str, ...]]


def layouts(
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="Those that it prefers alone, in its order.",
            autocompletion=targets,
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """List the layouts, what each takes, and which targets prefer it."""
    sink = Sink(json_)
    with failures(sink):
        found = listing(target)
        sink.show(found, _print if target is None else _print_order)


def listing(target: str | None = None) -> Listing:
    """The layouts of the registry, or of one target in its order.

    Raises:
        UsageError: there is no such target.
    """
    from ctconvert.layouts import LAYOUTS, QUANTISED_ACTIVATIONS, TARGETS

    if target is not None:
        if target not in TARGETS:
            raise UsageError(
                f"unknown target {target!r}; the targets are {', '.join(TARGETS)}"
                f"{meant(target, TARGETS)}"
            )
        order = TARGETS[target]
        known = {layout.name: layout for layout in listing().layouts}
        return Listing(
            tuple(known[name] for name in order),
            {target: order},
            {target: QUANTISED_ACTIVATIONS.get(target, ())},
        )
    return Listing(
        tuple(
            ListedLayout(
                name=layout.name,
                version=layout.version,
                takes=layout.takes,
                writes=layout.writes,
                read_by=layout.read_by,
                dtype=layout.dtype,
                targets=tuple(target for target, names in TARGETS.items() if layout.name in names),
            )
            for layout in LAYOUTS
        ),
        dict(TARGETS),
        dict(QUANTISED_ACTIVATIONS),
    )


def _print(sink: Sink, found: Listing) -> None:
    rows = [
        (row.name, row.takes, row.writes, row.read_by, ", ".join(row.targets))
        for row in found.layouts
    ]
    sink.table(["layout", "takes", "writes", "read by", "targets"], rows)
    for target, names in found.targets.items():
        sink.line(f"{target} prefers {', then '.join(names)}")


def _print_order(sink: Sink, found: Listing) -> None:
    needy = {name for names in found.quantised_activations.values() for name in names}
    rows = [
        (
            str(place),
            row.name,
            row.takes + (" (only with quantised activations)" if row.name in needy else ""),
            row.read_by,
        )
        for place, row in enumerate(found.layouts, 1)
    ]
    sink.table(["", "layout", "takes", "read by"], rows)
