"""How far a run is, on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

from ctconvert.cli.logs import LOG, STDERR
from ctconvert.cli.streams import is_screen
from ctconvert.cli.text import size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ctconvert.records import Plan

#: Seconds between plain lines.
_EVERY = 10.0


class ShownProgress:
    """A :class:`ctconvert.progress.Progress`; a context, whose end ends the last phase.

    Args:
        bar: show one where stderr is a terminal and not to be quiet.
    """

    def __init__(self, bar: bool = True) -> None:
        self._wanted = bar
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._lock = Lock()
        self._label = ""
        self._total = self._done = 0
        self._began = self._last = self._latest = 0.0

    def __enter__(self) -> ShownProgress:
        if self._wanted and is_screen(sys.stderr) and STDERR.level <= logging.INFO:
            self._bar = _started_bar()
            STDERR.printer = self._print
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self._finish_phase()
        if self._bar is not None:
            STDERR.printer = None
            with suppress(OSError):  # the terminal is gone
                self._bar.stop()

    def _print(self, line: str) -> None:
        from rich.text import Text

        assert self._bar is not None
        self._bar.console.print(Text(line), soft_wrap=True)

    def plan(self, plan: Plan) -> None:
        made = ", ".join(f"{count} x {layout}" for layout, count in plan.layouts().items())
        LOG.debug("plan: %s, %s", made or "no layout", size(plan.tensor_bytes))

    def module(self, name: str, layout: str | None) -> None:
        LOG.debug("module %s: %s", name, layout or "restored")

    def phase(self, label: str, total: int) -> None:
        self._finish_phase()
        self._label, self._total, self._done = label, total, 0
        self._began = self._last = self._latest = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(label, total=total)

    def _finish_phase(self) -> None:
        if self._label:
            seconds = self._latest - self._began
            # on a screen the bar tells the same
            level = logging.INFO if self._bar is None else logging.DEBUG
            LOG.log(level, "%s: %s in %.1f s", self._label, size(self._done), seconds)
        self._label = ""

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = self._latest = time.monotonic()
            if self._bar is not None and self._task is not None:
                self._bar.advance(self._task, count)
            if self._bar is not None or now - self._last < _EVERY:
                return
            self._last = now
        rate = self._done / max(now - self._began, 1e-9)
        share = 100 * self._done / max(self._total, 1)
        left = max(self._total - self._done, 0) / rate
        LOG.info(
            "%s: %s of %s (%.0f %%), %s/s, %.0f s left",
            *(self._label, size(self._done), size(self._total), share, size(rate), left),
        )

    def note(self, text: str) -> None:
        LOG.info(text)


def _started_bar() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bar = Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False),
        redirect_stdout=False,  # what goes there is for another reader
    )
    bar.start()
    bar.console.show_cursor(True)  # a run may be killed, and the terminal outlives it
    return bar
