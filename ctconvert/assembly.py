"""Of which source weights an output weight is made, and what that does to its spec; no data.

An assembly is a tree. Its leaves name 2-D weights of the source, its nodes join and cut them; a
:class:`Stack` stands only at the root and makes one output per item. Formats and layouts know none
of it: a rule of the plan builds trees, :mod:`ctconvert.codec` walks them over data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from ctconvert.specs import Count, Support, WeightSpec

Axis = Literal["n", "k"]


class Part(Struct, frozen=True, tag="part", omit_defaults=True):
    """A weight of the source: ``source`` counts the recipe's modules, ``expert`` 3-D tensors'.

    A per-tensor scale becomes one per output channel, so that a layout sees one kind less.
    """

    source: Annotated[int, Meta(ge=0)]
    expert: Annotated[int, Meta(ge=0)] | None = None


class Concat(Struct, frozen=True, tag="concat"):
    """Rows after rows: q, k and v; gate and up."""

    parts: tuple[Assembly, ...]


class Slice(Struct, frozen=True, tag="slice"):
    """The ``rank``-th of ``ranks`` equal cuts along N or K."""

    part: Assembly
    axis: Axis
    rank: Annotated[int, Meta(ge=0)]
    ranks: Count


class Pad(Struct, frozen=True, tag="pad"):
    """The weight with rows and columns added up to N x K: code 0, scale 0, zero point 0."""

    part: Assembly
    n: Count
    k: Count


class Stack(Struct, frozen=True, tag="stack"):
    """One output per item along a new leading dimension: experts. Only at the root."""

    parts: tuple[Assembly, ...]


Assembly = Part | Concat | Slice | Pad | Stack

#: What the parts of a joined weight must have in common.
_ALIKE = tuple(name for name in WeightSpec.__struct_fields__ if name not in ("n", "scale_shape"))


def units(assembly: Assembly) -> tuple[Assembly, ...]:
    """The trees of the outputs along the leading dimension, a single one without it."""
    return assembly.parts if isinstance(assembly, Stack) else (assembly,)


def leaves(assembly: Assembly) -> Iterator[Part]:
    """Every part, in order."""
    if isinstance(assembly, Part):
        yield assembly
    elif isinstance(assembly, Concat | Stack):
        for part in assembly.parts:
            yield from leaves(part)
    else:
        yield from leaves(assembly.part)


def widths(assembly: Assembly, specs: Sequence[WeightSpec]) -> tuple[int, ...]:
    """Rows of each joined part of one unit, in order.

    Padding of the whole does not count, that of a part does: there the next one begins.
    """
    unit = units(assembly)[0]
    return _widths(unit.part if isinstance(unit, Pad) else unit, specs)


def _widths(assembly: Assembly, specs: Sequence[WeightSpec]) -> tuple[int, ...]:
    if isinstance(assembly, Part):
        return (specs[assembly.source].n,)
    if isinstance(assembly, Concat):
        return tuple(width for part in assembly.parts for width in _widths(part, specs))
    if isinstance(assembly, Stack):
        raise ValueError("a stack inside an assembly")
    inner = _widths(assembly.part, specs)
    if isinstance(assembly, Pad):
        return (*inner[:-1], inner[-1] + assembly.n - sum(inner))
    if assembly.axis == "k":
        return inner
    share = sum(inner) // assembly.ranks
    start, stop = assembly.rank * share, (assembly.rank + 1) * share
    found, first = [], 0
    for width in inner:  # what of each part lies between start and stop
        found.append(min(first + width, stop) - max(first, start))
        first += width
    return tuple(width for width in found if width > 0)


def unpadded(assembly: Assembly, specs: Sequence[WeightSpec]) -> WeightSpec:
    """The spec of one unit before it was padded."""
    unit = units(assembly)[0]
    return assembled(unit.part if isinstance(unit, Pad) else unit, specs)


def assembled(assembly: Assembly, specs: Sequence[WeightSpec]) -> WeightSpec:
    """The spec of one unit of an assembly, given the specs of the modules its parts name.

    Raises:
        ValueError: it cannot be assembled, with the reason.
    """
    if isinstance(assembly, Part):
        return expanded(specs[assembly.source])
    if isinstance(assembly, Stack):
        made = [assembled(part, specs) for part in assembly.parts]
        if any(spec != made[0] for spec in made):
            raise ValueError("its experts differ in their specs")
        return made[0]
    if isinstance(assembly, Concat):
        made = [assembled(part, specs) for part in assembly.parts]
        support = can_join(made)
        if not support:
            raise ValueError(support.reason)
        return joined(made)
    inner = assembled(assembly.part, specs)
    if isinstance(assembly, Pad):
        return padded(inner, assembly.n, assembly.k)
    if holds_padding(assembly.part):
        raise ValueError("what is padded cannot be cut: cut first, then pad")
    support = can_cut(inner, assembly.axis, assembly.ranks)
    if not support:
        raise ValueError(support.reason)
    return cut(inner, assembly.axis, assembly.ranks)


def holds_padding(assembly: Assembly) -> bool:
    """Whether any of it is padded."""
    if isinstance(assembly, Concat | Stack):
        return any(map(holds_padding, assembly.parts))
    return isinstance(assembly, Pad) or (
        isinstance(assembly, Slice) and holds_padding(assembly.part)
    )


def expanded(spec: WeightSpec) -> WeightSpec:
    """A per-tensor scale as one per output channel."""
    if spec.strategy != "tensor":
        return spec
    return replace(spec, scale_shape=(spec.n, 1), strategy="channel")


def can_join(specs: Sequence[WeightSpec]) -> Support:
    """Whether weights can be one, rows after rows; falsy with the first property that differs."""
    first = specs[0]
    for field in _ALIKE:
        values = [getattr(spec, field) for spec in specs]
        if any(value != values[0] for value in values):
            return Support(f"its parts differ in {field} ({', '.join(map(str, values))})")
    if len(specs) > 1 and first.strategy == "block":
        rows = first.block[0] if first.block else 1
        if any(spec.n % rows for spec in specs[:-1]):
            return Support(f"its parts' rows are no multiple of the scale block's {rows}")
    if len(specs) > 1 and first.has_g_idx:
        return Support("its parts have an act-order of their own each")
    return Support()


def joined(specs: Sequence[WeightSpec]) -> WeightSpec:
    """The spec of weights that :func:`can_join`, rows after rows."""
    first = specs[0]
    scale_shape = first.scale_shape
    if scale_shape is not None:
        rows = sum(spec.scale_shape[0] for spec in specs if spec.scale_shape)
        scale_shape = (rows, scale_shape[1])
    return replace(first, n=sum(spec.n for spec in specs), scale_shape=scale_shape)


def can_cut(spec: WeightSpec, axis: Axis, ranks: int) -> Support:
    """Whether a weight can be cut into equal ranks along N or K without cutting a group."""
    size = spec.n if axis == "n" else spec.k
    if size % ranks:
        return Support(f"{axis.upper()} = {size} is no multiple of {ranks} ranks")
    share = size // ranks
    if axis == "n":
        if spec.strategy == "block" and spec.block and share % spec.block[0]:
            return Support(f"{share} rows a rank cut a scale block of {spec.block[0]} rows")
        return Support()
    if spec.has_g_idx:
        return Support("act-order columns (weight_g_idx) cannot be cut along K")
    if spec.storage == "packed" and (share * spec.bits) % 32:
        return Support(f"{share} columns a rank do not fill whole words of {spec.bits}-bit codes")
    if spec.sparse and share % 4:
        return Support(f"{share} columns a rank cut a 2:4 group")
    width = spec.block[1] if spec.strategy == "block" and spec.block else spec.group_size
    if width and share % width:
        return Support(f"{share} columns a rank cut a scale group of {width}")
    return Support()


def cut(spec: WeightSpec, axis: Axis, ranks: int) -> WeightSpec:
    """The spec of one of the ranks that :func:`can_cut`."""
    rows, columns = spec.scale_shape or (1, 1)
    if axis == "n":
        block = spec.block[0] if spec.strategy == "block" and spec.block else 1
        n = spec.n // ranks
        shape = (-(-n // block), columns)
        return replace(spec, n=n, scale_shape=shape if spec.scale_shape else None)
    shape = (rows, columns // ranks if columns > 1 else 1)
    return replace(spec, k=spec.k // ranks, scale_shape=shape if spec.scale_shape else None)


def padded(spec: WeightSpec, n: int, k: int) -> WeightSpec:
    """The spec of a weight with rows and columns added."""
    if spec.scale_shape is None:
        return replace(spec, n=n, k=k)
    rows, columns = n, spec.scale_shape[1]
    if spec.group_size:
        columns = k // spec.group_size
    if spec.strategy == "block" and spec.block:
        rows, columns = -(-n // spec.block[0]), -(-k // spec.block[1])
    return replace(spec, n=n, k=k, scale_shape=(rows, columns))
