"""Plans: of a conversion, from a description; of the way back, from a manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from ctconvert.errors import BadInputError, UnsupportedError, UsageError
from ctconvert.formats.quantization import with_config
from ctconvert.names import natural
from ctconvert.planning.assemble import Candidate, alone, fuse, possible_names
from ctconvert.planning.choose import Choice, Chooser, check_options, left_out, matches
from ctconvert.planning.describe import Description
from ctconvert.planning.experts import Block, not_stacked, stack_names, stacks
from ctconvert.planning.place import Placed, check_names, place
from ctconvert.planning.ranks import Ranks
from ctconvert.records import (
    FORMAT_VERSION,
    Convert,
    Copy,
    Item,
    Manifest,
    Options,
    Origin,
    Plan,
    Refusal,
    Restore,
    SourceFile,
    rank_prefix,
)
from ctconvert.specs import TensorSpec
from ctconvert.store.checkpoint import Checkpoint
from ctconvert.store.safetensors import TensorEntry

#: A module and how it is made, before its tensors have a place.
_Made = tuple[Candidate, Choice]


def make_plan(description: Description, options: Options) -> Plan:
    """Decides the layout of every module and the place of every output tensor.

    Modules that no layout takes are in :attr:`Plan.refusals`, or in :attr:`Plan.kept` with
    ``keep_unsupported``; there are those too that the user leaves out.

    Raises:
        BadInputError: two output tensors would have one name, or a side file's folder the name of
            a file of the output.
        UsageError: a target or layout does not exist, or one was asked for modules that are not
            there.
    """
    check_options(options)
    if options.overrides:
        names = possible_names(description.modules) | stack_names(description.modules)
        for pattern, layout in options.overrides:
            if not any(matches(pattern, name) for name in names):
                raise UsageError(
                    f"--layout {pattern}={layout}: no quantised module has such a name"
                )
    left = left_out(description.modules, options)
    for name, why in left.items():
        description.modules[name].reason = why
    notes: list[str] = []
    chooser = Chooser(options, description.checkpoint.config)
    ranks = Ranks(description, options)
    made: dict[str, list[_Made]] = {}  # what each rank has, by the name of each source module
    refusals: list[Refusal] = []
    if options.fuse:
        blocks, experts = stacks(description, notes)
        for block in blocks:
            pairs = _stacks(block, ranks, chooser)
            if isinstance(pairs, str):
                notes.append(not_stacked(block.name, pairs))
                continue
            for stack, each in zip((block.up, block.down), pairs, strict=True):
                made |= {source.name: each for source in stack.sources}
        for candidate, parts in fuse(description, experts, notes):
            found = _choices(candidate, ranks, chooser)
            if isinstance(found, str):
                notes.append(f"{candidate.name} is not fused: {found}")
            else:
                made.update(dict.fromkeys(parts, found))
    for module in description.modules.values():
        if module.name in made:
            continue
        reason: list[_Made] | str = module.reason
        if not reason and module.source is not None:
            reason = _choices(alone(module.source), ranks, chooser)
        if isinstance(reason, str):
            fault = module.fault and module.name not in left
            refusals.append(Refusal(module.name, module.format, module.label, reason, fault))
        else:
            made[module.name] = reason
    refused = {refusal.module for refusal in refusals}
    kept = [item for item in refusals if options.keep_unsupported or item.module in left]
    sizes = description.checkpoint.store.sizes()
    order = list(_in_source_order(description, made, refused))
    shards, placed = place(
        map(_outputs, order),
        options.max_shard_size,
        description.checkpoint.metadata,
        description.checkpoint.tensors,
        [None if isinstance(item, TensorEntry) else item[0].rank for item in order],
        options.tensor_parallel,
    )
    side_files = description.checkpoint.side_files()
    check_names(shards, side_files)
    plan = Plan(
        kind="converted",
        options=chooser.options,
        source=_origin(description.checkpoint),
        items=tuple(_item(item, placed) for item in order),
        shards=shards,
        config="",
        side_files=tuple(SourceFile(name, sizes[name]) for name in side_files),
        kept=_in_order(kept),
        refusals=_in_order(item for item in refusals if item not in kept),
        notes=(*notes, *ranks.notes, *chooser.notes, *description.oddities),
    )
    return _with_config(plan, description)


def _in_order(refusals: Iterable[Refusal]) -> tuple[Refusal, ...]:
    return tuple(sorted(refusals, key=lambda one: natural(one.module)))


def refuse(plan: Plan) -> None:
    """Refuses a plan with refusals.

    Raises:
        BadInputError: the source contradicts itself in some modules; the first is told.
        UnsupportedError: the target takes some modules not; all are listed.
    """
    if faults := [refusal for refusal in plan.refusals if refusal.fault]:
        others = ""
        if len(faults) > 1:
            count = len(faults) - 1
            others = f" (and {count} other module{'s' * (count > 1)} too: {faults[1].module}"
            others += ", ...)" if count > 1 else ")"
        raise BadInputError(
            f"module {faults[0].module}: {faults[0].reason}{others}; --keep-unsupported copies "
            "such modules unchanged",
            module=faults[0].module,
            refusals=faults,
        )
    if plan.refusals:
        lines = "".join(f"\n  {refusal}" for refusal in plan.refusals)
        count = len(plan.refusals)
        raise UnsupportedError(
            f"target {plan.options.target} has no layout for {count} "
            f"module{'s' * (count > 1)}; nothing was written (--keep-unsupported copies "
            f"them unchanged):{lines}",
            refusals=plan.refusals,
        )


def _origin(checkpoint: Checkpoint) -> Origin:
    sizes = checkpoint.store.sizes()
    return Origin(
        id=checkpoint.store.id,
        revision=checkpoint.store.revision,
        files=tuple(SourceFile(name, sizes[name]) for name in checkpoint.shards),
        config=checkpoint.config_text,
        metadata=checkpoint.metadata,
    )


def _choices(candidate: Candidate, ranks: Ranks, chooser: Chooser) -> list[_Made] | str:
    """A module as each rank has it, and how it is made, or the reasons why it is not."""
    candidates = ranks.of(candidate)
    if isinstance(candidates, str):
        return candidates
    found = []
    for one in candidates:
        choice = chooser.choice(one)
        if isinstance(choice, str):
            return choice
        found.append((one, choice))
    return found


def _stacks(block: Block, ranks: Ranks, chooser: Chooser) -> tuple[list[_Made], list[_Made]] | str:
    """A block's stacks as each rank has them, or why its experts are not stacked."""
    ups, downs = ranks.of(block.up), ranks.of(block.down)
    for candidates in (ups, downs):
        if isinstance(candidates, str):
            return candidates
    found: tuple[list[_Made], list[_Made]] = [], []
    for up, down in zip(ups, downs, strict=True):
        pair = chooser.stacks(up, down)  # type: ignore[arg-type]
        if isinstance(pair, str):
            return pair
        found[0].append((up, pair[0]))  # type: ignore[arg-type]
        found[1].append((down, pair[1]))  # type: ignore[arg-type]
    return found


