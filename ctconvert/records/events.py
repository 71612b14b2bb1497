"""What ``--json-events`` writes, one object a line: told apart by ``event``."""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class PlanEvent(Struct, frozen=True, kw_only=True, tag_field="event", tag="plan"):
    """What a run will make; ``layouts`` counts the modules of each, of a conversion."""

    target: str | None
    modules: int
    layouts: dict[str, int]
    copied_tensors: int
    source_bytes: int
    output_bytes: int


class ProgressEvent(Struct, frozen=True, kw_only=True, tag_field="event", tag="progress"):
    """Bytes done of a phase; the first of each has ``done`` 0, others come now and then."""

    phase: str
    done: int
    total: int


class ModuleEvent(Struct, frozen=True, kw_only=True, tag_field="event", tag="module"):
    """A module is done, with its layout where it was converted."""

    module: str
    layout: str | None = None


class WarningEvent(Struct, frozen=True, kw_only=True, tag_field="event", tag="warning"):
    """What a user should know."""

    message: str


class ResultEvent(Struct, frozen=True, kw_only=True, tag_field="event", tag="result"):
    """The last one: the document that ``--json`` prints."""

    document: dict[str, Any]


Event = PlanEvent | ProgressEvent | ModuleEvent | WarningEvent | ResultEvent
