"""How far a run is, on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

from ctconvert.cli.streams import is_screen, say
from ctconvert.cli.text import printable, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ctconvert.records import Plan

#: Seconds between plain lines.
_EVERY = 10.0


class ShownProgress:
    """A :class:`ctconvert.progress.Progress`; a context, whose end ends the last phase."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._lock = Lock()
        self._label = ""
        self._total = self._done = 0
        self._began = self._last = self._latest = 0.0

    def __enter__(self) -> ShownProgress:
        if is_screen(sys.stderr):
            self._bar = _started_bar()
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self._finish_phase()
        if self._bar is not None:
            with suppress(OSError):  # the terminal is gone
                self._bar.stop()

    def plan(self, plan: Plan) -> None:
        pass  # the result tells

    def module(self, name: str, layout: str | None) -> None:
        pass

    def phase(self, label: str, total: int) -> None:
        self._finish_phase()
        self._label, self._total, self._done = label, total, 0
        self._began = self._last = self._latest = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(label, total=total)

    def _finish_phase(self) -> None:
        if self._label and self._bar is None:
            seconds = self._latest - self._began
            say(f"{self._label}: {size(self._done)} in {seconds:.1f} s")
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
        say(
            f"{self._label}: {size(self._done)} of {size(self._total)} ({share:.0f} %), "
            f"{size(rate)}/s"
        )

    def note(self, text: str) -> None:
        if self._bar is None:
            say(text)
            return
        from rich.text import Text

        with suppress(OSError):
            self._bar.console.print(Text(printable(text)), soft_wrap=True)


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
