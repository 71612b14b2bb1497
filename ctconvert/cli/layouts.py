"""``ctconvert layouts``."""

from __future__ import annotations

from dataclasses import dataclass

from ctconvert.cli.failures import failures
from ctconvert.cli.options import Json
from ctconvert.cli.sink import Sink


@dataclass(frozen=True)
class ListedLayout:
    """A layout: the tensors it takes and writes, the kernels that read them, who prefers it."""

    name: str
    version: int
    takes: str
    writes: str
    read_by: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """Every layout, and the order in which a target prefers them: ``layouts --json``."""

    layouts: tuple[ListedLayout, ...]
    targets: dict[str, tuple[str, ...]]


def layouts(json_: Json = False) -> None:
    """List the layouts, what each takes, and which targets prefer it."""
    with failures():
        Sink(json_).show(_listing(), _print)


def _listing() -> Listing:
    from ctconvert.layouts import LAYOUTS, TARGETS

    return Listing(
        tuple(
            ListedLayout(
                name=layout.name,
                version=layout.version,
                takes=layout.takes,
                writes=layout.writes,
                read_by=layout.read_by,
                targets=tuple(target for target, names in TARGETS.items() if layout.name in names),
            )
            for layout in LAYOUTS
        ),
        dict(TARGETS),
    )


def _print(sink: Sink, found: Listing) -> None:
    rows = [
        (row.name, row.takes, row.writes, row.read_by, ", ".join(row.targets))
        for row in found.layouts
    ]
    sink.table(["layout", "takes", "writes", "read by", "targets"], rows)
    for target, names in found.targets.items():
        sink.line(f"{target} prefers {', then '.join(names)}")
