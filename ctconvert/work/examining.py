"""``doctor``: what headers and config alone tell of what will go wrong in an engine. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from msgspec.structs import replace

from ctconvert import layouts
from ctconvert.assembly import Axis, Part, can_cut, can_join, expanded
from ctconvert.errors import BadInputError, UsageError
from ctconvert.formats.patterns import Patterns
from ctconvert.formats.quantization import QuantizationSettings, guess_class
from ctconvert.formats.quantization.names import other_names
from ctconvert.names import natural
from ctconvert.planning.assemble import FUSED, Candidate
from ctconvert.planning.choose import Chooser, check_options
from ctconvert.planning.describe import Description, describe
from ctconvert.planning.make import make_plan
from ctconvert.planning.ranks import axis_of, heads_of
from ctconvert.progress import Progress
from ctconvert.records import Examination, Finding, Options, SourceModule
from ctconvert.specs import WeightSpec
from ctconvert.store.checkpoint import CONFIG, Checkpoint
from ctconvert.work.executors import Executor
from ctconvert.work.importing import load_torch

#: Local names that only a quantised weight's tensors have.
_QUANTISED = frozenset(
    {
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        *("weight_global_scale", "input_scale", "input_zero_point", "input_global_scale"),
        *("compressed", "bitmask"),
    }
)


def examine(
    checkpoint: Checkpoint,
    target: str | None,
    splits: Sequence[int],
    executor: Executor | None,
    progress: Progress,
) -> Examination:
    """Looks for what will go wrong.

    Args:
        checkpoint: a source.
        target: also look for what no layout of it takes.
        splits: numbers of ranks of tensor parallelism.
        executor: runs what reads weights; they are not read where None.
        progress: told of source bytes done.

    Raises:
        UsageError: there is no such target, or a split is not positive.
        BadInputError: there is no quantization_config that can be read.
    """
    options = None if target is None else Options(target=target, keep_unsupported=True)
    if options is not None:
        check_options(options)
    if any(split < 1 for split in splits):
        raise UsageError("--tensor-parallel: numbers of ranks are positive")
    QuantizationSettings.parse(checkpoint.config, checkpoint.store.path(CONFIG))
    findings: list[Finding] = []
    modules = 0
    try:
        description = describe(checkpoint)
    except BadInputError as error:
        findings.append(_error("unreadable", error.message, error.module))
    else:
        modules = len(description.modules)
        findings += _of_headers(description, options, splits)
        if executor is not None:
            load_torch()
            from ctconvert.work.scanning import scan

            findings += scan(description, options, executor, progress)
    findings.sort(key=lambda one: (one.severity, natural(one.module or "")))
    return Examination(
        model=checkpoint.store.where,
        target=target,
        tensor_parallel=tuple(splits),
        data=executor is not None,
        modules=modules,
        findings=tuple(findings),
    )


def _error(kind: Any, message: str, module: str | None = None, split: int | None = None) -> Finding:
    return Finding(severity="error", kind=kind, message=message, module=module, split=split)


def _warning(kind: Any, message: str, module: str | None = None) -> Finding:
    return Finding(severity="warning", kind=kind, message=message, module=module)


def _of_headers(
    description: Description, options: Options | None, splits: Sequence[int]
) -> Iterator[Finding]:
    refused = set()
    if options is not None:
        for refusal in make_plan(description, options).kept:
            refused.add(refusal.module)
            kind = "unreadable" if refusal.fault else "unsupported"
            yield _error(kind, refusal.reason, refusal.module)
    for module in description.modules.values():
        if module.reason and module.name not in refused:
            yield _error("unreadable", module.reason, module.name)
        for scale in module.uncalibrated:
            yield _warning("scale", f"{scale} is 0, never calibrated, and dropped", module.name)
    yield from _unmatched(description)
    yield from _dense(description)
    yield from _fused(description)
    yield from _unowned(description)
    yield from _splits(description, options, splits)


def _dense_weights(description: Description) -> Iterator[str]:
    """The modules with an unquantised matrix."""
    for name, entry in description.plain.items():
        if name.endswith(".weight") and len(entry.spec.shape) == 2:
            yield name.removesuffix(".weight")


def _unmatched(description: Description) -> Iterator[Finding]:
    """Targets of config groups that mean no module, under whatever prefix."""
    names = [*description.modules, *_dense_weights(description)]
    for target, groups in description.settings.targets.items():
        pattern = Patterns([target])
        is_class = "." not in target and target[:1].isupper()
        if is_class and target not in ("Linear", "Embedding"):
            continue  # of another class no checkpoint tells
        if any(pattern.any(name, guess_class(name)) for name in names):
            continue
        if any(pattern.any(other, guess_class(other)) for n in names for other in other_names(n)):
            continue
        message = f"target {target!r} of {', '.join(groups)} matches nothing"
        yield _error("unmatched", message)


def _dense(description: Description) -> Iterator[Finding]:
    settings = description.settings
    for name in _dense_weights(description):
        for scheme in settings.schemes_of(name, guess_class(name)):
            if scheme.scheme is None or scheme.scheme.weights is None:
                continue
            yield _warning(
                "dense",
                f"{scheme.group} means it (target {scheme.target!r}), and it is not quantised; an "
                "engine may look for its scales: list it in ignore",
                name,
            )
            break


def _fused(description: Description) -> Iterator[Finding]:
    """What engines run as one kernel, and is not of one kind."""
    dense = set(_dense_weights(description))
    for name in description.modules:
        parent, dot, leaf = name.rpartition(".")
        for fused, leaves in FUSED.items():
            parts = [f"{parent}{dot}{item}" for item in leaves]
            have = [part for part in parts if part in description.modules]
            if leaf not in leaves or name != have[0]:
                continue
            if lacking := [part for part in parts if part in dense]:
                shown = ", ".join(part.rpartition(".")[2] for part in lacking)
                yield _error("fused", f"{shown} of it is not quantised", f"{parent}{dot}{fused}")
                continue
            sources = [description.modules[part].source for part in have]
            known = [source for source in sources if source is not None]
            if len(known) == len(have) > 1 and (why := _apart(known)):
                yield Finding(
                    severity=why[0], kind="fused", message=why[1], module=f"{parent}{dot}{fused}"
                )


def _apart(sources: Sequence[SourceModule]) -> tuple[Any, str] | None:
    """How parts of a fused module differ: by their schemes, or by scales that a kernel shares."""
    support = can_join([expanded(source.weight) for source in sources])
    if not support and support.reason.startswith("its parts differ"):
        return "error", support.reason
    for local, _ in sources[0].weight.side:
        if len({source.values.get(local) for source in sources}) > 1:
            severity = "error" if local == "weight_global_scale" else "warning"
            return severity, f"its parts have different {local} values, and a kernel has one"
    return None


def _unowned(description: Description) -> Iterator[Finding]:
    for module in description.modules.values():
        if module.source is None:
            continue
        known = module.source.tensors.keys() | module.source.beside.keys()
        if over := [local for local in module.entries if local not in known]:
            yield _error("unowned", f"no scheme explains {', '.join(over)}", module.name)
    for name in description.plain:
        module_name, _, local = name.rpartition(".")
        if local in _QUANTISED and module_name not in description.modules:
            yield _error("unowned", f"{local} stands beside no quantised weight", module_name)
    for name in description.checkpoint.unlisted:
        yield _warning("unowned", f"tensor {name} is in no index, and no loader reads it")


def _splits(
    description: Description, options: Options | None, splits: Sequence[int]
) -> Iterator[Finding]:
    """What cannot be cut, or what no layout of the target takes when it is."""
    found = heads_of(description.checkpoint.config)
    heads, shared = found.count, found.shared
    chooser = None if options is None else Chooser(options, description.checkpoint.config)
    known: dict[tuple[WeightSpec, Axis, int], str] = {}
    for split in splits:
        if heads is not None and heads % split:
            yield _error("split", f"{heads} attention heads are no multiple of it", split=split)
        if shared is not None and max(shared, split) % min(shared, split):
            yield _error("split", f"{shared} key and value heads cannot be shared out", split=split)
        if split == 1:
            continue  # nothing is cut
        for module in description.modules.values():
            axis = axis_of(module.name)
            if axis is None or module.source is None or module.reason:
                continue
            ranks = split
            if module.name.endswith(("k_proj", "v_proj")) and shared is not None:
                ranks = min(split, shared)  # whole heads, which several ranks then have
            key = module.source.weight, axis, ranks
            if key not in known:
                known[key] = _refused(module.source, axis, ranks, chooser)
            if known[key]:
                yield _error("split", known[key], module.name, split)


def _refused(source: SourceModule, axis: Axis, ranks: int, chooser: Chooser | None) -> str:
    """Why a rank's part is none that can run; nothing where it can, or a whole could not either."""
    size = source.weight.n if axis == "n" else source.weight.k
    if size % ranks:
        return f"{axis.upper()} = {size} is no multiple of {ranks} ranks"
    some = (0, size // ranks)
    support = can_cut(expanded(source.weight), axis, some)
    if not support:
        return support.reason
    if chooser is None:
        return ""
    part = Part(0, None if source.experts is None else 0)
    if isinstance(chooser.choice(Candidate(source.name, (source,), part)), str):
        return ""  # which is a finding of its own
    cut = replace(part, rows=some) if axis == "n" else replace(part, columns=some)
    candidate = Candidate(source.name, (source,), cut)
    made = chooser.choice(candidate)
    if isinstance(made, str):
        return made
    weight, padded = candidate.weight, made.recipe.weight
    if (weight.n, weight.k) == (padded.n, padded.k) or _as_it_is(weight, chooser.options):
        return ""
    return (
        f"a rank's {weight.n}x{weight.k} would have to be padded to {padded.n}x{padded.k} for "
        f"{made.recipe.layout}, and what an engine cuts when it loads cannot be; "
        "repack --tensor-parallel can"
    )


def _as_it_is(weight: WeightSpec, options: Options) -> bool:
    """Whether a layout of the target takes a weight without padding."""
    for name in layouts.TARGETS[options.target or ""]:
        layout = layouts.get(name)
        if layout is None or layout.dtype is not None or not layout.supports(weight):
            continue
        if layout.padded_shape(weight) == (weight.n, weight.k):
            return True
    return False
