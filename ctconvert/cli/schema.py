"""``ctconvert schema``."""

from __future__ import annotations

from ctconvert.cli.failures import failures
from ctconvert.cli.sink import Sink, to_json
from ctconvert.cli.streams import write


def schema() -> None:
    """Print the JSON Schema of the manifest, ctconvert.json."""
    with failures(Sink()):
        from ctconvert import records

        write(to_json(records.schema()))
