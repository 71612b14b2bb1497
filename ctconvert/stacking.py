"""Fused modules: several logical weights stacked along N, and split again.

A lone weight is a stack of one part: both take the same path, so a per-tensor scale is always
one per output channel by the time a layout sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ctconvert.specs import QuantizedWeight, Support, WeightSpec

if TYPE_CHECKING:
    import torch

#: What the parts of a fused module must have in common.
_ALIKE = (
    "format",
    "family",
    "kind",
    "bits",
    "k",
    "storage",
    "element",
    "packing",
    "strategy",
    "group_size",
    "block",
    "symmetric",
    "scale_dtype",
    "has_g_idx",
    "sparse",
    "embedding",
    "activations",
    "input_type",
    "input_symmetric",
    "side",
    "side_zero_points",
)


def can_stack(specs: Sequence[WeightSpec]) -> Support:
    """Whether weights can be one; falsy with the first property that differs."""
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


def stacked_spec(specs: Sequence[WeightSpec]) -> WeightSpec:
    """The spec of the stack: N is the sum, a per-tensor scale becomes one per channel."""
    first = specs[0]
    n = sum(spec.n for spec in specs)
    scale_shape, strategy = first.scale_shape, first.strategy
    if scale_shape is not None:
        if strategy == "tensor":
            scale_shape, strategy = (n, 1), "channel"
        else:
            rows = sum(spec.scale_shape[0] for spec in specs if spec.scale_shape)
            scale_shape = (rows, scale_shape[1])
    return replace(
        first,
        n=n,
        scale_shape=scale_shape,
        strategy=strategy,
    )


def _per_channel(weight: QuantizedWeight, value: torch.Tensor | None) -> torch.Tensor | None:
    if value is None or weight.spec.strategy != "tensor":
        return value
    return value.expand(weight.spec.n, 1).contiguous()


def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight of several, rows in the order given; the specs must pass :func:`can_stack`."""
    import torch

    def joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
        present = [part for part in parts if part is not None]
        if len(present) < 2:
            return present[0] if present else None
        # concatenation is not defined for every 8-bit float: join the bytes
        whole = torch.cat([part.contiguous().view(torch.uint8) for part in present])
        return whole.view(present[0].dtype)

    codes = joined([weight.codes for weight in weights])
    assert codes is not None
    return QuantizedWeight(
        stacked_spec([weight.spec for weight in weights]),
        codes=codes,
        scale=joined([_per_channel(weight, weight.scale) for weight in weights]),
        zero_point=joined([_per_channel(weight, weight.zero_point) for weight in weights]),
        g_idx=weights[0].g_idx,
        side=weights[0].side,
    )


def unstack(weight: QuantizedWeight, specs: Sequence[WeightSpec]) -> list[QuantizedWeight]:
    """The inverse of :func:`stack`, given the parts' specs.

    Raises:
        ValueError: the rows of a part whose scale is per tensor have more than one scale.
    """
    parts = []
    row = scale_row = 0
    for spec in specs:
        scale, zero_point = weight.scale, weight.zero_point
        rows = spec.n if spec.strategy in ("tensor", None) else (spec.scale_shape or (0, 0))[0]
        if scale is not None:
            scale = scale[scale_row : scale_row + rows]
            if spec.strategy == "tensor":
                scale = _collapsed(scale, "scale")
        if zero_point is not None:
            zero_point = zero_point[scale_row : scale_row + rows]
            if spec.strategy == "tensor":
                zero_point = _collapsed(zero_point, "zero point")
        parts.append(
            QuantizedWeight(
                spec,
                codes=weight.codes[row : row + spec.n],
                scale=scale,
                zero_point=zero_point,
                g_idx=weight.g_idx,
                side=weight.side,
            )
        )
        row += spec.n
        scale_row += rows
    return parts


def _collapsed(rows: torch.Tensor, what: str) -> torch.Tensor:
    if bool((rows != rows[:1]).any()):
        raise ValueError(f"a per-tensor {what} differs between rows of its part")
    return rows[:1]