def _in_source_order(
    description: Description, made: Mapping[str, list[_Made]], refused: set[str]
) -> Iterator[_Made | TensorEntry]:
    placed: set[str] = set()
    owners = description.owners
    for entry in description.checkpoint.tensors.values():
        module = owners.get(entry.name) or entry.name.rpartition(".")[0]
        if entry.name in description.plain or module in refused:
            yield entry
            continue
        candidate = made[module][0][0]
        if candidate.rank is not None and _beside(description, module, entry):
            yield entry
        if candidate.name not in placed:
            placed.add(candidate.name)
            yield from made[module]


def _beside(description: Description, module: str, entry: TensorEntry) -> bool:
    source = description.modules[module].source
    return source is not None and entry in source.beside.values()


def _outputs(item: _Made | TensorEntry) -> dict[str, TensorSpec]:
    """The output tensors of a unit of work, by full name."""
    if isinstance(item, TensorEntry):
        return {item.name: item.spec}
    candidate, choice = item
    found = {f"{candidate.prefix}{local}": spec for local, spec in choice.outputs.items()}
    for local, entries in candidate.beside.items():
        found[f"{candidate.prefix}{local}"] = joined_rows(entries, candidate.stacked)
    return found


def joined_rows(entries: Sequence[TensorEntry], stacked: int | None) -> TensorSpec:
    """The spec of tensors joined along dimension 0, cut into ``stacked`` experts where it is."""
    first = entries[0].spec
    if len(entries) == 1 and stacked is None:
        return first
    rows = sum(entry.spec.shape[0] if entry.spec.shape else 1 for entry in entries)
    leading = (rows,) if stacked is None else (stacked, rows // stacked)
    return TensorSpec(first.dtype, (*leading, *first.shape[1:]))


def _item(item: _Made | TensorEntry, placed: Placed) -> Item:
    if isinstance(item, TensorEntry):
        return Copy(item, placed[item.name])
    candidate, choice = item
    beside = {local: placed[f"{candidate.prefix}{local}"] for local in candidate.beside}
    return Convert(
        name=rank_prefix(candidate.rank) + candidate.name,
        sources=candidate.sources,
        recipe=choice.recipe,
        outputs=tuple(placed[f"{candidate.prefix}{local}"] for local in choice.outputs),
        beside=beside,
        joint=candidate.joint,
        rank=candidate.rank,
    )


def _with_config(plan: Plan, description: Description) -> Plan:
    """The plan with config.json's text: the source's, its quantization_config inside ours."""
    settings = description.settings
    ours: dict[str, Any] = {
        "quant_method": "ctconvert",
        "format_version": FORMAT_VERSION,
        "target": plan.options.target,
        "modules": plan.layouts(),
        "source": settings.source,
    }
    if plan.options.tensor_parallel > 1:
        ours["tensor_parallel"] = plan.options.tensor_parallel
    if plan.kept:
        ours["unconverted"] = [refusal.module for refusal in plan.kept]
    config = with_config(description.checkpoint.config, ours)
    return replace(plan, config=json.dumps(config, indent=2) + "\n")


def restore_plan(manifest: Manifest, id: str, max_shard_size: int) -> Plan:
    """The plan of the way back: the source's tensors, made of an output's.

    Items are in the order of the output's files, so that they are read through once.

    Args:
        manifest: of the output.
        id: what the output is called.
        max_shard_size: bytes of tensors in one file.

    Raises:
        BadInputError: two tensors have one name, or a side file the name of another file.
    """
    made = manifest.plan
    items: list[Restore | Copy] = [
        Restore(tuple(group), tuple(_source_entries(group))) for group in _groups(made.modules)
    ]
    items += [Copy(copy.output, copy.source) for copy in made.copies]

    def first(item: Restore | Copy) -> tuple[str, int]:
        if isinstance(item, Copy):
            return item.source.file, item.source.offset
        outputs = [entry for module in item.modules for entry in module.made]
        return min((entry.file, entry.offset) for entry in outputs)

    items.sort(key=first)
    groups = [{entry.name: entry.spec for entry in item.made} for item in items]
    source = {
        entry.name: entry
        for item in items
        for entry in ((item.output,) if isinstance(item, Copy) else item.outputs)
    }
    shards, placed = place(groups, max_shard_size, made.source.metadata, source)
    check_names(shards, [file.name for file in made.side_files])
    return Plan(
        kind="restored",
        options=Options(target=None, max_shard_size=max_shard_size),
        source=Origin(
            id=id,
            files=tuple(SourceFile(shard.name, shard.size) for shard in made.shards),
            config=made.config,
            manifest=manifest.manifest_sha256,
        ),
        items=tuple(_put(item, placed) for item in items),
        shards=shards,
        config=made.source.config,
        side_files=made.side_files,
    )


def _put(item: Restore | Copy, placed: Placed) -> Restore | Copy:
    if isinstance(item, Copy):
        return Copy(item.source, placed[item.name])
    return Restore(item.modules, tuple(placed[entry.name] for entry in item.outputs))


def _source_entries(modules: Sequence[Convert]) -> Iterator[TensorEntry]:
    """The source's tensors that a group of output modules holds, each once."""
    seen: set[str] = set()
    for module in modules:
        for source in module.sources:
            if source.name not in seen:
                seen.add(source.name)
                yield from source.tensors.values()
                if module.rank is None:
                    yield from source.beside.values()


def _groups(modules: Sequence[Convert]) -> list[list[Convert]]:
    """Output modules that hold parts of the same source modules, together."""
    groups: list[list[Convert]] = []
    of_source: dict[str, list[Convert]] = {}
    for module in modules:
        names = [source.name for source in module.sources]
        joined = [of_source[name] for name in names if name in of_source]
        group = joined[0] if joined else []
        if not joined:
            groups.append(group)
        group.append(module)
        for other in joined[1:]:
            if other is not group:
                group.extend(item for item in other if item not in group)
                groups.remove(other)
                for item in other:
                    of_source |= {source.name: group for source in item.sources}
        of_source |= dict.fromkeys(names, group)
    return groups
