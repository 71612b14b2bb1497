"""``ctconvert schema``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ctconvert.cli.failures import failures
from ctconvert.cli.sink import Sink, to_json
from ctconvert.cli.streams import write
from ctconvert.errors import UsageError
from ctconvert.names import meant

#: What has a schema: the manifest, the ``--json`` of each verb, and the lines of ``--json-events``.
NAMES = (
    *("manifest", "inspect", "doctor", "dry-run", "repack", "push", "verify", "diff", "restore"),
    *("bench", "bench-load", "layouts", "failure", "events"),
)


def schema(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help=f"Of what: {', '.join(NAMES)}.",
            autocompletion=lambda incomplete: [n for n in NAMES if n.startswith(incomplete)],
        ),
    ] = "manifest",
) -> None:
    """Print the JSON Schema of the manifest, or of what a verb prints."""
    with failures(Sink()):
        write(to_json(schema_of(name)))


def schema_of(name: str) -> dict[str, Any]:
    """The JSON Schema of one of :data:`NAMES`, made of the records.

    Raises:
        UsageError: it is none of them.
    """
    from ctconvert import records

    if name == "manifest":
        return records.schema()
    if name == "events":
        from ctconvert.records.events import Event

        return _schema(Event)
    if name == "failure":
        return _schema(records.Failure)
    return _document(_record(name))


def _record(name: str) -> type:
    """The record that a verb shows."""
    from ctconvert import records

    if name == "inspect":
        from ctconvert.planning.inspection import Inspection

        return Inspection
    if name == "dry-run":
        from ctconvert.planning.outline import Outline

        return Outline
    if name == "bench":
        from ctconvert.runtime.benchmark import BenchReport

        return BenchReport
    if name == "bench-load":
        from ctconvert.runtime.loadtime import LoadReport

        return LoadReport
    if name == "layouts":
        from ctconvert.cli.layouts import Listing

        return Listing
    found: dict[str, type] = {
        "doctor": records.Examination,
        "repack": records.Report,
        "push": records.Pushed,
        "restore": records.Report,
        "verify": records.Verified,
        "diff": records.Differing,
    }
    if name not in found:
        raise UsageError(
            f"schema {name!r}: it must be one of {', '.join(NAMES)}{meant(name, NAMES)}"
        )
    return found[name]


def _schema(kind: Any) -> dict[str, Any]:
    import msgspec

    return {"$schema": _DRAFT, **msgspec.json.schema(kind)}


def _document(kind: type) -> dict[str, Any]:
    """Of ``--json``: a record after an ``ok`` that is true, or a failure."""
    import msgspec

    from ctconvert.records import Failure

    (record, failure), parts = msgspec.json.schema_components(
        [kind, Failure], ref_template="#/$defs/{name}"
    )

    def with_ok(value: bool, one: dict[str, Any]) -> dict[str, Any]:
        ok = {"type": "object", "properties": {"ok": {"const": value}}, "required": ["ok"]}
        return {"allOf": [ok, one]}

    either = [with_ok(True, record), with_ok(False, failure)]
    return {"$schema": _DRAFT, "oneOf": either, "$defs": parts}


_DRAFT = "https://json-schema.org/draft/2020-12/schema"
