"""What a manifest says of its source, held against itself: shapes, and where each weight lies."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ctconvert.assembly import Rectangle, leaves, lines, rectangle
from ctconvert.records.plan import Convert, SourceModule
from ctconvert.specs import TensorSpec, WeightSpec

#: Tensors by value that hold N and K (of 3-D weights: the number of experts before them).
_SHAPES = ("weight_shape", "shape")


def wrong_source(source: SourceModule) -> str | None:
    """The first tensor of a module that cannot hold what its weight is said to be.

    Names that are no format's here are left to the format.
    """
    spec = source.weight
    for local, entry in source.entries(None if source.experts is None else 0).items():
        found = entry.spec
        if local in source.zeros:
            continue  # zeros are made of any spec
        if local in _SHAPES and local in source.values:
            width = {"I32": 4, "I64": 8}.get(found.dtype, 1)
            data = bytes.fromhex(source.values[local])
            numbers = [
                int.from_bytes(data[at : at + width], "little", signed=True)
                for at in range(0, len(data), width)
            ]
            if numbers[-2:] != [spec.n, spec.k]:
                return f"{local} is {numbers}, and its weight is [{spec.n}, {spec.k}]"
        elif local == "weight_scale":
            if found.dtype != spec.scale_dtype or not _fills(found, spec.scale_shape):
                return f"{local} is {found}, and its scale {spec.scale_dtype} {spec.scale_shape}"
        elif local == "weight_zero_point" and spec.storage == "plain":
            if found.dtype != "I8" or not _fills(found, spec.scale_shape):
                return f"{local} is {found}, and its scale is of {spec.scale_shape}"
        elif (allowed := _stored(spec).get(local)) and found not in allowed:
            return f"{local} is {found}, expected {' or '.join(map(str, allowed))}"
    return None


def _fills(found: TensorSpec, shape: tuple[int, int] | None) -> bool:
    """Whether it has as many elements: a scale may be stored flat."""
    return shape is not None and math.prod(found.shape) == math.prod(shape)


def _stored(spec: WeightSpec) -> dict[str, tuple[TensorSpec, ...]]:
    """The tensors of a weight that have one shape, by local name, with the dtypes they may have."""
    n, k = spec.n, spec.k

    def words(codes: int) -> int:
        if spec.packing == "dense":
            return -(-codes * spec.bits // 32)
        return -(-codes // spec.codes_per_word)

    return {
        "weight": (TensorSpec(spec.element, (n, k)),),
        "weight_packed": (TensorSpec("I32", (n, words(k))), TensorSpec("U8", (n, k // 2))),
        "weight_zero_point": (TensorSpec("I32", (words(n), spec.groups)),),
        "weight_g_idx": (TensorSpec("I32", (k,)), TensorSpec("I64", (k,))),
        "compressed": (TensorSpec(spec.element, (n, k // 2)),),
        "bitmask": (TensorSpec("U8", (n, -(-k // 8))),),
    }


def wrong_units(modules: Iterable[Convert]) -> str | None:
    """The first source module that cannot be restored unit by unit.

    A unit of an output module is one item of its stack. A 3-D source's expert ``e`` must lie in the
    ``e``-th, and each 2-D weight in one alone, the same of every module that holds a part of it.
    """
    seen: dict[str, tuple[SourceModule, set[tuple[int | None, int]], int]] = {}
    for module in modules:
        held: list[set[tuple[int | None, int]]] = [set() for _ in module.sources]
        for unit, assembly in enumerate(module.units):
            for part in leaves(assembly):
                held[part.source].add((part.expert, unit))
        for source, places in zip(module.sources, held, strict=True):
            if source.experts is None:
                apart = len(places) != 1
            else:
                apart = places != {(expert, expert) for expert in range(source.experts)}
            found = source, places, len(module.units)
            if apart or seen.setdefault(source.name, found) != found:
                return (
                    f"module {module.name}: {source.name} lies in other units than it can be "
                    "restored from"
                )
    return None


def wrong_tiles(modules: Iterable[Convert]) -> str | None:
    """The first source weight of which the modules do not hold all, each element once.

    What one rank has another may have too, the very same rectangle.
    """
    held: dict[tuple[str, int | None], dict[Rectangle, set[int | None]]] = {}
    sources: dict[str, SourceModule] = {}
    for module in modules:
        for part in leaves(module.recipe.assembly):
            source = module.sources[part.source]
            sources[source.name] = source
            places = held.setdefault((source.name, part.expert), {})
            ranks = places.setdefault(rectangle(part, source.weight), set())
            if module.rank in ranks or None in ranks or (ranks and module.rank is None):
                return f"module {source.name}: the output's modules do not hold all of it once"
            ranks.add(module.rank)
    for (name, _), places in held.items():
        weight = sources[name].weight
        if lines(places, weight.n, weight.k) is None:
            return f"module {name}: the output's modules do not hold all of it once"
    return None
