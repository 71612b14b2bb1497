"""The standard streams, which may be a terminal, closed, full or nobody's."""

from __future__ import annotations

import os
import sys
from typing import TextIO


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
