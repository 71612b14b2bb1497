"""Between source tensors and kernel tensors, and back: decode, assemble, encode, check.

Conversion, restoration, comparison and the runtime's proof all go this way; none knows how
another reads or writes. Everything here works on one unit of a module at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ctconvert import formats, layouts
from ctconvert.assembly import (
    Assembly,
    Concat,
    Pad,
    Part,
    Range,
    Rectangle,
    Stack,
    assembled,
    cut,
    leaves,
    lines,
    rectangle,
)
from ctconvert.errors import BadInputError, ConversionError, VerificationError
from ctconvert.layouts import Layout
from ctconvert.records import Convert, Restore, SourceModule
from ctconvert.specs import QuantizedWeight, TensorSpec, WeightSpec, differing_field
from ctconvert.store.safetensors import TensorEntry
from ctconvert.transforms import cuts
from ctconvert.transforms.device import to_host
from ctconvert.transforms.dtypes import same_bits, spec_of, torch_dtype

#: Gives the tensor of an entry, on the CPU, in memory of its own.
Read = Callable[[TensorEntry], torch.Tensor]
Tensors = dict[str, torch.Tensor]


def find_layout(module: str, name: str, version: int) -> Layout:
    """The layout a manifest names.

    Raises:
        VerificationError: this program does not know it, or knows another version of it.
    """
    layout = layouts.get(name)
    if layout is None or layout.version != version:
        raise VerificationError(
            f"module {module}: layout {name} version {version} is not known to this ctconvert; "
            "use the one that wrote it",
            module=module,
        )
    return layout


def source_weight(
    source: SourceModule,
    expert: int | None,
    read: Read,
    device: torch.device,
    rows: Range | None = None,
) -> QuantizedWeight:
    """One weight of the source, or some of its rows, decoded, on ``device``.

    Raises:
        BadInputError: the data is damaged.
    """
    handler = formats.get(source.weight.format)
    if handler is None:
        raise VerificationError(
            f"module {source.name}: unknown format {source.weight.format}", module=source.name
        )
    spec = source.weight if rows is None else cut(source.weight, "n", rows)
    entries = source.entries(expert, rows)
    tensors = {local: read(entry).to(device) for local, entry in entries.items()}
    for local in source.zeros:
        zeros = tensors.pop(local)
        if not same_bits(zeros, torch.zeros_like(zeros)):
            raise BadInputError(
                f"module {source.name}: {local} is not 0 everywhere, and the config says "
                "symmetric; the config and the tensors contradict each other",
                module=source.name,
            )
    try:
        return handler.decode(tensors, spec)
    except ValueError as error:
        raise BadInputError(f"module {source.name}: {error}", module=source.name) from None


def assemble(
    assembly: Assembly, sources: Sequence[SourceModule], read: Read, device: torch.device
) -> QuantizedWeight:
    """The weight of one unit, made of the source's."""
    if isinstance(assembly, Part):
        source = sources[assembly.source]
        weight = source_weight(source, assembly.expert, read, device, assembly.rows)
        weight = cuts.expand(weight)
        return weight if assembly.columns is None else cuts.columns(weight, *assembly.columns)
    if isinstance(assembly, Concat):
        return cuts.join_rows([assemble(part, sources, read, device) for part in assembly.parts])
    if isinstance(assembly, Stack):
        raise ValueError("a stack is assembled one unit at a time")
    inner = assemble(assembly.part, sources, read, device)
    return cuts.pad(inner, assembled(assembly, [source.weight for source in sources]))


def common_power(item: Convert, read: Read) -> int | None:
    """What :func:`encode` needs to know of the scales of all units of a stack; None for nothing."""
    if item.experts is None:
        return None
    layout = find_layout(item.name, item.recipe.layout, item.recipe.layout_version)
    return layout.common_power(
        read(item.sources[part.source].entries(part.expert)["weight_scale"])
        for part in leaves(item.recipe.assembly)
    )


def encode(
    item: Convert, unit: int, read: Read, device: torch.device, power: int | None = None
) -> Tensors:
    """One unit of a module, source tensors to kernel tensors by local name, on the CPU.

    ``power`` is :func:`common_power` of the module. The layout is inverted on the spot and must
    give back every code and scale.

    Raises:
        BadInputError: the source's data is damaged.
        ConversionError: the weight is not what was planned, or the layout does not invert; nothing
            wrong is ever written.
    """
    recipe = item.recipe
    layout = find_layout(item.name, recipe.layout, recipe.layout_version)
    weight = assemble(item.units[unit], item.sources, read, device)
    if field := differing_field(weight.spec, recipe.weight):
        raise ConversionError(
            f"module {item.name}: {field} is {getattr(weight.spec, field)}, planned "
            f"{getattr(recipe.weight, field)}; this is a bug in ctconvert, and the module was not "
            "written",
            module=item.name,
        )
    weight.power = power
    try:
        made = layout.encode(weight)
    except ValueError as error:
        raise BadInputError(
            f"module {_unit(item, unit)}: {error}", module=_unit(item, unit)
        ) from None
    check_specs(item, layout, made)
    if wrong := first_difference(weight, layout.decode(made, recipe.weight)):
        raise ConversionError(
            f"module {item.name}: layout {layout.name} does not give back its {wrong}; this is a "
            "bug in ctconvert, and the module was not written",
            module=item.name,
        )
    return {local: to_host(tensor) for local, tensor in made.items()}


