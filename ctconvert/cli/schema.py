"""``ctconvert schema``."""

from __future__ import annotations

from ctconvert.cli.failures import failures
from ctconvert.cli.sink import Sink


def schema() -> None:
    """Print the JSON Schema of the manifest, ctconvert.json."""
    with failures():
        from ctconvert import records

        Sink(as_json=True).show(records.schema(), lambda sink, found: None)
