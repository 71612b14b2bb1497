"""What goes to stderr and to a log file: all of it through ``logging``, as of ``ctconvert``.

On stderr errors begin with ``error:``; a log file has the time and level of every line.
"""

from __future__ import annotations

import functools
import inspect
import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from ctconvert.cli.text import printable
from ctconvert.errors import UsageError
from ctconvert.version import __version__

LOG = logging.getLogger("ctconvert")
#: The arguments of the command line that runs.
COMMAND: list[str] = []


class _Stderr(logging.Handler):
    """Lines on whatever stderr is now. That nobody can read them is no reason to stop."""

    #: What shows a line instead, while a bar is on the screen.
    printer: Callable[[str], object] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        error = record.levelno >= logging.ERROR and not hasattr(record, "follows")
        prefix = "error: " if error else ""
        line = prefix + printable(record.getMessage())
        with suppress(OSError):
            if self.printer is not None:
                self.printer(line)
                return
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{self.formatTime(record)} {record.levelname} {printable(record.getMessage())}"


STDERR = _Stderr(logging.INFO)
LOG.addHandler(STDERR)
LOG.propagate = False
LOG.setLevel(logging.INFO)


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors alone on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also tell of every module.")]
LogFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Append what happens to a file, with times.")
]


@contextmanager
def logging_to(level: int, file: Path | None) -> Iterator[None]:
    """Logs on stderr from a level on, and everything to a file.

    Raises:
        UsageError: it cannot be opened.
    """
    try:
        handler = None if file is None else logging.FileHandler(file, errors="backslashreplace")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"--log-file {file}: {reason}".replace("\0", "\\0")) from None
    STDERR.setLevel(level)
    if handler is not None:
        handler.setFormatter(_Formatter())
        LOG.addHandler(handler)
    LOG.setLevel(logging.INFO if handler is None else logging.DEBUG)
    LOG.setLevel(min(LOG.level, level))
    try:
        yield
    finally:
        STDERR.setLevel(logging.INFO)
        LOG.setLevel(logging.INFO)
        if handler is not None:
            LOG.removeHandler(handler)
            handler.close()


def logged(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb with the options of logging after its own; ``--json`` keeps stderr for errors."""

    @functools.wraps(verb)
    def run(
        *args: Any,
        quiet: bool = False,
        verbose: bool = False,
        log_file: Path | None = None,
        **options: Any,
    ) -> None:
        silent = quiet or options.get("json_", False)
        level = logging.DEBUG if verbose else logging.ERROR if silent else logging.INFO
        with logging_to(level, log_file):
            LOG.debug("ctconvert %s: %s", __version__, shlex.join(COMMAND))
            verb(*args, **options)

    own = inspect.signature(verb, eval_str=True).parameters.values()
    kind = inspect.Parameter.KEYWORD_ONLY
    more = [
        inspect.Parameter(name, kind, default=default, annotation=annotation)
        for name, default, annotation in (
            ("quiet", False, Quiet),
            ("verbose", False, Verbose),
            ("log_file", None, LogFile),
        )
    ]
    parameters = [*(one.replace(kind=kind) for one in own), *more]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    del run.__wrapped__
    return run
