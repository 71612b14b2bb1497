"""The records that plans, manifests and reports are made of, and JSON in and out.

Everything is decided in a :class:`Plan` before a byte of weight data is read; a :class:`Manifest`
is a plan and the hashes of what came of it. Both are all that a reader of an output needs: nothing
is worked out again from config.json. JSON is checked at this border and nowhere else: every type
and range, closed sets of names, and that the parts of a record fit each other.
"""

from __future__ import annotations

from ctconvert.records.border import from_json, to_json
from ctconvert.records.manifest import (
    FORMAT_VERSION,
    LARGEST_MANIFEST,
    FileRecord,
    Manifest,
    SourceRecord,
    Tool,
    schema,
)
from ctconvert.records.plan import (
    Convert,
    Copy,
    Item,
    Options,
    Origin,
    Plan,
    Recipe,
    Refusal,
    Restore,
    Shard,
    SourceFile,
    SourceModule,
    expert_entry,
    rank_prefix,
)
from ctconvert.records.reports import (
    Compared,
    Difference,
    Differing,
    Error,
    Examination,
    Failure,
    Finding,
    Judged,
    KernelRun,
    Pushed,
    Report,
    Verified,
)

__all__ = [
    "FORMAT_VERSION",
    "LARGEST_MANIFEST",
    "Compared",
    "Convert",
    "Copy",
    "Difference",
    "Differing",
    "Error",
    "Examination",
    "Failure",
    "FileRecord",
    "Finding",
    "Item",
    "Judged",
    "KernelRun",
    "Manifest",
    "Options",
    "Origin",
    "Plan",
    "Pushed",
    "Recipe",
    "Refusal",
    "Report",
    "Restore",
    "Shard",
    "SourceFile",
    "SourceModule",
    "SourceRecord",
    "Tool",
    "Verified",
    "expert_entry",
    "from_json",
    "rank_prefix",
    "schema",
    "to_json",
]
