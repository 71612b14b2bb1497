"""The command line, in this process."""

from __future__ import annotations

from typing import NamedTuple

from typer.testing import CliRunner


class Outcome(NamedTuple):
    """What a command line ended with."""

    code: int
    stdout: str
    stderr: str


def run(*args: object) -> Outcome:
    """Runs ``ctconvert`` with these arguments; what is no exit is raised."""
    from ctconvert.cli import app

    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)
