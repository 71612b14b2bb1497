"""Rows and columns of logical weights: joined, cut and padded, with their scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from msgspec.structs import replace

from ctconvert.specs import QuantizedWeight, WeightSpec


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that can be joined and compared: not every operation takes 8-bit floats."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _cat(parts: Sequence[torch.Tensor | None], dim: int) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    if len(present) < 2:
        return present[0] if present else None
    return torch.cat([_bytes(part) for part in present], dim).view(present[0].dtype)


def _with_shape(spec: WeightSpec, n: int, k: int, scale: torch.Tensor | None) -> WeightSpec:
    rows, columns = (0, 0) if scale is None else scale.shape
    return replace(spec, n=n, k=k, scale_shape=None if scale is None else (rows, columns))


def expand(weight: QuantizedWeight) -> QuantizedWeight:
    """A per-tensor scale [1, 1] as one per output channel [N, 1]."""
    spec = weight.spec
    if spec.strategy != "tensor":
        return weight

    def per_channel(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value.expand(spec.n, 1).contiguous()

    scale = per_channel(weight.scale)
    return QuantizedWeight(
        replace(_with_shape(spec, spec.n, spec.k, scale), strategy="channel"),
        codes=weight.codes,
        scale=scale,
        zero_point=per_channel(weight.zero_point),
        g_idx=weight.g_idx,
        side=weight.side,
        pairs=weight.pairs,
    )


def collapse(weight: QuantizedWeight, spec: WeightSpec) -> QuantizedWeight:
    """The inverse of :func:`expand`, ``spec`` being what the weight was.

    Raises:
        ValueError: a per-tensor scale has more than one value.
    """
    scale, zero_point = weight.scale, weight.zero_point
    if spec.strategy == "tensor":
        scale = None if scale is None else _one(scale, "scale")
        zero_point = None if zero_point is None else _one(zero_point, "zero point")
    return QuantizedWeight(
        spec,
        codes=weight.codes,
        scale=scale,
        zero_point=zero_point,
        g_idx=weight.g_idx,
        side=weight.side,
        pairs=weight.pairs,
    )


def _one(rows: torch.Tensor, what: str) -> torch.Tensor:
    if bool((_bytes(rows) != _bytes(rows[:1])).any()):
        raise ValueError(f"a per-tensor {what} differs between rows of its part")
    return rows[:1]


def join_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight of several, rows after rows; what they share is the first's."""
    first = weights[0]
    if len(weights) == 1:
        return first
    codes = _cat([weight.codes for weight in weights], 0)
    scale = _cat([weight.scale for weight in weights], 0)
    assert codes is not None
    n = sum(weight.spec.n for weight in weights)
    return QuantizedWeight(
        _with_shape(first.spec, n, first.spec.k, scale),
        codes=codes,
        scale=scale,
        zero_point=_cat([weight.zero_point for weight in weights], 0),
        g_idx=first.g_idx,
        side=first.side,
        pairs=_cat([weight.pairs for weight in weights], 0),
    )


