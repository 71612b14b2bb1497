"""The kernels of the layouts on Marlin tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)

from ctconvert.runtime import activations
from ctconvert.runtime.kernels.base import (
    Binding,
    Grouped,
    Kernel,
    Tensors,
    fake_quantised,
    like,
    padded,
)
from ctconvert.runtime.kernels.marlin.grouped import marlin_grouped
from ctconvert.runtime.kernels.marlin.kernel import marlin_gemm
from ctconvert.runtime.kernels.marlin.tiles import marlin_tiles_gemm
from ctconvert.specs import WeightSpec


class Held(NamedTuple):
    """The form of a layout's tensors, and those of them that the kernels take."""

    form: str
    weight: torch.Tensor
    scale: torch.Tensor
    zeros: torch.Tensor | None = None
    factor: torch.Tensor | None = None


def _marlin(tensors: Tensors) -> Held:
    words, scale = tensors["qweight"], tensors["scales"]
    return Held(f"int{_bits(words, scale)}", words, scale, tensors.get("qzeros"))


def _humming(tensors: Tensors) -> Held:
    words, scale = tensors["weight"], tensors["weight_scale"]
    form = "humming-int4"
    if _bits(words, scale) == 8:  # codes that meet float16 are as Marlin's
        form = "int8" if scale.dtype == torch.float16 else "humming-int8"
    return Held(form, words, scale, tensors.get("zero_point"))


def _bits(words: torch.Tensor, scale: torch.Tensor) -> int:
    """From [.., K/16, N*b/2] and [.., K/G, N]."""
    return 2 * words.shape[-1] // scale.shape[-1]


def _floats(tensors: Tensors, form: str, factor: str = "weight_global_scale") -> Held:
    found = tensors.get(factor)
    return Held(form, tensors["weight"], tensors["weight_scale"], None, found)


Take = Callable[[Tensors], Held]


def _group(bound: Binding) -> int:
    """Rows of the tiles that share a scale; -1 where all do."""
    spec = bound.spec
    return spec.block[1] if spec.block is not None else spec.group_size or -1


def _tiles(
    take: Take, bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    held = take(tensors)._asdict()
    n, k = bound.padded

    def call(x: torch.Tensor) -> torch.Tensor:
        wide, wide_bias = padded(bound, x, bias)
        out = marlin_tiles_gemm(wide, **held, bias=wide_bias, n=n, k=k, group_size=_group(bound))
        return out[..., : bound.spec.n]

    # Of FP4 and FP8 weights the kernels take 16-bit activations, whatever the scheme's are.
    return fake_quantised(call, tensors, x) if bound.spec.kind == "int" else call(x)


def _marlin_tiles(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    n, k = bound.padded

    def call(x: torch.Tensor) -> torch.Tensor:
        wide, wide_bias = padded(bound, x, bias)
        out = marlin_gemm(
            wide,
            tensors["qweight"],
            tensors["scales"],
            tensors.get("qzeros"),
            tensors.get("g_idx_sort_indices"),
            wide_bias,
            bits=bound.spec.bits,
            n=n,
            k=k,
            group_size=_group(bound),
        )
        return out[..., : bound.spec.n]

    return fake_quantised(call, tensors, x)


def _experts(
    take: Take,
    bound: Binding,
    tensors: Tensors,
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    held = take(tensors)._asdict()
    if held["factor"] is not None:  # [E] or [E, 1]
        held["factor"] = held["factor"].reshape(-1, 1)
    n, k = bound.padded
    bias = like(bias, x)
    if bias is not None:
        bias = F.pad(bias, (0, n - bound.spec.n))
    wide = F.pad(x, (0, k - bound.spec.k)).contiguous()
    out = marlin_grouped(wide, rows, offsets, **held, bias=bias, n=n, k=k, group_size=_group(bound))
    return out[..., : bound.spec.n]


def _grouped(take: Take) -> Callable[[WeightSpec], Grouped | None]:
    def of(spec: WeightSpec) -> Grouped | None:
        # Columns in an order of each expert's own, or static activations of its own: one by one.
        alone = spec.has_g_idx or (spec.kind == "int" and spec.side)
        return None if alone else partial(_experts, take)

    return of


def _kernel(layout: str, take: Take, dtype: torch.dtype | None = None, **more: Any) -> Kernel:
    run = partial(_tiles, take)
    return Kernel(layout, run, 1e-2, grouped=_grouped(take), dtype=dtype, **more)


def _nvfp4(layout: str, form: str, dtype: torch.dtype) -> Kernel:
    # E5M3 has no place for the smallest scales, which are 0 to Marlin as well.
    return _kernel(layout, partial(_floats, form=form), dtype, lost=("weight_scale_lost",))


MARLIN = Kernel(
    "marlin", _marlin_tiles, 1e-2, activations.fake_quantised, grouped=_grouped(_marlin)
)
HUMMING = Kernel(
    "humming",
    partial(_tiles, _humming),
    1e-2,
    activations.fake_quantised,
    grouped=_grouped(_humming),
)
MARLIN_MXFP4 = _kernel("marlin-mxfp4", partial(_floats, form="mxfp4"))
MARLIN_MXFP8 = _kernel("marlin-mxfp8", partial(_floats, form="mxfp8"))
MARLIN_NVFP4 = _nvfp4("marlin-nvfp4", "nvfp4", torch.bfloat16)
MARLIN_NVFP4_F16 = _nvfp4("marlin-nvfp4-f16", "nvfp4-f16", torch.float16)
MARLIN_FP8 = _kernel("marlin-fp8", partial(_floats, form="fp8"), torch.bfloat16)
MARLIN_FP8_F16 = _kernel("marlin-fp8-f16", partial(_floats, form="fp8"), torch.float16)
HUMMING_NVFP4 = _kernel(
    "humming-nvfp4", partial(_floats, form="humming-nvfp4", factor="weight_scale_2")
)
