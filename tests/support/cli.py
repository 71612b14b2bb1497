"""The command line for tests: in this process, or as a program of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from ctconvert import cli

ROOT = Path(__file__).resolve().parent.parent.parent


class Outcome(NamedTuple):
    """How a command line ended."""

    code: int
    stdout: str
    stderr: str


def run(*args: object, encoding: str = "utf-8") -> Outcome:
    """The command line, in this process, as ``main`` runs it; a traceback is raised."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.run([str(arg) for arg in args])
    return Outcome(code, *(_text(stream, encoding) for stream in (out, err)))


def _text(stream: io.TextIOWrapper, encoding: str) -> str:
    stream.flush()
    raw = stream.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode(encoding)


def environment() -> dict[str, str]:
    """What a program of its own runs in: this checkout, no CUDA."""
    others = os.environ.get("PYTHONPATH", "")  # where packages are in a folder of their own
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep * bool(others)}{others}"}


def program(
    *args: object, more: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """The command line as ``python -m ctconvert``, with ``more`` in its environment."""
    return subprocess.run(
        [sys.executable, "-m", "ctconvert", *map(str, args)],
        **({"capture_output": True, "text": True, "timeout": 120} | options),
        env=environment() | dict(more or {}),
    )