def join_columns(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight of several, columns after columns.

    Raises:
        ValueError: a channel's scale differs between them.
    """
    first = weights[0]
    if len(weights) == 1:
        return first

    def groups(values: list[torch.Tensor | None], what: str) -> torch.Tensor | None:
        if first.spec.strategy != "channel":
            return _cat(values, 1)
        for value in values[1:]:
            if value is not None and not torch.equal(_bytes(value), _bytes(values[0])):  # type: ignore[arg-type]
                raise ValueError(f"the {what} of a channel differs between its columns")
        return values[0]

    codes = _cat([weight.codes for weight in weights], 1)
    assert codes is not None
    scale = groups([weight.scale for weight in weights], "scale")
    k = sum(weight.spec.k for weight in weights)
    return QuantizedWeight(
        _with_shape(first.spec, first.spec.n, k, scale),
        codes=codes,
        scale=scale,
        zero_point=groups([weight.zero_point for weight in weights], "zero point"),
        g_idx=first.g_idx,
        side=first.side,
        pairs=_cat([weight.pairs for weight in weights], 1),
    )


def rows(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Some rows of a weight, sharing its memory; whole scale blocks."""
    spec = weight.spec
    if (start, stop) == (0, spec.n):
        return weight
    block = spec.block[0] if spec.strategy == "block" and spec.block else 1
    first, last = start // block, -(-stop // block)

    def some(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[first:last]

    scale = some(weight.scale)
    return QuantizedWeight(
        _with_shape(spec, stop - start, spec.k, scale),
        codes=weight.codes[start:stop],
        scale=scale,
        zero_point=some(weight.zero_point),
        g_idx=weight.g_idx,
        side=weight.side,
        pairs=None if weight.pairs is None else weight.pairs[start:stop],
    )


def columns(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Some columns of a weight, contiguous; whole words and scale groups."""
    spec = weight.spec
    if (start, stop) == (0, spec.k):
        return weight

    def some(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None or values.shape[1] == 1:
            return values
        width = spec.k / values.shape[1]
        if spec.strategy == "block" and spec.block:
            width = spec.block[1]
        return values[:, int(start / width) : -int(-stop // width)].contiguous()

    first, last = start, stop
    if spec.storage == "packed":
        first, last = start * spec.bits // 32, -(-stop * spec.bits // 32)
    pairs = None
    if weight.pairs is not None:
        first, last = start // 2, stop // 2
        pairs = weight.pairs[:, start // 8 : -(-stop // 8)].contiguous()
    scale = some(weight.scale)
    return QuantizedWeight(
        _with_shape(spec, spec.n, stop - start, scale),
        codes=weight.codes[:, first:last].contiguous(),
        scale=scale,
        zero_point=some(weight.zero_point),
        g_idx=weight.g_idx,
        side=weight.side,
        pairs=pairs,
    )


def _zero_code(spec: WeightSpec) -> int:
    """Code 0 as the codes hold it: the lowest of signed integers, 2:4 ones apart."""
    signed = spec.storage == "plain" and spec.kind == "int" and not spec.sparse
    return -(1 << (spec.bits - 1)) if signed else 0


def _code_columns(spec: WeightSpec) -> int:
    """Columns of the codes."""
    if spec.storage == "packed":
        return -(-spec.k // spec.codes_per_word)
    return spec.k // 2 if spec.sparse else spec.k


def pad(weight: QuantizedWeight, spec: WeightSpec) -> QuantizedWeight:
    """A weight with rows and columns added up to ``spec``: code 0, scale 0, zero point 0."""
    from ctconvert.transforms.marlin import pad_words

    old = weight.spec
    if (spec.n, spec.k) == (old.n, old.k):
        return weight
    if old.storage == "packed" and old.k == spec.k:
        codes = _framed(weight.codes, spec.n, weight.codes.shape[1], 0)
    elif old.storage == "packed":
        codes = pad_words(weight.codes, old.bits, old.n, old.k, spec.n, spec.k, fill_code=0)
    else:
        codes = _framed(weight.codes, spec.n, _code_columns(spec), _zero_code(old))
    pairs = weight.pairs
    if pairs is not None:
        pairs = _framed(pairs, spec.n, -(-spec.k // 8), 0)

    def groups(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        assert spec.scale_shape is not None
        return _framed(values, *spec.scale_shape, 0)

    return QuantizedWeight(
        spec,
        codes=codes,
        scale=groups(weight.scale),
        zero_point=groups(weight.zero_point),
        g_idx=weight.g_idx,
        side=weight.side,
        pairs=pairs,
    )


def _framed(values: torch.Tensor, n: int, k: int, fill: int) -> torch.Tensor:
    raw = _bytes(values)
    made = raw.new_full((n, k), fill % 256 if raw.dtype == torch.uint8 else fill)
    made[: values.shape[0], : values.shape[1]] = raw
    return made.view(values.dtype)


def strip(weight: QuantizedWeight, spec: WeightSpec) -> QuantizedWeight:
    """The inverse of :func:`pad`, ``spec`` being what the weight was.

    Raises:
        ValueError: what was added is not what :func:`pad` adds.
    """
    fill = _zero_code(spec)

    def cut(values: torch.Tensor | None, n: int, k: int, fill: int, what: str) -> torch.Tensor:
        assert values is not None
        raw = _bytes(values)
        fill = fill % 256 if raw.dtype == torch.uint8 else fill
        for region in (raw[n:], raw[:n, k:]):
            if region.numel() and bool((region != fill).any()):
                raise ValueError(f"the padding of {what} is not 0")
        return values[:n, :k].contiguous()

    scale = zero_point = pairs = None
    if weight.pairs is not None:
        pairs = cut(weight.pairs, spec.n, -(-spec.k // 8), 0, "the pairs")
    if spec.scale_shape is not None:
        scale = cut(weight.scale, *spec.scale_shape, 0, "the scales")
    if weight.zero_point is not None:
        assert spec.scale_shape is not None
        zero_point = cut(weight.zero_point, *spec.scale_shape, 0, "the zero points")
    return QuantizedWeight(
        spec,
        codes=cut(weight.codes, spec.n, _code_columns(spec), fill, "the codes"),
        scale=scale,
        zero_point=zero_point,
        g_idx=weight.g_idx,
        side=weight.side,
        pairs=pairs,
    )


def with_zeros(weight: QuantizedWeight) -> QuantizedWeight:
    """A 2:4 sparse weight with all of its columns among its codes, [N, K]; another as it is."""
    from ctconvert.transforms.sparse24 import dense_of_pairs

    if weight.pairs is None:
        return weight
    codes = dense_of_pairs(weight.codes, weight.pairs, weight.spec.k)
    return dataclasses.replace(weight, codes=codes, pairs=None)
