"""``inspect --plot``: the page's picture as a file, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctconvert.cli.report.grid import REFUSED, Grid, Run, Stack, Swatch, grid_of
from ctconvert.cli.report.page import bytes_of, change, sides_of
from ctconvert.cli.text import printable, size
from ctconvert.planning.inspection import Inspection

#: Inches: a row, what is above and below a stack's rows, the head, a line of the legend.
_ROW, _AROUND, _HEAD, _LINE = 0.21, 0.75, 0.95, 0.25
#: Inches: names, a panel, sizes.
_NAMES, _PANEL, _SIZES = 3.6, 5.2, 1.9
_TEXT, _QUIET, _EMPTY = "#1b1f24", "#5a6270", "#f2f3f5"
#: Characters of a row's name, and of the title.
_LONGEST, _TITLE = 46, 90
#: The most lines of a legend.
_MOST = 30


def draw(found: Inspection, path: Path) -> None:
    """Writes the picture of an inspection.

    Args:
        found: what ``api.inspect`` returned.
        path: a file that ``chart.check_plot`` has looked at, replaced where it exists.

    Raises:
        OSError: it cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    grid = grid_of(found)
    sides = [name for name in sides_of(found) if name]
    shown = [swatches[:_MOST] for swatches in (grid.before, grid.after)[: len(sides)]]
    legend = max(map(len, shown)) * _LINE + 0.45
    stacks = sum(len(stack.rows) * _ROW + _AROUND for stack in grid.stacks)
    width, height = _NAMES + len(sides) * (_PANEL + 0.2) + _SIZES, _HEAD + legend + stacks
    # names are text, not formulas, and of any script
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):
        figure = Figure(figsize=(width, height), facecolor="white")
        top = _title(figure, found, height, grid.left_out)
        for place, swatches in enumerate(shown):
            left = _NAMES + place * (_PANEL + 0.2)
            _legend(figure, swatches, sides[place], (left, top), (width, height))
        top -= legend
        for stack in grid.stacks:
            for place in range(len(sides)):
                box = _NAMES + place * (_PANEL + 0.2), top, width, height
                _panel(figure, stack, grid, place, place + 1 == len(sides), box)
            top -= len(stack.rows) * _ROW + _AROUND
        figure.savefig(path, dpi=110)


def _plain(text: str, most: int) -> str:
    """A text that every font has, of a bounded length, its end kept."""
    shown = printable(text).encode("ascii", "backslashreplace").decode()
    return shown if len(shown) <= most else "..." + shown[3 - most :]


def _title(figure: Any, found: Inspection, height: float, left_out: int) -> float:
    what = ", ".join(found.architectures) or "unknown architecture"
    total = change(*bytes_of(found)) if found.target is not None else size(found.bytes)
    line = f"{what}, {len(found.modules):,} quantised modules, {total}"
    line += f" ({left_out} more rows are not drawn)" if left_out else ""
    figure.text(0.02, 1 - 0.36 / height, _plain(found.model, _TITLE), fontsize=14, weight="bold")
    ascii_line = _plain(line.replace("→", "->"), 2 * _TITLE)
    figure.text(0.02, 1 - 0.62 / height, ascii_line, color=_QUIET)
    return height - _HEAD


def _legend(
    figure: Any,
    swatches: Sequence[Swatch],
    name: str,
    corner: tuple[float, float],
    of: tuple[float, float],
) -> None:
    from matplotlib.patches import Rectangle

    (left, top), (width, height) = corner, of
    figure.text(left / width, top / height, _plain(name, _TITLE), color=_QUIET)
    for line, swatch in enumerate(swatches, 1):
        y = top - line * _LINE
        box = (left / width, (y - 0.01) / height), 0.14 / width, 0.13 / height
        hatch = "////" if swatch.label == REFUSED else None
        figure.add_artist(
            Rectangle(*box, facecolor=swatch.colour, edgecolor="white", hatch=hatch, linewidth=0)
        )
        text = f"{swatch.label}: {swatch.modules:,} x, {size(swatch.bytes)}"
        figure.text((left + 0.24) / width, y / height, _plain(text, 60))


def _panel(
    figure: Any,
    stack: Stack,
    grid: Grid,
    place: int,
    last: bool,
    box: tuple[float, float, float, float],
) -> None:
    """The rows of a stack, before or after; names stand left of the first, sizes of the last."""
    left, top, width, height = box
    count, rows = len(stack.layers), len(stack.rows)
    high = rows * _ROW
    axes = figure.add_axes(
        (left / width, (top - 0.4 - high) / height, _PANEL / width, high / height)
    )
    axes.set_xlim(0, count)
    axes.set_ylim(rows, 0)
    for side in axes.spines.values():
        side.set_visible(False)
    for y, row in enumerate(stack.rows):
        _bar(axes, y, (row.before, row.after)[place], grid.colours)
        if last:
            axes.text(
                count * (1 + 0.15 / _PANEL),
                y + 0.5,
                (
                    change(row.before_bytes, row.after_bytes) if place else size(row.before_bytes)
                ).replace("→", "->"),
                va="center",
                color=_TEXT,
                fontsize=8,
            )
    if 1 < count <= 130:
        axes.vlines(range(1, count), 0, rows, color="white", linewidth=0.5)
    axes.set_yticks([y + 0.5 for y in range(rows)] if place == 0 else [])
    if place == 0:
        names = [_plain(f"{row.modules:,} x {row.name}", _LONGEST) for row in stack.rows]
        axes.set_yticklabels(names, fontsize=8, family="monospace")
        title = _plain(stack.name, 60) if stack.name else "outside of layers"
        axes.set_title(title, loc="left", fontsize=10, pad=16 if count > 1 else 6, weight="bold")
    axes.xaxis.tick_top()
    step = max(1, -(-count // 12))
    layers = range(0, count, step) if count > 1 else range(0)
    axes.set_xticks([layer + 0.5 for layer in layers])
    axes.set_xticklabels([str(stack.layers[layer]) for layer in layers], fontsize=7)
    axes.tick_params(length=0, colors=_TEXT)


def _bar(axes: Any, y: int, runs: Sequence[Run], colours: dict[str, str]) -> None:
    at = 0
    for run in runs:
        axes.broken_barh(
            [(at, run.count)],
            (y + 0.08, 0.84),
            facecolors=_EMPTY if run.label is None else colours[run.label],
            edgecolor="white",
            linewidth=0,
            hatch="////" if run.label == REFUSED else None,
        )
        at += run.count
