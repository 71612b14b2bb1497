"""How a layout's tensors can be joined and cut into ranks, after they were made.

vLLM joins q/k/v and gate/up along N as it loads, and cuts ranks along N or K, by narrowing a
dimension of each tensor. Where that is right for a layout, :data:`UNITS` has the rows and columns
of whose multiples its tensors are made; other layouts are taken whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ctconvert import assembly, layouts
from ctconvert.errors import UsageError
from ctconvert.layouts import Layout
from ctconvert.records import Convert
from ctconvert.runtime.kernels import Binding
from ctconvert.runtime.loading import binding
from ctconvert.specs import TensorSpec, WeightSpec


class Unit(NamedTuple):
    """Rows and columns at whose multiples a layout can be cut; None for nowhere."""

    n: int
    k: int | None


_TILES = Unit(64, 16)
#: INT 2 to 8 bits have at most 16 codes a word; a word is the least that can be cut.
UNITS: Mapping[str, Unit] = {
    "triton-wna16": Unit(16, 1),
    "scaled-mm": Unit(1, 1),
    "marlin": _TILES,
    "marlin-mxfp4": _TILES,
    "marlin-mxfp8": _TILES,
    "marlin-fp8": _TILES,
    "marlin-fp8-f16": _TILES,
    "humming": _TILES,
    "cpu-w4a16": Unit(32, 32),
    "cpu-w4a8": Unit(32, 128),
    "cpu-int8": Unit(32, None),
    "xpu-w4a16": Unit(8, 8),
    "xpu-w4a8": Unit(8, 8),
}


class Held(NamedTuple):
    """A parameter: its spec on this rank, and the dimensions that N and K lie along, if any."""

    spec: TensorSpec
    n: int | None = None
    k: int | None = None


class Share(NamedTuple):
    """What a rank has of a layer: its weight, and its parameters by local name.

    ``whole`` says that the parameters are the checkpoint's tensors as they are.
    """

    binding: Binding
    tensors: dict[str, Held]
    whole: bool


def share(
    name: str,
    parts: Sequence[Convert],
    sizes: Sequence[int],
    k: int,
    rank_sizes: Sequence[int],
    rank_k: int,
) -> Share:
    """The share of a rank in a layer made of ``parts``.

    Args:
        name: the layer's, for messages.
        parts: its converted modules, in order.
        sizes, k: rows of each part and columns, as vLLM's model has them.
        rank_sizes, rank_k: the same of this rank.

    Raises:
        UsageError: the parts are of other sizes, or the layout cannot be joined or cut like that.
    """
    bound = [binding(part) for part in parts]
    layout = layouts.get(bound[0].layout)
    assert layout is not None
    if any(one.layout != layout.name for one in bound):
        each = ", ".join(one.layout for one in bound)
        raise UsageError(f"module {name}: vLLM joins its parts, and their layouts differ ({each})")
    specs = [one.spec for one in bound]
    if not (support := assembly.can_join(specs)):
        raise UsageError(f"module {name}: vLLM joins its parts, but {support.reason}")
    spec = assembly.joined(specs)
    held = [width for one in bound for width in one.widths]
    if (held != list(sizes) and (len(held) > 1 or spec.n != sum(sizes))) or spec.k != k:
        raise UsageError(
            f"module {name}: {held} x {spec.k} in the manifest, {list(sizes)} x {k} in vLLM's model"
        )
    widths, rank_n = tuple(rank_sizes), sum(rank_sizes)
    if len(parts) == 1 and (rank_n, rank_k) == (spec.n, spec.k):
        stored = layout.output_specs(parts[0].recipe.weight)
        return Share(
            replace(bound[0], widths=widths),
            {local: Held(one) for local, one in stored.items()},
            True,
        )
    reason = uncut(layout, bound, spec, widths, rank_k)
    padded_k = bound[0].padded[1] if rank_k == spec.k else rank_k
    stored_part = assembly.padded(spec, rank_n, padded_k)
    reason = reason or unfit(layout, spec, stored_part)
    if reason:
        raise UsageError(
            f"module {name}: layout {layout.name} cannot be joined or cut to {list(widths)} x "
            f"{rank_k}: {reason}; use fewer ranks, or convert with --fuse or --tensor-parallel"
        )
    part = Binding(layout.name, assembly.padded(spec, rank_n, rank_k), (rank_n, padded_k), widths)
    return Share(part, axes(layout, stored_part), False)


def uncut(
    layout: Layout, bound: Sequence[Binding], spec: WeightSpec, widths: Sequence[int], rank_k: int
) -> str:
    """Why the tensors cannot be joined, or cut to such ranks; empty where they can."""
    unit = UNITS.get(layout.name)
    if unit is None:
        return "it is taken whole"
    if any(one.padded[0] != one.spec.n for one in bound):
        return "its rows are padded"
    if len({one.padded[1] for one in bound}) > 1:
        return "its parts are padded to different columns"
    wrong = [width for width in widths if width % unit.n]
    if wrong:
        return f"{wrong[0]} rows are no multiple of {unit.n}"
    if spec.has_g_idx:
        return "its columns have an order (act-order)"
    if rank_k == spec.k:
        return ""
    columns = spec.group_size or (spec.block[1] if spec.block else unit.k)
    if columns is None or "azp_adj" in layout.output_specs(spec):
        return "it holds sums over all columns"
    if any(one.padded[1] != one.spec.k for one in bound):
        return "its columns are padded"
    if rank_k % columns:
        return f"{rank_k} columns are no multiple of {columns}"
    return ""


def unfit(layout: Layout, spec: WeightSpec, part: WeightSpec) -> str:
    """Why a kernel of the layout does not take a rank's part; empty where it does."""
    if not (support := layout.supports(part)):
        return support.reason
    if layout.padded_shape(part) != (part.n, part.k):
        n, k = layout.padded_shape(part)
        return f"the kernel wants it padded to {n} x {k}"
    if spec.groups > 1 and part.groups == 1 and layout.name.startswith(("marlin", "humming")):
        return "the scales of a single group have another order"
    return ""


def axes(layout: Layout, spec: WeightSpec) -> dict[str, Held]:
    """Each tensor of a weight, and the dimensions that grow with N and with K."""
    n, k = spec.n, spec.k
    taller = layout.output_specs(assembly.padded(spec, 2 * n, k))
    wider = layout.output_specs(assembly.padded(spec, n, 2 * k))
    return {
        local: Held(made, _grown(made, taller[local]), _grown(made, wider[local]))
        for local, made in layout.output_specs(spec).items()
    }


def _grown(made: TensorSpec, larger: TensorSpec) -> int | None:
    grown = [
        dim
        for dim, (small, large) in enumerate(zip(made.shape, larger.shape, strict=True))
        if large != small
    ]
    assert len(grown) <= 1, "a layout of UNITS has one dimension for N and one for K"
    return grown[0] if grown else None
