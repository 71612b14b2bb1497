"""The standard streams, which may be a terminal, closed, full or nobody's."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

from ctconvert.cli.text import printable


def is_screen(stream: TextIO) -> bool:
    """Whether a stream is a terminal that moves its cursor."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def write(text: str) -> None:
    """Text on stdout.

    Raises:
        OSError: it cannot be written; the file's name is ``stdout``.
    """
    try:
        sys.stdout.write(text)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "stdout") from None


def flush() -> None:
    """Writes what stdout still holds.

    Raises:
        OSError: it cannot; the file's name is ``stdout``.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "stdout") from None


def say(text: str) -> None:
    """A line on stderr. That nobody can read it is no reason to stop."""
    with suppress(OSError):
        sys.stderr.write(printable(text) + "\n")
        sys.stderr.flush()


def say_error(text: str) -> None:
    """The one line a failure ends in."""
    say(f"error: {text}")
