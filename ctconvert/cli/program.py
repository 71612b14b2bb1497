"""The command line, put together of its verbs."""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ctconvert.cli.bench import bench
from ctconvert.cli.diff import diff
from ctconvert.cli.doctor import doctor
from ctconvert.cli.failures import TOLD, tell, tell_mistake, usage_line
from ctconvert.cli.inspect import inspect
from ctconvert.cli.layouts import layouts
from ctconvert.cli.logs import COMMAND, LOG, logged
from ctconvert.cli.push import push
from ctconvert.cli.repack import repack
from ctconvert.cli.restore import restore
from ctconvert.cli.schema import schema
from ctconvert.cli.sink import Sink
from ctconvert.cli.streams import flush
from ctconvert.cli.verify import verify
from ctconvert.errors import UsageError
from ctconvert.version import __version__

#: What typer raises for a command line it cannot read; it exports only this subclass.
_Unreadable: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="ctconvert",
    help="Converts compressed-tensors checkpoints into kernel-ready ones, offline.\n\n"
    "Exit codes: 0 done, 1 the conversion or the verification failed, 2 bad usage or bad input "
    "(also: no manifest where one belongs), 3 the target cannot take a module, 130, 143 and 129 "
    "stopped by Ctrl-C, SIGTERM and SIGHUP.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help is plain text, of which no bracket is lost
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (inspect, doctor, repack, push, verify, diff, restore, bench, layouts, schema):
    app.command(verb.__name__)(logged(verb))


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"ctconvert {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name it cannot spell is no reason to fail
            stream.reconfigure(errors="backslashreplace")


def _run(arguments: list[str], sink: Sink) -> int:
    """The exit code of a command line; ``sink`` is for what its verb cannot tell itself."""
    try:
        code: int = app(args=arguments, prog_name="ctconvert", standalone_mode=False)
        flush()
        return code
    except _Unreadable as error:
        command = error.ctx.command_path if error.ctx else "ctconvert"
        sink.begin()
        return tell(UsageError(usage_line(error.format_message(), command)), sink)
    except TOLD as error:
        return tell(error, sink)


def _events_of(arguments: Sequence[str]) -> str | None:
    """Whether a command line, which may be none that can be read, asks for events on stdout."""
    pairs = itertools.pairwise(arguments)
    asked = "--json-events=-" in arguments or ("--json-events", "-") in pairs
    return "-" if asked and "--json" not in arguments else None


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; without arguments it shows the help."""
    if sys.stdout is None:
        LOG.error("stdout is closed; send it to /dev/null where nobody needs the result")
        return 2
    COMMAND[:] = arguments
    sink = Sink("--json" in arguments, _events_of(arguments))
    try:
        code = _run([*arguments] or ["--help"], sink)
    except Exception as error:
        sink.begin()
        tell_mistake(error, sink)
        raise
    try:
        flush()
    except OSError:  # said already; the interpreter need not try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code or (0 if arguments else 2)