def check_specs(item: Convert, layout: Layout, made: Mapping[str, torch.Tensor]) -> None:
    """Raises ConversionError unless a layout made what it had announced."""
    for local, spec in layout.output_specs(item.recipe.weight).items():
        if local not in made or spec_of(made[local]) != spec:
            have = spec_of(made[local]) if local in made else "nothing"
            raise ConversionError(
                f"module {item.name}: layout {layout.name} made {have} for {local}, planned "
                f"{spec}; this is a bug in ctconvert",
                module=item.name,
            )


def first_difference(a: QuantizedWeight, b: QuantizedWeight) -> str | None:
    """The first of codes, scale, zero_point, ... in which two weights differ, bit for bit."""
    left, right = a.tensors(), b.tensors()
    for name in [*left, *(set(right) - set(left))]:
        if name not in left or name not in right or not same_bits(left[name], right[name]):
            return name
    return None


@dataclass(frozen=True)
class Fragment:
    """What an output module holds of a source weight."""

    part: Part
    place: Rectangle
    weight: QuantizedWeight


def decode(item: Convert, unit: int, read: Read, device: torch.device) -> list[Fragment]:
    """What one unit of an output module holds of the source's weights.

    ``read`` reads the output.

    Raises:
        VerificationError: the layout's tensors hold what it cannot have made.
    """
    recipe = item.recipe
    layout = find_layout(item.name, recipe.layout, recipe.layout_version)
    entries = item.locals(unit)
    if not (support := layout.supports(item.logical)):
        raise VerificationError(
            f"module {item.name}: {layout.name} cannot hold it: {support.reason}", module=item.name
        )
    wanted = layout.output_specs(recipe.weight)
    if entries.keys() != wanted.keys():
        raise VerificationError(
            f"module {item.name}: holds {', '.join(entries)}, and layout {layout.name} has "
            f"{', '.join(wanted)}",
            module=item.name,
        )
    for local, spec in wanted.items():
        if entries[local].spec != spec:
            raise VerificationError(
                f"tensor {item.prefix}{local}: {entries[local].spec}, expected {spec}"
            )
    tensors = {local: read(entry).to(device) for local, entry in entries.items()}
    try:
        weight = layout.decode(tensors, recipe.weight)
        if item.experts is None:
            weight.power = None  # its own scales decide
        for local, tensor in layout.encode(weight).items():
            if not same_bits(tensor, tensors[local]):
                raise VerificationError(
                    f"tensor {item.prefix}{local}: holds bytes that layout {layout.name} does not "
                    "make"
                )
        return list(_fragments(item.units[unit], item.specs, weight))
    except ValueError as error:
        raise VerificationError(
            f"module {_unit(item, unit)}: {error}", module=_unit(item, unit)
        ) from None


def _unit(item: Convert, unit: int) -> str:
    """For messages: the module, and which of its experts."""
    return item.name if item.experts is None else f"{item.name} (expert {unit})"


def _fragments(
    assembly: Assembly, specs: Sequence[WeightSpec], weight: QuantizedWeight
) -> Iterator[Fragment]:
    """Takes the weight of an assembly apart."""
    if isinstance(assembly, Part):
        yield Fragment(assembly, rectangle(assembly, specs[assembly.source]), weight)
    elif isinstance(assembly, Pad):
        inner = assembled(assembly.part, specs)
        yield from _fragments(assembly.part, specs, cuts.strip(weight, inner))
    elif isinstance(assembly, Concat):
        first = 0
        for part in assembly.parts:
            last = first + assembled(part, specs).n
            yield from _fragments(part, specs, cuts.rows(weight, first, last))
            first = last
    else:
        raise ValueError("a stack inside an assembly")


def joined(fragments: Sequence[Fragment], source: SourceModule) -> QuantizedWeight:
    """One weight of the source, of all its fragments; ranks may hold the same.

    Raises:
        VerificationError: they do not cover it.
        ValueError: they contradict each other.
    """
    spec = source.weight
    found: dict[Rectangle, QuantizedWeight] = {}
    for fragment in fragments:
        first = found.setdefault(fragment.place, fragment.weight)
        if first is not fragment.weight and (wrong := first_difference(first, fragment.weight)):
            raise ValueError(f"{wrong} differs between the ranks that hold it")
    grid = lines(found, spec.n, spec.k)
    if grid is None:
        raise _incomplete(source)
    made = [cuts.join_columns([found[place] for place in line]) for line in grid]
    return cuts.collapse(cuts.join_rows(made), spec)


