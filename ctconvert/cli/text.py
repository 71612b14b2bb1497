"""Text for people: nothing in it can steer a terminal, and tables stay in line."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

#: A number between dots, as layers and experts have, or a rank's: small, written in one way only.
_NUMBER = re.compile(r"(?:(?<=\.)|(?<=^rank))(?:0|[1-9][0-9]{0,8})(?=\.)")
_GAP = "  "


def printable(text: str) -> str:
    """``text`` on one line, with escapes for what does not print.

    Names from a checkpoint may hold anything: terminal codes, newlines, marks that turn the
    direction of writing, half of a surrogate pair.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size(count: float) -> str:
    """Bytes for people: ``4.95 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def collapse(rows: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Rows (name, columns) with layer and expert numbers folded: ``layers.{0-29}.q_proj``, 30.

    Returns:
        (name, columns..., count), in order of first appearance.
    """
    found: dict[tuple[str, tuple[str, ...]], list[list[int]]] = {}
    for name, columns in rows:
        shown = printable(name)  # so that no name holds the mark of a number
        numbers = [int(item) for item in _NUMBER.findall(shown)]
        found.setdefault((_NUMBER.sub("\0", shown), columns), []).append(numbers)
    folded = []
    for (pattern, columns), rows_of in found.items():
        text = pattern
        for values in zip(*rows_of, strict=True):
            distinct = sorted(set(values))
            whole = len(distinct) == distinct[-1] - distinct[0] + 1
            span = f"{distinct[0]}-{distinct[-1]}" if whole else ",".join(map(str, distinct[:8]))
            span += "" if whole or len(distinct) <= 8 else ",..."
            one = str(distinct[0])
            text = text.replace("\0", one if len(distinct) == 1 else f"{{{span}}}", 1)
        folded.append((text, *columns, str(len(rows_of))))
    return folded


def table(rows: Sequence[Sequence[str]], width: int | None = None) -> Iterator[list[str]]:
    """Rows of printable cells in columns, as the lines of each row, without trailing blanks.

    Args:
        rows: of equal length, the header first.
        width: that they should fit; cells are folded between words, and no name is ever broken.
            Nothing is folded where None.
    """
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    if width is not None:
        room = width - len(_GAP) * (len(widths) - 1)
        columns = zip(*rows, strict=True)
        least = [max(map(cells, " ".join(column).split()), default=0) for column in columns]
        while sum(widths) > room and widths != least:
            spare = [w if w > low else 0 for w, low in zip(widths, least, strict=True)]
            widths[spare.index(max(spare))] -= 1
    for row in rows:
        folded = [list(_fold(cell, limit)) for cell, limit in zip(row, widths, strict=True)]
        lines = []
        for index in range(max(map(len, folded))):
            parts = [cell[index] if index < len(cell) else "" for cell in folded]
            padded = [
                part + " " * (limit - cells(part))
                for part, limit in zip(parts, widths, strict=True)
            ]
            lines.append(_GAP.join(padded).rstrip())
        yield lines


def cells(text: str) -> int:
    """Columns of a screen that a printable text takes."""
    if text.isascii():
        return len(text)
    return sum(map(_cells_of, text))


def _cells_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fold(text: str, limit: int) -> Iterator[str]:
    """Lines of a text of at most ``limit`` columns, or of one word; at least one."""
    if cells(text) <= limit:
        yield text
        return
    line = ""
    for word in text.split():
        if line and cells(line) + 1 + cells(word) > limit:
            yield line
            line = ""
        line += f" {word}" if line else word
    yield line


def shape_text(shape: tuple[int, int] | None, experts: int | None) -> str:
    """``NxK``, and how many of them where experts are stacked."""
    text = "x".join(map(str, shape)) if shape else "?"
    return f"{experts} x {text}" if experts else text
