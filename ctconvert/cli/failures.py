"""Every failure ends in one line on stderr, with --json in one document too, and an exit code."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer
from msgspec.structs import replace

from ctconvert.cli.logs import COMMAND, LOG
from ctconvert.cli.sink import Sink
from ctconvert.cli.streams import flush
from ctconvert.cli.text import printable
from ctconvert.errors import CtconvertError, UnsupportedError
from ctconvert.signals import SIGNALS, Stopped

if TYPE_CHECKING:
    from ctconvert.records import Failure

#: What :func:`tell` has a line for; any other error is a mistake in this program.
TOLD = (CtconvertError, OSError, MemoryError, RuntimeError, Stopped, KeyboardInterrupt)


def resumes() -> str:
    """How a stopped run that stages its output goes on: the very command, as a shell reads it."""
    verb, *rest = COMMAND or ["repack"]
    again = [argument for argument in rest if argument not in ("--resume", "--overwrite")]
    return f"; to continue: {shlex.join(['ctconvert', verb, '--resume', *again])}"


@contextmanager
def failures(sink: Sink, device: str = "cpu", advice: str = "") -> Iterator[None]:
    """What a verb runs in.

    Args:
        sink: where its result goes, which ends here.
        device: what may run out of memory.
        advice: what to say to a user who stops it.
    """
    SIGNALS.advice = advice
    try:
        sink.begin()
        yield
        sink.end()
        flush()
    except typer.Exit:
        raise
    except TOLD as error:
        raise typer.Exit(tell(error, sink, device)) from None
    finally:
        SIGNALS.advice = ""


def tell(error: BaseException, sink: Sink, device: str = "cpu") -> int:
    """Tells of an error, in a line and in JSON, and returns its exit code.

    An error that is a mistake of this program is raised.
    """
    failure = _failure(error, device)
    if failure is None:
        raise error
    if isinstance(error, OSError) and error.filename == "stdout":
        if not isinstance(error, BrokenPipeError):  # where nobody reads on, nobody needs a line
            LOG.error(failure.error.message)
        return failure.exit_code
    first, rest = failure.error.message, []
    if isinstance(error, UnsupportedError):
        first, *rest = first.split("\n")
    with SIGNALS.telling():
        LOG.error(first)
    for line in rest:  # one a refusal
        LOG.error(line, extra={"follows": True})
    if rest:  # which are records in JSON
        failure = replace(failure, error=replace(failure.error, message=first.removesuffix(":")))
    with suppress(OSError):
        sink.end(failure)
    return failure.exit_code


def tell_mistake(error: Exception, sink: Sink) -> None:
    """The JSON of what is a mistake of this program; people get its traceback."""
    with suppress(OSError):
        sink.end(failed(1, "Internal", f"{type(error).__name__}: {error}"))


def failed(code: int, kind: Any, message: str, **about: Any) -> Failure:
    """The record of a failure."""
    from ctconvert.records import Error, Failure

    refusals = about.pop("refusals", ())
    return Failure(
        exit_code=code, error=Error(kind=kind, message=message, **about), refusals=refusals
    )


def _failure(error: BaseException, device: str) -> Failure | None:
    """What there is to say of an error; None of a mistake of this program."""
    if isinstance(error, Stopped | KeyboardInterrupt):
        line = SIGNALS.line or "interrupted" + SIGNALS.advice
        return failed(SIGNALS.code or 130, "Interrupted", line)
    if isinstance(error, CtconvertError):
        return failed(
            error.exit_code,
            error.kind,
            error.message,
            module=error.module,
            file=error.file,
            refusals=error.refusals,
        )
    if isinstance(error, OSError):
        name = error.filename and os.fsdecode(error.filename)
        where = f"{name}: " if name else ""
        return failed(1, "System", f"{where}{error.strerror or error}", file=name or None)
    if isinstance(error, MemoryError) or _device_is_full(error):
        return failed(1, "OutOfMemory", _out_of_memory(device))
    return None


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
    return f"{printable(message).rstrip('.?')}; see {command} --help"
