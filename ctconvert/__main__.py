"""``python -m ctconvert`` and the ``ctconvert`` command."""

from __future__ import annotations


def main() -> None:
    """Runs the command line."""
    from ctconvert.cli import app

    app()


if __name__ == "__main__":
    main()
