"""The plan: everything decided before a byte of weight data is read."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ctconvert import __version__, layouts
from ctconvert.checkpoint.header import Shard, TensorEntry, build_header
from ctconvert.description import Description, Module, Part, total_bytes
from ctconvert.errors import BadInputError, UnsupportedError, UsageError
from ctconvert.layouts import Layout
from ctconvert.specs import TensorSpec, WeightSpec
from ctconvert.stacking import can_stack, stacked_spec

#: Fused modules and their parts, in order, under the names vLLM uses.
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def matches(pattern: str, module: str) -> bool:
    """Whether a module's name fits a glob, or ``re:`` and a regular expression."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return fnmatch.fnmatchcase(module, pattern)


def _names(modules: Mapping[str, Module]) -> Iterator[str]:
    """Every name an output module can have: the source's, and those of fused ones."""
    for name in modules:
        yield name
        parent, dot, leaf = name.rpartition(".")
        for fused, leaves in FUSED.items():
            if leaf in leaves:
                yield f"{parent}{dot}{fused}"


@dataclass(frozen=True)
class Options:
    """What the user asked for; all of it shapes the bytes of the output."""

    target: str
    fuse: bool = False
    keep_unsupported: bool = False
    overrides: tuple[tuple[str, str], ...] = ()
    max_shard_size: int = 5_000_000_000

    def __post_init__(self) -> None:
        if self.target not in layouts.TARGETS:
            raise UsageError(
                f"unknown target {self.target!r}; the targets are {', '.join(layouts.TARGETS)}"
            )
        for pattern, name in self.overrides:
            if layouts.get(name) is None:
                known = ", ".join(layout.name for layout in layouts.LAYOUTS)
                raise UsageError(
                    f"--layout {pattern}={name}: no such layout; the layouts are {known}"
                )
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise UsageError(f"--layout {pattern}={name}: {error}") from None
        if self.max_shard_size < 1:
            raise UsageError("--max-shard-size must be positive")

    def preference(self, module: str) -> tuple[str, ...]:
        """The layouts to try for a module, in order: an override alone, or the target's."""
        for pattern, name in self.overrides:
            if matches(pattern, module):
                return (name,)
        return layouts.TARGETS[self.target]


@dataclass(frozen=True)
class Refusal:
    """A quantised module that gets no layout, with the reason."""

    module: str
    format: str
    scheme: str
    reason: str

    def __str__(self) -> str:
        text = f"{self.module} ({self.format}, {self.scheme}): {self.reason}"
        return text.replace("\n", "\\n")


