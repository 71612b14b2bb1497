"""Of which source weights an output weight is made, and what that does to its spec; no data.

An assembly is a tree. Its leaves name 2-D weights of the source, or rectangles of them, its nodes
join and pad them; a :class:`Stack` stands only at the root and makes one output per item. Formats
and layouts know none of it: a rule of the plan builds trees, :mod:`ctconvert.codec` walks them over
data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct
from msgspec.structs import replace

from ctconvert.specs import Count, Size, Support, WeightSpec

Axis = Literal["n", "k"]


#: From the first row or column up to, and without, the last.
Range = tuple[Size, Size]


class Part(Struct, frozen=True, tag="part", omit_defaults=True):
    """A weight of the source: ``source`` counts the recipe's modules, ``expert`` 3-D tensors'.

    ``rows`` and ``columns`` are those of a rank, all where None. A per-tensor scale becomes one per
    output channel, so that a layout sees one kind less.
    """

    source: Annotated[int, Meta(ge=0)]
    expert: Annotated[int, Meta(ge=0)] | None = None
    rows: Range | None = None
    columns: Range | None = None


class Concat(Struct, frozen=True, tag="concat"):
    """Rows after rows: q, k and v; gate and up."""

    parts: tuple[Assembly, ...]


class Pad(Struct, frozen=True, tag="pad"):
    """The weight with rows and columns added up to N x K: code 0, scale 0, zero point 0."""

    part: Assembly
    n: Count
    k: Count


class Stack(Struct, frozen=True, tag="stack"):
    """One output per item along a new leading dimension: experts. Only at the root."""

    parts: tuple[Assembly, ...]


Assembly = Part | Concat | Pad | Stack

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
        return (assembled(assembly, specs).n,)
    if isinstance(assembly, Concat):
        return tuple(width for part in assembly.parts for width in _widths(part, specs))
    if isinstance(assembly, Stack):
        raise ValueError("a stack inside an assembly")
    inner = _widths(assembly.part, specs)
    return (*inner[:-1], inner[-1] + assembly.n - sum(inner))


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
        spec = expanded(specs[assembly.source])
        ranges: tuple[tuple[Axis, Range | None], ...] = (
            ("n", assembly.rows),
            ("k", assembly.columns),
        )
        for axis, some in ranges:
            if some is not None:
                if not (support := can_cut(spec, axis, some)):
                    raise ValueError(support.reason)
                spec = cut(spec, axis, some)
        return spec
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
    return padded(assembled(assembly.part, specs), assembly.n, assembly.k)


class Rectangle(NamedTuple):
    """What a leaf holds of its source weight: from where on, and how many rows and columns."""

    row: int
    column: int
    n: int
    k: int


def rectangle(part: Part, spec: WeightSpec) -> Rectangle:
    """The rows and columns of a leaf, ``spec`` being that of its source module."""
    rows, columns = part.rows or (0, spec.n), part.columns or (0, spec.k)
    return Rectangle(rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0])


def lines(rectangles: Iterable[Rectangle], n: int, k: int) -> list[list[Rectangle]] | None:
    """Rectangles in rows of one height each, from left to right; None unless they tile N x K."""
    found: dict[int, list[Rectangle]] = {}
    for one in sorted(rectangles):
        found.setdefault(one.row, []).append(one)
    below = 0
    for row, line in found.items():
        right = 0
        for one in line:
            if one.column != right or one.n != line[0].n:
                return None
            right += one.k
        if row != below or right != k:
            return None
        below += line[0].n
    return list(found.values()) if below == n else None


def holds_padding(assembly: Assembly) -> bool:
    """Whether any of it is padded."""
    if isinstance(assembly, Concat | Stack):
        return any(map(holds_padding, assembly.parts))
    return isinstance(assembly, Pad)


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


def can_cut(spec: WeightSpec, axis: Axis, some: Range) -> Support:
    """Whether rows (N) or columns (K) can be taken out of a weight without cutting a group."""
    size = spec.n if axis == "n" else spec.k
    first, last = some
    if not 0 <= first < last <= size:
        return Support(f"{axis.upper()} = {size} has no {first} to {last}")

    def apart(width: int) -> bool:
        return bool(first % width or (last % width and last != size))

    share = last - first
    if axis == "n":
        if spec.strategy == "block" and spec.block and apart(spec.block[0]):
            return Support(f"{share} rows a rank cut a scale block of {spec.block[0]} rows")
        if spec.storage == "packed" and not spec.symmetric and apart(words_of(spec)[0]):
            return Support(f"{share} rows a rank cut a word of {spec.bits}-bit zero points")
        return Support()
    if share == size:
        return Support()
    if spec.has_g_idx:
        return Support("act-order columns (weight_g_idx) cannot be cut along K")
    if spec.storage == "packed" and (first * spec.bits % 32 or share * spec.bits % 32):
        return Support(f"{share} columns a rank do not fill whole words of {spec.bits}-bit codes")
    if spec.sparse and apart(8):
        return Support(f"{share} columns a rank cut a byte of the 2:4 bitmask")
    width = spec.block[1] if spec.strategy == "block" and spec.block else spec.group_size
    if width and apart(width):
        return Support(f"{share} columns a rank cut a scale group of {width}")
    return Support()


def words_of(spec: WeightSpec) -> tuple[int, int]:
    """The fewest codes that fill whole words, and how many words those are."""
    if spec.packing == "padded":
        return spec.codes_per_word, 1
    codes = 32 // math.gcd(32, spec.bits)
    return codes, codes * spec.bits // 32


def cut(spec: WeightSpec, axis: Axis, some: Range) -> WeightSpec:
    """The spec of rows or columns that :func:`can_cut`."""
    share = some[1] - some[0]
    rows, columns = spec.scale_shape or (1, 1)
    block = spec.block if spec.strategy == "block" and spec.block else None
    if axis == "n":
        rows = 1 if spec.strategy == "tensor" else -(-share // (block[0] if block else 1))
    elif columns > 1:
        columns = -(-share // (block[1] if block else spec.group_size or 1))
    shape = (rows, columns) if spec.scale_shape else None
    if axis == "n":
        return replace(spec, n=share, scale_shape=shape)
    return replace(spec, k=share, scale_shape=shape)


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
