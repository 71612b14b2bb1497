"""Where everything that a verb says goes: results to stdout, the rest to stderr.

People and programs get the same record, and nothing that a name holds reaches a terminal as it is:
texts go through :func:`printable`, JSON has escapes of its own.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from ctconvert.cli.streams import is_screen, write
from ctconvert.cli.text import collapse, printable, table
from ctconvert.errors import UsageError

if TYPE_CHECKING:
    from ctconvert.cli.events import Events
    from ctconvert.progress import Progress
    from ctconvert.records import Failure, Plan

R = TypeVar("R")


class Sink:
    """What a verb writes its result to.

    Args:
        as_json: print one JSON document, and nothing else on stdout.
        events: a file for what happens meanwhile, or ``-``: on stdout, and nothing else there.
    """

    def __init__(self, as_json: bool = False, events: str | None = None) -> None:
        self.as_json = as_json
        self._path = events
        self._events: Events | None = None
        self._fields: dict[str, Any] = {}

    def begin(self) -> None:
        """Opens what events go to.

        Raises:
            UsageError: both kinds of JSON would go to stdout.
            OSError: it cannot be opened.
        """
        if self._path is None or self._events is not None:
            return
        from ctconvert.cli.events import STDOUT, Events

        if self.as_json and self._path == STDOUT:
            self._path = None
            raise UsageError("--json and --json-events - both write to stdout; name a file")
        self._events = Events(self._path)

    def show(self, record: R, people: Callable[[Sink, R], object]) -> None:
        """A result: as ``people`` prints it, or as fields of the document that :meth:`end` writes.

        A verb may still fail when it has shown a result.
        """
        gc.freeze()  # what a large model's plan holds is no garbage: not looked through again
        if self.as_json or self._events is not None:
            import msgspec

            self._fields |= msgspec.to_builtins(record)
        if not self.as_json and self._path != "-":
            people(self, record)

    def end(self, failure: Failure | None = None) -> None:
        """Writes the document of ``--json``, and the last event; nothing for people."""
        if not self.as_json and self._path is None:
            return
        import msgspec

        head = {"ok": True} if failure is None else msgspec.to_builtins(failure)
        document = head | self._fields
        events, self._events = self._events, None
        if events is not None:
            # of a run that fails they may be what has failed
            with suppress(OSError) if failure is not None else nullcontext():
                events.end(document)
        if self.as_json:
            write(to_json(document))

    def planned(self, plan: Plan) -> None:
        """Tells programs of a plan that is not carried out."""
        if self._events is not None:
            self._events.plan(plan)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """What shows how far a run is, logs it, and tells it to programs."""
        from ctconvert.cli.progress import ShownProgress

        with ShownProgress(bar=not self.as_json) as shown:
            if self._events is None:
                yield shown
            else:
                from ctconvert.cli.events import Both

                yield Both(shown, self._events)

    def line(self, text: str = "") -> None:
        write(printable(text) + "\n")

    def notes(self, notes: Iterable[str]) -> None:
        """Notes, those that differ in layer numbers only as one."""
        for note, count in collapse((note, ()) for note in notes):
            self.line(f"note: {note}" + (f" ({count} times)" if count != "1" else ""))

    def table(self, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
        """A table; folded between words to fit a screen, or COLUMNS where that is set."""
        screen = is_screen(sys.stdout)
        told = screen or os.environ.get("COLUMNS", "").isdecimal()
        width = shutil.get_terminal_size().columns if told else None
        cells = [[printable(str(cell)) for cell in row] for row in (columns, *rows)]
        bold = screen and not os.environ.get("NO_COLOR")
        for lines in table(cells, width):
            for text in lines:
                write(f"\x1b[1m{text}\x1b[0m\n" if bold else text + "\n")
            bold = False


def to_json(value: Any) -> str:
    """A JSON document in ASCII, so that no name in it can steer a terminal or be unwritable."""
    return json.dumps(value, indent=2).replace("\x7f", "\\u007f") + "\n"