@dataclass
class ModulePlan:
    """A module of the output.

    ``units`` has one entry an expert (a single one but for 3-D tensors), each the parts that are
    stacked along N. ``outputs`` are the tensors by full name; ``beside`` those carried over
    unchanged (a fused module's parts are joined along dimension 0).
    """

    name: str
    layout: Layout
    spec: WeightSpec
    units: list[list[Part]]
    stacked_experts: bool
    outputs: dict[str, TensorSpec]
    beside: dict[str, list[TensorEntry]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def parts(self) -> list[Part]:
        return self.units[0]

    @property
    def input_bytes(self) -> int:
        """Source bytes of one unit."""
        return sum(total_bytes(part.entries.values()) for part in self.parts)

    @property
    def output_bytes(self) -> int:
        """Output bytes of one unit."""
        return sum(spec.nbytes for spec in self.outputs.values()) // len(self.units)


#: A unit of work: a module, or one tensor that is copied.
Item = ModulePlan | TensorEntry


@dataclass
class Plan:
    """What a conversion will do. ``items`` are in output order, ``shards`` hold their tensors."""

    description: Description
    options: Options
    items: list[Item]
    shards: list[Shard]
    kept: list[Refusal]
    refusals: list[Refusal]
    notes: list[str]
    side_files: list[str]

    @property
    def modules(self) -> list[ModulePlan]:
        return [item for item in self.items if isinstance(item, ModulePlan)]

    @property
    def copies(self) -> list[TensorEntry]:
        return [item for item in self.items if isinstance(item, TensorEntry)]

    @property
    def tensor_bytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def disk_bytes(self) -> int:
        """Bytes the output takes, side files and manifest (about) included."""
        sizes = self.description.source.sizes
        side = sum(sizes[name] for name in self.side_files)
        return self.tensor_bytes + side + 4096 + 2048 * len(self.modules) + 512 * len(self.copies)

    @property
    def source_bytes(self) -> int:
        return total_bytes(self.description.source.tensors.values())

    def refuse(self) -> None:
        """Raises :class:`UnsupportedError` listing every refusal, if there is one."""
        if self.refusals:
            lines = "".join(f"\n  {refusal}" for refusal in self.refusals)
            count = len(self.refusals)
            raise UnsupportedError(
                f"target {self.options.target} has no layout for {count} "
                f"module{'s' * (count > 1)}; nothing was written (--keep-unsupported copies "
                f"them unchanged):{lines}"
            )

    def digest(self) -> str:
        """A hash of everything that decides the output's bytes but the source's data."""
        source = self.description.source
        state = {
            "tool": __version__,
            "target": self.options.target,
            "options": [self.options.fuse, self.options.keep_unsupported],
            "layouts": sorted(
                {(item.name, item.layout.name, item.layout.version) for item in self.modules}
            ),
            "config": source.config,
            "files": [(name, source.sizes[name]) for name in source.shards],
            "tensors": [
                (entry.name, entry.file, entry.offset, str(entry.spec))
                for entry in source.tensors.values()
            ],
            "shards": [(shard.name, shard.header.hex()) for shard in self.shards],
        }
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def make_plan(description: Description, options: Options) -> Plan:
    """Decides the layout of every module and the place of every output tensor.

    Modules that no layout takes are in :attr:`Plan.refusals`, or in :attr:`Plan.kept` with
    ``keep_unsupported``.

    Raises:
        BadInputError: two output tensors would have one name.
        UsageError: a layout was asked for modules that are not there.
    """
    for pattern, name in options.overrides:
        if not any(matches(pattern, module) for module in _names(description.modules)):
            raise UsageError(f"--layout {pattern}={name}: no quantised module has such a name")
    notes: list[str] = []
    planned: dict[str, ModulePlan] = {}
    refusals: list[Refusal] = []
    fused_into: dict[str, ModulePlan] = {}
    if options.fuse:
        fused_into = _fuse(description.modules, options, notes)
    for module in description.modules.values():
        if module.name in fused_into:
            continue
        chosen = _plan_module(module, options)
        if isinstance(chosen, Refusal):
            refusals.append(chosen)
        else:
            planned[module.name] = chosen
    items = _in_source_order(description, planned, fused_into, refusals)
    kept = refusals if options.keep_unsupported else []
    return Plan(
        description,
        options,
        items,
        split([outputs_of(item) for item in items], options.max_shard_size),
        kept,
        [] if options.keep_unsupported else refusals,
        notes + description.oddities,
        description.source.side_files(),
    )


def _choose(name: str, spec: WeightSpec, options: Options) -> Layout | str:
    """The first layout that supports the weight, or the reasons why none does."""
    reasons: list[str] = []
    others: list[str] = []
    for layout_name in options.preference(name):
        layout = layouts.get(layout_name)
        assert layout is not None
        support = layout.supports(spec)
        if support:
            return layout
        (others if support.other_kind else reasons).append(f"{layout_name}: {support.reason}")
    if not reasons and len(others) > 1:
        what = "embedding tables" if spec.embedding else f"{spec.family} weights"
        return f"no layout of target {options.target} is for {what} such as this ({spec.label})"
    return "; ".join(reasons or others)


def _plan_module(module: Module, options: Options) -> ModulePlan | Refusal:
    if module.reason:
        return Refusal(module.name, module.format, module.label, module.reason)
    spec = stacked_spec([module.experts[0].spec])
    layout = _choose(module.name, spec, options)
    if isinstance(layout, str):
        return Refusal(module.name, module.format, module.label, layout)
    beside = {local: [module.entries[local]] for local in module.beside}
    units = [[part] for part in module.experts]
    return _module_plan(module.name, layout, spec, units, module.stacked_experts, beside)


def _module_plan(
    name: str,
    layout: Layout,
    spec: WeightSpec,
    units: list[list[Part]],
    stacked_experts: bool,
    beside: dict[str, list[TensorEntry]],
) -> ModulePlan:
    outputs = {}
    for local, tensor in layout.output_specs(spec).items():
        shape = (len(units), *tensor.shape) if stacked_experts else tensor.shape
        outputs[f"{name}.{local}"] = TensorSpec(tensor.dtype, shape)
    for local, entries in beside.items():
        first = entries[0].spec
        rows = sum(entry.spec.shape[0] if entry.spec.shape else 1 for entry in entries)
        shape = (rows, *first.shape[1:]) if len(entries) > 1 else first.shape
        outputs[f"{name}.{local}"] = TensorSpec(first.dtype, shape)
    return ModulePlan(name, layout, spec, units, stacked_experts, outputs, beside)


def _fuse(
    modules: Mapping[str, Module], options: Options, notes: list[str]
) -> dict[str, ModulePlan]:
    """Fused modules by the name of each of their parts."""
    found: dict[str, ModulePlan] = {}
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        for fused, leaves in FUSED.items():
            if leaf not in leaves or name in found:
                continue
            names = [f"{parent}.{item}" if parent else item for item in leaves]
            target = f"{parent}.{fused}" if parent else fused
            present = [item for item in names if item in modules]
            if name != present[0]:
                continue  # considered with its first part
            if len(present) < len(names):
                missing = ", ".join(item for item in names if item not in modules)
                notes.append(f"{target} is not fused: {missing} is not quantised")
                continue
            plan = _plan_fused(target, [modules[item] for item in names], options)
            if isinstance(plan, str):
                notes.append(f"{target} is not fused: {plan}")
            else:
                found |= dict.fromkeys(names, plan)
    return found


def _plan_fused(name: str, modules: Sequence[Module], options: Options) -> ModulePlan | str:
    if any(module.reason for module in modules):
        return "a part of it has no layout"
    counts = {(module.stacked_experts, len(module.experts)) for module in modules}
    if len(counts) > 1:
        return "its parts have different numbers of experts"
    if modules[0].stacked_experts and any(module.beside for module in modules):
        return "its experts have a bias each, which is not joined"
    units = [list(parts) for parts in zip(*(module.experts for module in modules), strict=True)]
    for parts in units:
        specs = [part.spec for part in parts]
        support = can_stack(specs)
        if not support:
            return support.reason
        for local, _ in specs[0].side:
            values = {part.values[local] for part in parts}
            if len(values) > 1:
                return f"its parts have different {local} values"
    spec = stacked_spec([part.spec for part in units[0]])
    layout = _choose(name, spec, options)
    if isinstance(layout, str):
        return layout
    besides = [module.beside for module in modules]
    if any(set(item) - {"bias"} for item in besides) or len({tuple(b) for b in besides}) > 1:
        return "its parts differ in the tensors beside the weight"
    beside = {local: [module.entries[local] for module in modules] for local in besides[0]}
    if len({entry.spec.dtype for entries in beside.values() for entry in entries}) > 1:
        return "its parts' biases differ in dtype"
    return _module_plan(name, layout, spec, units, modules[0].stacked_experts, beside)


def _in_source_order(
    description: Description,
    planned: Mapping[str, ModulePlan],
    fused_into: Mapping[str, ModulePlan],
    refusals: Sequence[Refusal],
) -> list[Item]:
    refused = {refusal.module for refusal in refusals}
    items: list[Item] = []
    placed: set[str] = set()
    for entry in description.source.tensors.values():
        module = entry.name.rpartition(".")[0]
        if entry.name in description.plain or module in refused:
            items.append(entry)
            continue
        plan = fused_into.get(module) or planned[module]
        if plan.name not in placed:
            placed.add(plan.name)
            items.append(plan)
    return items


def outputs_of(item: Item) -> Mapping[str, TensorSpec]:
    """The output tensors of a unit of work, by full name."""
    return item.outputs if isinstance(item, ModulePlan) else {item.name: item.spec}


def split(units: Sequence[Mapping[str, TensorSpec]], limit: int) -> list[Shard]:
    """Fills shards in order, up to ``limit`` bytes of tensors each.

    The tensors of a unit of work stay together, so one larger than the limit stands alone.

    Raises:
        BadInputError: two tensors have one name.
    """
    groups: list[dict[str, TensorSpec]] = [{}]
    seen: set[str] = set()
    size = 0
    for outputs in units:
        if clash := [name for name in outputs if name in seen]:
            raise BadInputError(
                f"two tensors of the output would be named {min(clash)}; the source already "
                "holds one of that name"
            )
        seen.update(outputs)
        nbytes = sum(spec.nbytes for spec in outputs.values())
        if groups[-1] and size + nbytes > limit:
            groups.append({})
            size = 0
        groups[-1].update(outputs)
        size += nbytes
    shards = []
    for index, specs in enumerate(groups, 1):
        # most aligned first, as safetensors writes them, so that every tensor is aligned
        ordered = dict(sorted(specs.items(), key=lambda item: -_alignment(item[1].dtype)))
        header, offsets = build_header(ordered)
        name = f"model-{index:05}-of-{len(groups):05}.safetensors"
        if len(groups) == 1:
            name = "model.safetensors"
        shards.append(Shard(name, header, offsets, ordered))
    return shards


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """The content of ``model.safetensors.index.json``."""
    weight_map = {name: shard.name for shard in shards for name in shard.specs}
    total = sum(spec.nbytes for shard in shards for spec in shard.specs.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _alignment(dtype: str) -> int:
    return TensorSpec(dtype, (8,)).nbytes // 8


def summarise(plan: Plan, name_of: Callable[[ModulePlan], str]) -> dict[str, int]:
    """How many modules have each value of ``name_of``."""
    counts: dict[str, int] = {}
    for module in plan.modules:
        counts[name_of(module)] = counts.get(name_of(module), 0) + 1
    return counts


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The plan for machines (``--dry-run --json``)."""
    return {
        "target": plan.options.target,
        "modules": [
            {
                "name": module.name,
                "source": [part.module for part in module.parts],
                "format": module.spec.format,
                "scheme": module.spec.family,
                "weights": module.spec.label,
                "layout": module.layout.name,
                "shape": [module.spec.n, module.spec.k],
                "tensors": {
                    name: {"dtype": spec.dtype, "shape": list(spec.shape)}
                    for name, spec in module.outputs.items()
                },
            }
            for module in plan.modules
        ],
        "copied": [entry.name for entry in plan.copies],
        "kept": [vars(refusal) for refusal in plan.kept],
        "refused": [vars(refusal) for refusal in plan.refusals],
        "shards": [
            {"name": shard.name, "bytes": shard.size, "tensors": list(shard.specs)}
            for shard in plan.shards
        ],
        "side_files": plan.side_files,
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.tensor_bytes,
        "disk_bytes": plan.disk_bytes,
        "notes": plan.notes,
    }
