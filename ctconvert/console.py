"""What a person or a program sees: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable
from threading import Lock
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

#: Seconds between plain progress lines where stderr is no terminal.
_EVERY = 10.0


def size(count: float) -> str:
    """Bytes for people: ``4.95 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def print_json(value: Any) -> None:
    """A result for programs."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_error(text: str) -> None:
    """The one line a failure ends in (a list of refusals has a line each)."""
    sys.stderr.write(f"error: {text}\n")


class Output:
    """Results for people on stdout; with ``quiet`` only errors and progress show."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._console = Console(highlight=False, soft_wrap=True)

    def line(self, text: str = "") -> None:
        if not self.quiet:
            self._console.print(text, markup=False)

    def table(self, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
        if self.quiet:
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*map(str, row))
        width = None if sys.stdout.isatty() else 200
        Console(highlight=False, width=width).print(table, markup=False)


class ShownProgress:
    """A bar with bytes and rate on a terminal, a plain line now and then elsewhere; on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._lock = Lock()
        self._label = ""
        self._total = self._done = 0
        self._began = self._last = self._latest = 0.0

    def __enter__(self) -> ShownProgress:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:>10}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self._finish_phase()
        if self._bar is not None:
            self._bar.stop()

    def phase(self, label: str, total: int) -> None:
        self._finish_phase()
        self._label, self._total, self._done = label, total, 0
        self._began = self._last = self._latest = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(label, total=total)

    def _finish_phase(self) -> None:
        if self._label and self._bar is None:
            seconds = self._latest - self._began
            self._print(f"{self._label}: {size(self._done)} in {seconds:.1f} s")
        self._label = ""

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._latest = time.monotonic()
            if self._bar is not None and self._task is not None:
                self._bar.advance(self._task, count)
                return
            now = self._latest
            if now - self._last < _EVERY:
                return
            self._last = now
        rate = self._done / max(now - self._began, 1e-9)
        share = 100 * self._done / max(self._total, 1)
        self._print(
            f"{self._label}: {size(self._done)} of {size(self._total)} ({share:.0f} %), "
            f"{size(rate)}/s"
        )

    def note(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def collapse(rows: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Rows (name, columns) with layer and expert numbers folded: ``layers.{0-29}.q_proj``, 30.

    Returns:
        (name, columns..., count), in order of first appearance.
    """
    found: dict[tuple[str, tuple[str, ...]], list[list[int]]] = {}
    for name, columns in rows:
        numbers = [int(item) for item in re.findall(r"(?<=\.)\d+(?=\.)", name)]
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "\0", name)
        found.setdefault((pattern, columns), []).append(numbers)
    folded = []
    for (pattern, columns), rows_of in found.items():
        text = pattern
        for values in zip(*rows_of, strict=True):
            distinct = sorted(set(values))
            whole = distinct == list(range(distinct[0], distinct[-1] + 1))
            span = f"{distinct[0]}-{distinct[-1]}" if whole else ",".join(map(str, distinct[:8]))
            span += "" if whole or len(distinct) <= 8 else ",..."
            one = str(distinct[0])
            text = text.replace("\0", one if len(distinct) == 1 else f"{{{span}}}", 1)
        folded.append((text, *columns, str(len(rows_of))))
    return folded