def _incomplete(source: SourceModule) -> VerificationError:
    return VerificationError(
        f"module {source.name}: the output's modules do not hold all of it once"
    )


def _by_source(
    item: Restore, unit: int, read: Read, device: torch.device
) -> Iterator[tuple[SourceModule, int | None, list[Fragment]]]:
    """What one unit of the modules holds of each source weight: the module, the expert, where."""
    found: dict[tuple[str, int | None], tuple[SourceModule, list[Fragment]]] = {}
    for module in item.modules:
        for fragment in decode(module, unit, read, device):
            source = module.sources[fragment.part.source]
            key = source.name, fragment.part.expert
            found.setdefault(key, (source, []))[1].append(fragment)
    for (_, expert), (source, fragments) in found.items():
        yield source, expert, fragments


def decoded(
    item: Restore, unit: int, read: Read, device: torch.device
) -> Iterator[tuple[SourceModule, int | None, QuantizedWeight]]:
    """The source weights of one unit, each with its module and expert; ``read`` reads the output.

    Raises:
        VerificationError: the output is damaged, or does not hold all of a weight.
    """
    for source, expert, fragments in _by_source(item, unit, read, device):
        try:
            yield source, expert, joined(fragments, source)
        except ValueError as error:
            raise VerificationError(f"module {source.name}: {error}", module=source.name) from None


def restore(
    item: Restore, unit: int, read: Read, device: torch.device
) -> Iterator[tuple[SourceModule, int | None, Tensors]]:
    """The source modules of one unit: each, its expert, and its tensors by local name, on the CPU.

    ``read`` reads the output. The few-element tensors that the manifest holds are not among them.

    Raises:
        VerificationError: the output is damaged, or holds another set of tensors, or other ones,
            than the source had.
    """
    for source, expert, fragments in _by_source(item, unit, read, device):
        name = source.name
        handler = formats.get(source.weight.format)
        if handler is None:
            raise VerificationError(
                f"module {name}: unknown format {source.weight.format}", module=name
            )
        entries = source.entries(expert)
        wanted = entries.keys() - source.values.keys()
        try:
            made = handler.encode(joined(fragments, source))
            for local in source.zeros:
                made[local] = _zeros(entries[local].spec)
            if missing := wanted - made.keys():
                raise ValueError(f"nothing holds {min(missing)}")
            if over := made.keys() - wanted:
                raise ValueError(f"the source had no {min(over)}, and the output holds it")
            tensors = {
                local: _as_stored(local, made[local], entries[local].spec)
                for local in made
                if not expert or local not in source.shared
            }
        except ValueError as error:
            raise VerificationError(f"module {name}: {error}", module=name) from None
        yield source, expert, tensors


def _zeros(spec: TensorSpec) -> torch.Tensor:
    return torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype))


#: These may be wider in the source than in the logical weight, as those of ``weight_g_idx``.
_INTEGERS = {"U8", "I8", "I16", "I32", "I64"}


def _as_stored(local: str, tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """A tensor as the source held it, contiguous, on the CPU.

    Raises:
        ValueError: it did not: the number of elements differs, or the dtype by more than a width.
    """
    have = spec_of(tensor)
    wider = {have.dtype, spec.dtype} <= _INTEGERS and spec.nbytes > have.nbytes
    if math.prod(spec.shape) != tensor.numel() or not (have.dtype == spec.dtype or wider):
        raise ValueError(f"{local} is {have}, and the source's was {spec}")
    return to_host(tensor).to(torch_dtype(spec.dtype)).reshape(spec.shape).contiguous()


def compare(item: Convert, unit: int, made: Read, original: Read, device: torch.device) -> int:
    """Compares one unit of an output module with its source, bit for bit.

    Args:
        item: the module, its sources being those of the checkpoint to compare with.
        unit: counts its experts.
        made: reads the output.
        original: reads the source.
        device: where both are decoded.

    Returns:
        how many source bytes were compared.

    Raises:
        VerificationError: a code, scale, zero point, ... differs.
    """
    count = 0
    for fragment in decode(item, unit, made, device):
        source = item.sources[fragment.part.source]
        want = assemble(fragment.part, item.sources, original, device)
        have = fragment.weight
        if wrong := first_difference(want, have):
            raise VerificationError(
                f"module {_unit(item, unit)}: {wrong} of {source.name} differs from the source's",
                module=_unit(item, unit),
            )
        share = have.spec.n * have.spec.k / (source.weight.n * source.weight.k)
        count += int(source.nbytes // (source.experts or 1) * share)
    return count
