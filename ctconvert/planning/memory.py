"""How much memory a plan takes, from its records alone."""

from __future__ import annotations

from itertools import zip_longest

from ctconvert.assembly import holds_padding, leaves, rectangle
from ctconvert.records import Convert, Copy, Item, Plan, Restore
from ctconvert.specs import TensorSpec
from ctconvert.store.base import CHUNK

#: The part of a worker that does not depend on the largest module: room to work on several.
_ROOM = 192 << 20
#: What the interpreter and the libraries hold before any weight is read.
_BASE = 600 << 20


def item_bytes(item: Item) -> int:
    """What one unit of an item holds at its peak, its source tensors included."""
    if isinstance(item, Copy):
        return min(CHUNK, item.source.nbytes)
    if isinstance(item, Restore):
        made = _restored_bytes(item)
        return sum(module.output_bytes for module in item.modules) * 2 + 2 * made
    return item.input_bytes + _transform_bytes(item)


def _restored_bytes(item: Restore) -> int:
    """Source bytes of one unit, the largest; what several ranks hold of them counts once."""
    found = 0
    for trees in zip_longest(*(module.units for module in item.modules)):
        held = {
            (source.name, part.expert, part.rows): source.unit_bytes(part.rows)
            for module, tree in zip(item.modules, trees, strict=True)
            for part in (leaves(tree) if tree is not None else ())
            for source in (module.sources[part.source],)
        }
        found = max(found, sum(held.values()))
    return found


def _transform_bytes(item: Convert) -> int:
    """What a transform holds beside its source tensors.

    That is the logical weight (where it is not the source's own memory), the output, and the weight
    that the output is decoded to, to be compared; or the parts of a joined weight and the whole.
    """
    spec, unit = item.recipe.weight, item.units[0]
    parts = [(part, item.specs[part.source]) for part in leaves(unit)]
    logical = item.input_bytes
    padded = holds_padding(unit) or any(part.columns for part, _ in parts)
    if padded:
        read = sum(rectangle(part, source).n * source.k for part, source in parts)
        logical = logical * spec.n * spec.k // read
    if spec.storage == "plain":
        logical = TensorSpec(spec.element, (spec.n, spec.k)).nbytes
    joined = len(item.widths) > 1
    own = logical if joined or padded or spec.sparse else 0
    joining = 2 * logical if joined and (padded or spec.sparse) else 0
    return max(joining, own + item.output_bytes + logical)


def comparison_bytes(item: Convert) -> int:
    """What comparing one unit of an output module with its source holds at its peak."""
    return item.output_bytes + item_bytes(item)


def dense_bytes(item: Convert) -> int:
    """What one unit of a module and its weights in full, twice over, hold."""
    spec = item.recipe.weight
    return item.input_bytes + item.output_bytes + 16 * spec.n * spec.k


def budget(plan: Plan, workers: int, compare: bool = False) -> int:
    """Bytes that the units in flight may hold between them: the largest, and room for others."""
    kinds: dict[object, Item] = {}  # most modules of a model are alike
    for item in plan.items:
        if isinstance(item, Convert):
            kinds[id(item.recipe), item.input_bytes, item.output_bytes] = item
        else:
            kinds[id(item)] = item
    sizes = [
        comparison_bytes(item) if compare and isinstance(item, Convert) else item_bytes(item)
        for item in kinds.values()
    ]
    return workers * _ROOM + max(sizes, default=0)


def peak_memory(plan: Plan, workers: int) -> int:
    """An upper estimate of a conversion's private memory, in bytes."""
    return _BASE + budget(plan, workers)
