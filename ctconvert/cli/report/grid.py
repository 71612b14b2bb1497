"""An inspection as a picture's content: modules down, layers across, experts folded.

Neighbouring layers that are alike are one run, so that a picture of hundreds of layers is as small
as one of a few.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ctconvert.cli.text import printable, shape_text, size
from ctconvert.names import natural
from ctconvert.planning.inspection import InspectedModule, Inspection, OtherTensor

#: The labels of what no layout takes, and of what is not quantised (after its type).
REFUSED, _PLAIN = "no layout", ", not quantised"
_RED, _GREYS = "#c1272d", ("#c3c7ce", "#9aa0aa", "#dfe2e6", "#7d838c")
#: Apart for the colour-blind, too, and none near the red of a refusal (after Paul Tol's schemes).
_COLOURS = (
    *("#4477aa", "#228833", "#ccbb44", "#66ccee", "#aa4499", "#ee9966", "#332288", "#44bb99"),
    *("#886600", "#88aadd", "#115522", "#ddaadd", "#555555", "#bbcc33"),
)
#: The number of a layer, or of an expert: between dots.
_NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")
#: The most rows that are drawn.
_MOST = 400


@dataclass(frozen=True)
class Run:
    """Neighbouring layers that are alike; ``label`` is None where there is nothing in them."""

    count: int
    label: str | None
    title: str


@dataclass(frozen=True)
class Row:
    """A module that every layer may have; ``modules`` counts experts too."""

    name: str
    before: tuple[Run, ...]
    after: tuple[Run, ...]
    shapes: str
    modules: int
    before_bytes: int
    after_bytes: int


@dataclass(frozen=True)
class Stack:
    """Layers numbered under one name; what is in none has no name, and one layer."""

    name: str
    layers: tuple[int, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Swatch:
    """A colour of the legend, and how much there is of it."""

    label: str
    colour: str
    modules: int
    bytes: int


@dataclass(frozen=True)
class Grid:
    """A whole picture; ``after`` is empty where nothing is said of what modules become."""

    stacks: tuple[Stack, ...]
    before: tuple[Swatch, ...]
    after: tuple[Swatch, ...]
    left_out: int

    @property
    def colours(self) -> dict[str, str]:
        return {swatch.label: swatch.colour for swatch in (*self.before, *self.after)}


@dataclass(frozen=True)
class _Item:
    """A module as it is counted: what it is, what it becomes, in words of the legend."""

    name: str
    labels: tuple[str, str]
    sizes: tuple[int, int]
    shape: str
    count: int


@dataclass
class _Cell:
    """The items of one row in one layer: experts are many."""

    items: list[_Item] = field(default_factory=list)

    def label(self, side: int) -> str:
        labels = {item.labels[side] for item in self.items}
        return REFUSED if REFUSED in labels else " + ".join(sorted(labels))

    def words(self, side: int) -> str:
        """What it is, in full."""
        count = sum(item.count for item in self.items)
        shapes = ", ".join(sorted({item.shape for item in self.items}))
        times = f"{count} x " if count > 1 else ""
        labels = " + ".join(sorted({item.labels[side] for item in self.items}))
        return f"{labels}, {times}{shapes}, {size(sum(i.sizes[side] for i in self.items))}"


def grid_of(found: Inspection) -> Grid:
    """The picture of an inspection."""
    items = [_module(found, module) for module in found.modules]
    items += [_other(tensor) for tensor in found.others if len(tensor.shape) > 1]
    places: dict[str, dict[str, dict[int, _Cell]]] = {}
    for item in items:
        stack, layer, row = _place(item.name)
        row_of = places.setdefault(stack, {}).setdefault(row, {})
        row_of.setdefault(layer, _Cell()).items.append(item)
    stacks, room = [], _MOST
    for name in sorted(places, key=lambda name: (not name, natural(name))):
        layers = sorted({layer for row in places[name].values() for layer in row})
        names = sorted(places[name], key=natural)[:room]
        rows = tuple(_row(row, layers, places[name][row]) for row in names)
        if rows:
            stacks.append(Stack(name, tuple(layers), rows))
        room -= len(rows)
    cells = [cell for rows in places.values() for row in rows.values() for cell in row.values()]
    sides = (0, 1) if found.target is not None else (0,)
    swatches, taken = [], {REFUSED: _RED}
    colours, greys = itertools.cycle(_COLOURS), itertools.cycle(_GREYS)
    for side in sides:
        swatches.append(_swatches(cells, side, taken, colours, greys))
    return Grid(
        tuple(stacks),
        swatches[0],
        swatches[1] if found.target is not None else (),
        sum(map(len, places.values())) - (_MOST - room),
    )


def _module(found: Inspection, module: InspectedModule) -> _Item:
    refused = module.refused is not None or (module.unsupported is not None and not module.layout)
    after = module.layout or REFUSED
    before = REFUSED if refused and found.target is None else module.weights
    if found.converted:
        sizes = module.was_bytes or 0, module.bytes
    else:
        became = module.becomes_bytes
        sizes = module.bytes, module.bytes if became is None else became
    shape = shape_text(module.shape, None)
    return _Item(module.name, (before, after), sizes, shape, module.experts or 1)


def _other(tensor: OtherTensor) -> _Item:
    label = tensor.dtype + _PLAIN
    shape = "x".join(map(str, tensor.shape))
    name = tensor.name.removesuffix(".weight")
    return _Item(name, (label, label), (tensor.bytes, tensor.bytes), shape, 1)


def _place(name: str) -> tuple[str, int, str]:
    """The stack, the layer and the row of a module; experts are one row."""
    shown = printable(name)
    first = _NUMBER.search(shown)
    if first is None:
        return "", 0, shown
    rest = _NUMBER.sub("*", "." + shown[first.end() + 1 :] + ".")[1:-1]
    return shown[: first.start() - 1], int(first[0]), rest


def _row(name: str, layers: Sequence[int], cells: dict[int, _Cell]) -> Row:
    items = [item for cell in cells.values() for item in cell.items]
    shapes = sorted({item.shape for item in items}, key=natural)
    return Row(
        name=name,
        before=tuple(_runs(layers, cells, 0)),
        after=tuple(_runs(layers, cells, 1)),
        shapes=", ".join(shapes[:2]) + (", ..." if len(shapes) > 2 else ""),
        modules=sum(item.count for item in items),
        before_bytes=sum(item.sizes[0] for item in items),
        after_bytes=sum(item.sizes[1] for item in items),
    )


def _runs(layers: Sequence[int], cells: dict[int, _Cell], side: int) -> Iterator[Run]:
    def look(layer: int) -> tuple[str | None, str]:
        cell = cells.get(layer)
        return (None, "nothing") if cell is None else (cell.label(side), cell.words(side))

    for (label, words), run in itertools.groupby(layers, look):
        alike = list(run)
        each = ""
        if len(layers) > 1:
            each = f"layer {alike[0]}: "
        if len(alike) > 1:
            each = f"layers {alike[0]} to {alike[-1]}: " + ("each " if label else "")
        yield Run(len(alike), label, each + words)


def _swatches(
    cells: Sequence[_Cell],
    side: int,
    taken: dict[str, str],
    colours: Iterator[str],
    greys: Iterator[str],
) -> tuple[Swatch, ...]:
    """The legend of one side, the most bytes first and what is not quantised last."""
    counts: dict[str, tuple[int, int]] = {}
    for cell in cells:
        modules, total = counts.get(cell.label(side), (0, 0))
        modules += sum(item.count for item in cell.items)
        counts[cell.label(side)] = modules, total + sum(item.sizes[side] for item in cell.items)

    def plain(label: str) -> bool:
        return label.endswith(_PLAIN)

    found = []
    for label in sorted(counts, key=lambda label: (plain(label), -counts[label][1], label)):
        if label not in taken:
            taken[label] = next(greys if plain(label) else colours)
        found.append(Swatch(label, taken[label], *counts[label]))
    return tuple(found)
