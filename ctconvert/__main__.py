"""``python -m ctconvert`` and the ``ctconvert`` command."""

from __future__ import annotations

import os
import sys

from ctconvert.signals import SIGNALS, Stopped


def main() -> None:
    """Runs the command line."""
    _open_standard_files()
    try:
        SIGNALS.install()
        from ctconvert.cli import run

        code = run(sys.argv[1:])
    except Stopped:  # before or after the command itself, which catches it
        code = SIGNALS.code or 1
        if line := SIGNALS.line:
            with SIGNALS.telling():
                sys.stderr.write(f"error: {line}\n")
                sys.stderr.flush()
            if "--json" in sys.argv:
                sys.stdout.write(_stopped(code, line))
    SIGNALS.done(code)
    sys.exit(code)


def _stopped(code: int, line: str) -> str:
    """A ``records.Failure``; the command line's own modules may not be there yet."""
    import json

    error = {"kind": "Interrupted", "message": line}
    return json.dumps({"ok": False, "exit_code": code, "error": error, "refusals": []}) + "\n"


def _open_standard_files() -> None:
    """Puts the null device in the place of closed ones, which files opened later would take."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 (for as long as the process lives)


if __name__ == "__main__":
    main()
