"""``python -m ctconvert`` and the ``ctconvert`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line."""
    try:
        from ctconvert.cli import app

        app()
    except KeyboardInterrupt:  # before the command itself could catch it
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
