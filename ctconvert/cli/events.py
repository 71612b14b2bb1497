"""``--json-events``: what a run does, for programs, an object a line."""

from __future__ import annotations

import json
import time
from threading import Lock
from typing import TYPE_CHECKING, Any, TextIO

from ctconvert.cli.streams import flush, write

if TYPE_CHECKING:
    from ctconvert.records import Plan

#: The least seconds between two lines of progress.
_EVERY = 0.5
#: The name of stdout.
STDOUT = "-"


class Events:
    """A :class:`ctconvert.progress.Progress` that writes lines; called from any thread.

    Args:
        path: a file to make, or ``-`` for stdout.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._file: TextIO | None = None
        if path != STDOUT:
            self._file = open(path, "w", buffering=1)  # noqa: PTH123, SIM115 (closed by end)
        self._lock = Lock()
        self._phase = ""
        self._done = self._total = 0
        self._last = 0.0

    def _write(self, event: Any) -> None:
        import msgspec

        line = json.dumps(msgspec.to_builtins(event)).replace("\x7f", "\\u007f")
        if self._file is None:
            write(line + "\n")
            flush()
        else:
            self._file.write(line + "\n")

    def plan(self, plan: Plan) -> None:
        from ctconvert.records.events import PlanEvent, WarningEvent

        with self._lock:
            self._write(
                PlanEvent(
                    target=plan.options.target,
                    modules=len(plan.modules or plan.restored),
                    layouts=plan.layouts(),
                    copied_tensors=len(plan.copies),
                    source_bytes=sum(file.size for file in plan.source.files),
                    output_bytes=plan.tensor_bytes,
                )
            )
            for message in (*plan.notes, *(f"kept unchanged: {kept}" for kept in plan.kept)):
                self._write(WarningEvent(message=message))

    def phase(self, label: str, total: int) -> None:
        with self._lock:
            self._finish_phase()
            self._phase, self._done, self._total = label, 0, total
            self._progress()

    def _finish_phase(self) -> None:
        if self._phase and self._done:
            self._progress()
        self._phase = ""

    def _progress(self) -> None:
        from ctconvert.records.events import ProgressEvent

        self._last = time.monotonic()
        self._write(ProgressEvent(phase=self._phase, done=self._done, total=self._total))

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            if time.monotonic() - self._last >= _EVERY:
                self._progress()

    def module(self, name: str, layout: str | None) -> None:
        from ctconvert.records.events import ModuleEvent

        with self._lock:
            self._write(ModuleEvent(module=name, layout=layout))

    def note(self, text: str) -> None:
        from ctconvert.records.events import WarningEvent

        with self._lock:
            self._write(WarningEvent(message=text))

    def end(self, document: dict[str, Any]) -> None:
        """Writes the last line and closes the file.

        Raises:
            OSError: it cannot be written.
        """
        from ctconvert.records.events import ResultEvent

        with self._lock:
            self._finish_phase()
            self._write(ResultEvent(document=document))
            if self._file is not None:
                self._file.close()


class Both:
    """Two :class:`ctconvert.progress.Progress`, told the same."""

    def __init__(self, first: Any, second: Any) -> None:
        self._all = (first, second)

    def plan(self, plan: Plan) -> None:
        for one in self._all:
            one.plan(plan)

    def phase(self, label: str, total: int) -> None:
        for one in self._all:
            one.phase(label, total)

    def advance(self, count: int) -> None:
        for one in self._all:
            one.advance(count)

    def module(self, name: str, layout: str | None) -> None:
        for one in self._all:
            one.module(name, layout)

    def note(self, text: str) -> None:
        for one in self._all:
            one.note(text)
