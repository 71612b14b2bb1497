"""Every failure ends in one line on stderr and a documented exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ctconvert.cli.streams import flush, say, say_error
from ctconvert.cli.text import printable
from ctconvert.errors import CtconvertError, UnsupportedError
from ctconvert.signals import SIGNALS, Stopped

#: What :func:`tell` has a line for; any other error is a mistake in this program.
TOLD = (CtconvertError, OSError, MemoryError, RuntimeError, Stopped, KeyboardInterrupt)
#: How a stopped run that stages its output goes on.
RESUMES = "; run it again with --resume to continue"


@contextmanager
def failures(device: str = "cpu", advice: str = "") -> Iterator[None]:
    """What a verb runs in.

    Args:
        device: what may run out of memory.
        advice: what to say to a user who stops it.
    """
    SIGNALS.advice = advice
    try:
        yield
        flush()
    except typer.Exit:
        raise
    except TOLD as error:
        raise typer.Exit(tell(error, device)) from None
    finally:
        SIGNALS.advice = ""


def tell(error: BaseException, device: str = "cpu") -> int:
    """Writes the line of an error and returns its exit code; raises it where it has none."""
    if isinstance(error, Stopped | KeyboardInterrupt):
        say_error(SIGNALS.line() or "interrupted" + SIGNALS.advice)
        return SIGNALS.code or 130
    if isinstance(error, UnsupportedError):  # one line a refusal
        first, *refusals = str(error).split("\n")
        say_error(first)
        for refusal in refusals:
            say(refusal)
        return error.exit_code
    if isinstance(error, CtconvertError):
        say_error(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        if not (isinstance(error, BrokenPipeError) and error.filename == "stdout"):
            where = f"{error.filename}: " if error.filename else ""
            say_error(f"{where}{error.strerror or error}")
        return 1  # where nobody reads on, nobody needs a line
    if isinstance(error, MemoryError) or _device_is_full(error):
        say_error(_out_of_memory(device))
        return 1
    raise error


def _device_is_full(error: BaseException) -> bool:
    if "torch" not in sys.modules:  # then it is no error of torch's
        return False
    from ctconvert.transforms.device import is_out_of_memory

    return isinstance(error, RuntimeError) and is_out_of_memory(error)


def _out_of_memory(device: str) -> str:
    if device == "auto" and "torch" in sys.modules:
        from ctconvert.transforms.device import resolve

        device = str(resolve(device))
    if device in ("auto", "cpu"):
        return "out of memory on cpu; free some, or use a machine with more"
    return f"out of memory on {device}; use --device cpu"


def usage_line(message: str, command: str) -> str:
    """The line for a command line that cannot be read."""
    return f"{printable(message).rstrip('.')}; see {command} --help"
