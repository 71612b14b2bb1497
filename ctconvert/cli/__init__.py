"""The command line: one file a verb, one sink for what they say, one place for failures."""

from ctconvert.cli.program import app, run

__all__ = ["app", "run"]
