"""The rule that stacks experts which a source has one by one: w13 (gate, then up) and w2 (down)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ctconvert.assembly import Concat, Part, Stack, can_join
from ctconvert.planning.assemble import Candidate
from ctconvert.planning.describe import Description, Module
from ctconvert.records import SourceModule
from ctconvert.specs import TensorSpec

T = TypeVar("T")

#: The projections of one expert, in the order gate, up, down, under either set of names.
_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
#: A projection of one expert: what stands before, the number, the last name.
EXPERT = re.compile(r"(.*\.)?experts\.(0|[1-9][0-9]{0,5})\.(\w+)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """The experts of one block, stacked."""

    name: str
    up: Candidate
    down: Candidate


def stack_names(modules: Mapping[str, Module]) -> set[str]:
    """Every name that a stack of the modules can have."""
    return {f"{name}.{stack}" for name in _blocks(modules) for stack in ("w13", "w2")}


def _blocks(modules: Mapping[str, T]) -> dict[str, dict[str, dict[int, T]]]:
    """The modules of experts, by block, projection and number."""
    found: dict[str, dict[str, dict[int, T]]] = {}
    for name, module in modules.items():
        match = EXPERT.fullmatch(name)
        if match and any(match[3] in names for names in _NAMES):
            block = found.setdefault(f"{match[1] or ''}experts", {})
            block.setdefault(match[3], {})[int(match[2])] = module
    return found


def stacks(description: Description, notes: list[str]) -> tuple[list[Block], set[str]]:
    """The blocks whose experts can be stacked, and the names of all modules that are experts.

    Why others cannot is told in ``notes``, one a block; those stay apart.
    """
    made, names = [], set[str]()
    dense = _blocks(
        {
            name.removesuffix(".weight"): name
            for name in description.plain
            if name.endswith(".weight")
        }
    )
    for name, block in _blocks(description.modules).items():
        names |= {module.name for found in block.values() for module in found.values()}
        found = _stacked(name, block, dense.get(name, {}))
        if isinstance(found, Block):
            made.append(found)
        else:
            notes.append(not_stacked(name, found))
    return made, names


def not_stacked(block: str, reason: str) -> str:
    """The note about experts that stay apart."""
    return f"{block} are not stacked: {reason}"


def _stacked(
    name: str,
    block: Mapping[str, Mapping[int, Module]],
    dense: Mapping[str, Mapping[int, str]],
) -> Block | str:
    """A block's stacks, or why there are none; ``dense`` are those that are not quantised."""
    names = next((names for names in _NAMES if block.keys() <= set(names)), None)
    if names is None:
        return f"they are named in two ways ({', '.join(sorted(block))})"
    count = len(set().union(*block.values(), *dense.values()))
    wanted = names if names[0] in {*block, *dense} else names[1:]
    experts: list[list[SourceModule]] = []
    for number in range(count):
        sources = []
        for leaf in wanted:
            module = block.get(leaf, {}).get(number)
            full = f"{name}.{number}.{leaf}"
            if module is None:
                plain = number in dense.get(leaf, {})
                return f"{full} is {'not quantised' if plain else 'missing'}"
            if module.reason or module.source is None:
                return f"{full} has no layout: {module.reason}"
            sources.append(module.source)
        experts.append(sources)
    if reason := _differ(experts):
        return reason
    ups = tuple(source for sources in experts for source in sources[:-1])
    downs = tuple(sources[-1] for sources in experts)
    each = len(wanted) - 1
    joined = [
        tuple(Part(number * each + place) for place in range(each)) for number in range(count)
    ]
    up = Stack(tuple(Concat(parts) if each > 1 else parts[0] for parts in joined))
    down = Stack(tuple(Part(number) for number in range(count)))
    return Block(
        name,
        Candidate(f"{name}.w13", ups, up, "_"),
        Candidate(f"{name}.w2", downs, down, "_"),
    )


def _differ(experts: Sequence[Sequence[SourceModule]]) -> str | None:
    """Why the experts, each [gate,] up, down, cannot be stacked, or None."""
    *ups, down = experts[0]
    for source in experts[0]:
        if source.weight.has_g_idx:
            return f"{source.name} has an act-order of its own"
        wanted = {"bias": (source.weight.n,)}
        if any(wanted.get(local) != spec.shape for local, spec in _beside(source).items()):
            return f"{source.name} has more than a bias beside its weight"
    if any(up.weight.n != down.weight.k or up.weight.k != down.weight.n for up in ups):
        return f"{ups[0].name} and {down.name} do not fit each other in shape"
    if not (support := can_join([up.weight for up in ups])):
        return support.reason
    if any(_beside(up) != _beside(ups[0]) for up in ups):
        return "gate and up differ in the tensors beside the weight"
    for field in ("family", "bits", "strategy", "group_size", "block", "symmetric", "scale_dtype"):
        have, want = getattr(down.weight, field), getattr(ups[0].weight, field)
        if have != want:
            return f"{ups[0].name} and {down.name} differ in {field} ({want}, {have})"
    for sources in experts:
        for source, first in zip(sources, experts[0], strict=True):
            if source.experts is not None:
                return f"{source.name} holds several experts by itself"
            for field in source.weight.__struct_fields__:
                have, want = getattr(source.weight, field), getattr(first.weight, field)
                if have != want:
                    return f"{first.name} and {source.name} differ in {field} ({want}, {have})"
            if _beside(source) != _beside(first):
                return f"{first.name} and {source.name} differ in the tensors beside the weight"
        for local, _ in sources[0].weight.side:
            if len({source.values[local] for source in sources[:-1]}) > 1:
                both = " and ".join(source.name for source in sources[:-1])
                return f"{both} have different {local} values"
    return None


def _beside(source: SourceModule) -> dict[str, TensorSpec]:
    return {local: entry.spec for local, entry in source.beside.items()}
