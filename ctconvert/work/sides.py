"""A checkpoint as a side of a comparison: the weights it decodes to, and every other tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from ctconvert.assembly import leaves
from ctconvert.output import Output
from ctconvert.planning.describe import describe
from ctconvert.planning.make import restore_plan
from ctconvert.planning.memory import item_bytes
from ctconvert.records import Convert, Restore, SourceModule
from ctconvert.specs import TensorSpec
from ctconvert.store.base import Store
from ctconvert.store.checkpoint import MANIFEST, Checkpoint
from ctconvert.store.safetensors import TensorEntry

#: A weight: the name of its module, and which of its experts where tensors are 3-D.
Key = tuple[str, int | None]


@dataclass(frozen=True, eq=False)
class Held:
    """Weights that are decoded together: a source's single one, or those of an output's unit."""

    keys: tuple[Key, ...]
    item: SourceModule | Restore
    unit: int = 0

    @property
    def nbytes(self) -> int:
        """What decoding them holds at its peak, the weights included."""
        if isinstance(self.item, Restore):
            return item_bytes(self.item)
        spec = self.item.weight
        return self.item.nbytes // (self.item.experts or 1) + (
            TensorSpec(spec.element, (spec.n, spec.k)).nbytes if spec.storage == "plain" else 0
        )


@dataclass
class Side:
    """``weights`` by key, ``plain`` every tensor that no weight is decoded from, by name."""

    store: Store
    check_unchanged: Callable[[], None]
    weights: dict[Key, Held] = field(default_factory=dict)
    plain: dict[str, TensorEntry] = field(default_factory=dict)
    sources: dict[str, SourceModule] = field(default_factory=dict)

    def add(self, held: Held) -> None:
        self.weights |= dict.fromkeys(held.keys, held)

    def add_source(self, source: SourceModule) -> None:
        """A module whose weights are decoded from the tensors of a source."""
        self.sources[source.name] = source
        experts = [None] if source.experts is None else range(source.experts)
        for expert in experts:
            self.add(Held(((source.name, expert),), source))


def side_of(store: Store) -> Side:
    """A side from a store: through the manifest where it is a converted checkpoint.

    Raises:
        BadInputError: it is a source, and its config cannot be read.
        VerificationError: its manifest is damaged.
    """
    if MANIFEST in store.sizes() or MANIFEST in store.left_out():
        output = Output(store)
        if output.plan.kind == "converted":
            return _converted(output)
    return _source(Checkpoint(store))


def _source(checkpoint: Checkpoint) -> Side:
    side = Side(checkpoint.store, checkpoint.check_unchanged)
    description = describe(checkpoint)
    side.plain = dict(description.plain)
    for module in description.modules.values():
        if module.source is None:
            side.plain |= {entry.name: entry for entry in module.entries.values()}
            continue
        side.add_source(module.source)
        side.plain |= {entry.name: entry for entry in module.source.beside.values()}
    return side


def _converted(output: Output) -> Side:
    side = Side(output.store, output.check_unchanged)
    side.plain = {copy.name: copy.output for copy in output.plan.copies}
    # grouped as for the way back: what holds parts of one weight is decoded together
    for item in restore_plan(output.manifest, output.store.id, 2**62).items:
        if not isinstance(item, Restore):
            continue
        for module in item.modules:
            side.sources |= {source.name: source for source in module.sources}
            side.plain |= {entry.name: entry for entry in _beside(module)}
        for unit in range(len(item.modules[0].units)):
            keys = dict.fromkeys(
                (module.sources[part.source].name, part.expert)
                for module in item.modules
                for part in leaves(module.units[unit])
            )
            side.add(Held(tuple(keys), item, unit))
    return side


def _beside(module: Convert) -> Iterator[TensorEntry]:
    """Each source's rows of the tensors that stand beside the weight (``bias``)."""
    for local, joined in module.beside.items():
        offset = joined.offset
        for source in module.sources:
            entry = source.beside[local]
            yield TensorEntry(entry.name, joined.file, offset, entry.spec)
            offset += entry.nbytes


def take_over(side: Side, other: Side) -> None:
    """Reads as ``other`` does what ``side`` holds as the source's very tensors, left as they were.

    A converted checkpoint may hold modules that were not converted.
    """
    for name, source in other.sources.items():
        if name in side.sources:
            continue
        found = _found(source, side.plain)
        if found is None:
            continue
        side.add_source(found)
        for entry in found.tensors.values():
            del side.plain[entry.name]


def _found(source: SourceModule, plain: Mapping[str, TensorEntry]) -> SourceModule | None:
    places = {}
    for local, entry in source.tensors.items():
        place = plain.get(entry.name)
        if place is None or place.spec != entry.spec:
            return None
        places[local] = place
    return replace(source, tensors=places)


def components(a: Side, b: Side) -> Iterator[tuple[list[Held], list[Held]]]:
    """The weights of both sides, in sets that neither side decodes in less than all of."""
    done: set[Key] = set()
    for key in dict.fromkeys([*a.weights, *b.weights]):
        if key in done:
            continue
        sets: tuple[dict[Held, None], dict[Held, None]] = ({}, {})
        waiting = [key]
        while waiting:
            one = waiting.pop()
            if one in done:
                continue
            done.add(one)
            for side, found in zip((a, b), sets, strict=True):
                held = side.weights.get(one)
                if held is not None and held not in found:
                    found[held] = None
                    waiting += held.keys
        yield list(sets[0]), list(sets[1])
