"""Where everything that a verb says goes: results to stdout, the rest to stderr.

People and programs get the same record, and nothing that a name holds reaches a terminal as it is:
texts go through :func:`printable`, JSON has escapes of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from ctconvert.cli.streams import is_screen, write
from ctconvert.cli.text import collapse, printable, table

if TYPE_CHECKING:
    from ctconvert.cli.progress import ShownProgress
    from ctconvert.records import Failure

R = TypeVar("R")


class Sink:
    """What a verb writes its result to; with ``as_json`` one JSON document and nothing else."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self._fields: dict[str, Any] = {}

    def show(self, record: R, people: Callable[[Sink, R], object]) -> None:
        """A result: as ``people`` prints it, or as fields of the document that :meth:`end` writes.

        A verb may still fail when it has shown a result.
        """
        if not self.as_json:
            people(self, record)
            return
        import msgspec

        self._fields |= msgspec.to_builtins(record)

    def end(self, failure: Failure | None = None) -> None:
        """Writes the document of ``--json``; nothing for people."""
        if not self.as_json:
            return
        import msgspec

        head = {"ok": True} if failure is None else msgspec.to_builtins(failure)
        write(to_json(head | self._fields))

    def progress(self) -> AbstractContextManager[ShownProgress | None]:
        """What shows how far a run is; None for programs."""
        if self.as_json:
            return nullcontext()
        from ctconvert.cli.progress import ShownProgress

        return ShownProgress()

    def line(self, text: str = "") -> None:
        write(printable(text) + "\n")

    def notes(self, notes: Iterable[str]) -> None:
        """Notes, those that differ in layer numbers only as one."""
        for note, count in collapse((note, ()) for note in notes):
            self.line(f"note: {note}" + (f" ({count} times)" if count != "1" else ""))

    def table(self, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
        """A table; on a screen it is folded to fit, elsewhere no cell is ever broken."""
        screen = is_screen(sys.stdout)
        width = shutil.get_terminal_size().columns if screen else None
        cells = [[printable(str(cell)) for cell in row] for row in (columns, *rows)]
        bold = screen and not os.environ.get("NO_COLOR")
        for lines in table(cells, width):
            for text in lines:
                write(f"\x1b[1m{text}\x1b[0m\n" if bold else text + "\n")
            bold = False


def to_json(value: Any) -> str:
    """A JSON document in ASCII, so that no name in it can steer a terminal or be unwritable."""
    return json.dumps(value, indent=2).replace("\x7f", "\\u007f") + "\n"
