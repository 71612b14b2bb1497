"""What the verbs report."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from ctconvert.records.plan import Refusal


class Error(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What went wrong, in one line, and in which module or file where that is known.

    Usage: the command cannot be run as asked. BadInput, Incomplete: the source is damaged or lacks
    a part. NoManifest: there is no output where one was named. Unsupported: the target cannot take
    a module. Conversion, Verification: the work failed, the output is not what it should be.
    Difference, Findings: what ``diff`` and ``doctor`` found. KernelUnavailable: a kernel cannot run
    here. System: the operating system's word. Internal: a mistake of this program.
    """

    kind: Literal[
        "Usage",
        "BadInput",
        "Incomplete",
        "NoManifest",
        "Unsupported",
        "Conversion",
        "Verification",
        "Difference",
        "Findings",
        "KernelUnavailable",
        "System",
        "OutOfMemory",
        "Interrupted",
        "Internal",
    ]
    message: str
    module: str | None = None
    file: str | None = None


class Failure(Struct, frozen=True, kw_only=True):
    """How a verb that fails ends under ``--json``.

    Where it has a result all the same (a refused plan's outline, what a comparison found), the
    result's own fields follow. A success is its result's fields after an ``ok`` that is true.
    """

    ok: bool = False
    exit_code: int
    error: Error
    refusals: tuple[Refusal, ...] = ()


class KernelRun(Struct, frozen=True):
    """What running a layout's modules showed: the worst error, where, and what was allowed.

    ``plain``: a path in plain torch ran, of the layout's tensors, because its kernel is not here.
    """

    layout: str
    modules: int
    worst_error: float
    module: str
    case: str
    tolerance: float
    plain: bool = False


class Pushed(Struct, frozen=True, kw_only=True):
    """What was put on the Hub, or of a dry run what would be: ``push --json``.

    ``revision`` is the branch, or ``refs/pr/N``; ``commit``, ``url`` and ``pull_request`` are there
    where something was sent. ``uploaded`` are the files that the Hub did not have so, ``removed``
    those of an earlier push.
    """

    out: str
    repo: str
    revision: str
    dry_run: bool
    created: bool
    files: int
    bytes: int
    uploaded: tuple[str, ...]
    upload_bytes: int
    removed: tuple[str, ...]
    notes: tuple[str, ...]
    commit: str | None = None
    url: str | None = None
    pull_request: str | None = None


class Report(Struct, frozen=True, kw_only=True):
    """What a conversion or restoration did: ``--json`` of both verbs.

    With ``part`` (``2/4``), all but the source is of that part, and nothing is at ``out`` yet.
    """

    out: str
    target: str | None
    layouts: dict[str, int]
    modules: int
    copied_tensors: int
    kept: tuple[Refusal, ...]
    shards: int
    resumed_shards: int
    source_bytes: int
    output_bytes: int
    side_files: tuple[str, ...]
    notes: tuple[str, ...]
    pushed: Pushed | None = None
    part: str | None = None


class Difference(Struct, frozen=True, kw_only=True):
    """Where a module of one checkpoint is not that of another.

    ``what`` is the first of its tensors (decoded: ``codes``, ``scale``, ``zero_point``, ...) or
    properties that differs, ``first`` how, ``elements`` how many elements of that tensor do (0
    where it is not about elements), ``weights`` how many weights of the module differ (experts).
    """

    module: str
    what: str
    first: str
    elements: int = 0
    weights: int = 1


class Differing(Struct, frozen=True, kw_only=True):
    """What comparing the weights of two checkpoints found: ``diff --json``.

    ``modules`` and ``tensors`` count the quantised modules and the other tensors of both.
    """

    a: str
    b: str
    modules: int
    tensors: int
    differences: tuple[Difference, ...]


class Finding(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that will go wrong, or may (a warning), in the whole checkpoint or in a module.

    ``split`` is the tensor parallelism at which it does.

    unreadable: the config and the tensors contradict each other. unmatched: a target means no
    module. dense: a target means it by class or pattern, and it is not quantised. fused: engines
    run it as one with others, from which it differs. unsupported: no layout of the target takes it.
    split: it cannot be cut so, or no layout takes the cut. unowned: no scheme explains the tensor.
    damaged: its data cannot be decoded or encoded (a scale that is not finite, or not after the
    layout's power of two). scale: zero or subnormal. channel: without information.
    """

    severity: Literal["error", "warning"]
    kind: Literal[
        "unreadable",
        "unmatched",
        "dense",
        "fused",
        "unsupported",
        "split",
        "unowned",
        "damaged",
        "scale",
        "channel",
    ]
    message: str
    module: str | None = None
    split: int | None = None


class Examination(Struct, frozen=True, kw_only=True):
    """What ``doctor`` found: ``doctor --json``. ``data`` says whether weights were read."""

    model: str
    target: str | None
    tensor_parallel: tuple[int, ...]
    data: bool
    modules: int
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> int:
        return sum(finding.severity == "error" for finding in self.findings)


class Compared(Struct, frozen=True, kw_only=True):
    """What a comparison with a source found equal."""

    checkpoint: str
    source: str
    modules: int
    copied_tensors: int
    source_bytes: int


class Judged(Struct, frozen=True, kw_only=True):
    """What compressed-tensors' own decompressors say of a source's weights and an output's.

    ``agree`` counts weights that are equal; ``not_judged`` those it cannot decode, or is known to
    decode wrongly, by reason.
    """

    agree: int
    not_judged: dict[str, int]


class Verified(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a verification found to be as the manifest says: ``verify --json``.

    ``against`` is there where a source was compared, ``independent`` where compressed-tensors was
    the judge, ``kernels`` (by layout) where they ran; ``without_kernel`` counts the modules, by
    layout, of which that proves nothing: no kernel here runs them.
    """

    checkpoint: str
    tensors: int
    modules: int
    files: int
    bytes: int
    against: Compared | None = None
    independent: Judged | None = None
    kernels: dict[str, KernelRun] | None = None
    without_kernel: dict[str, int] = {}
