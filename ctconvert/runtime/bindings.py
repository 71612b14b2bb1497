"""Which kernel runs which layout, and with which arguments.

A binding takes the tensors of a module exactly as the checkpoint holds them. To add a kernel for a
layout: a function here and a line in :data:`LINEAR`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)

from ctconvert.specs import WeightSpec

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Binding:
    """A module's description: its layout, its weight's spec, and the layout's own details."""

    layout: str
    spec: WeightSpec
    details: Mapping[str, Any] = field(default_factory=dict)
    widths: tuple[int, ...] = ()

    @property
    def group_size(self) -> int:
        """Columns that share a scale: G, or K where channel-wise."""
        return self.spec.group_size or self.spec.k

    @property
    def padded_shape(self) -> tuple[int, int]:
        n, k = self.details.get("padded_shape", (self.spec.n, self.spec.k))
        return int(n), int(k)


def _triton_wna16(
    bound: Binding, t: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from ctconvert.runtime.kernels.wna16 import wna16_gemm

    return wna16_gemm(
        x,
        t["qweight"],
        t["scales"],
        t.get("qzeros"),
        bias,
        bits=bound.spec.bits,
        group_size=bound.group_size,
        input_scale=t.get("input_scale"),
        output_scale=t.get("output_scale"),
    )


def _fake_quantised(
    call: Callable[[torch.Tensor], torch.Tensor], t: Tensors, x: torch.Tensor
) -> torch.Tensor:
    """``call`` between the static INT8 activations that ride along, where there are any."""
    from ctconvert.runtime.kernels.fake_quant import fake_quant_int8

    if "input_scale" in t:
        x = fake_quant_int8(x.contiguous(), t["input_scale"])
    out = call(x)
    return fake_quant_int8(out.contiguous(), t["output_scale"]) if "output_scale" in t else out


def _padded(
    bound: Binding, x: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x and bias, in x's dtype, as wide as the padded tiles; what is added meets zero weights."""
    n, k = bound.padded_shape
    bias = _like(bias, x)
    if bias is not None:
        bias = F.pad(bias, (0, n - bound.spec.n))
    return F.pad(x, (0, k - bound.spec.k)).contiguous(), bias


def _like(bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def _marlin(bound: Binding, t: Tensors, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    from ctconvert.runtime.kernels.marlin import marlin_gemm

    n, k = bound.padded_shape
    group_size = bound.spec.group_size or k

    def call(activations: torch.Tensor) -> torch.Tensor:
        wide, wide_bias = _padded(bound, activations, bias)
        out = marlin_gemm(
            wide,
            t["qweight"],
            t["scales"],
            t.get("qzeros"),
            t.get("g_idx_sort_indices"),
            wide_bias,
            bits=bound.spec.bits,
            n=n,
            k=k,
            group_size=group_size,
        )
        return out[..., : bound.spec.n]

    return _fake_quantised(call, t, x)


def _marlin_mxfp4(
    bound: Binding, t: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from ctconvert.runtime.kernels.marlin import marlin_mxfp4_gemm

    n, k = bound.padded_shape
    wide, wide_bias = _padded(bound, x, bias)
    scale = t["weight_scale"].view(torch.uint8)
    out = marlin_mxfp4_gemm(wide, t["weight"], scale, wide_bias, n=n, k=k)
    return out[..., : bound.spec.n]


def _scaled_mm(
    bound: Binding, t: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from ctconvert.runtime.kernels import scaled_mm as kernels

    weight, scale = t["weight"], t["weight_scale"]
    if bound.spec.input_type is None:  # weight-only: nothing quantises x
        return F.linear(x, _plain(weight, scale, bound.spec).to(x.dtype), _like(bias, x))
    return kernels.scaled_linear(
        x,
        weight,
        scale,
        input_scale=t.get("input_scale"),
        input_zero_point=t.get("input_zero_point"),
        weight_zero_point=t.get("weight_zero_point"),
        bias=bias,
        weight_sum=t.get("weight_sum"),
    )


def derived(bound: Binding, t: Tensors) -> dict[str, torch.Tensor]:
    """What a layout's kernel would otherwise compute from the weight on every call."""
    if bound.layout == "scaled-mm" and "input_zero_point" in t:
        return {"weight_sum": t["weight"].sum(1, dtype=torch.int32)}
    return {}


def _plain(weight: torch.Tensor, scale: torch.Tensor, spec: WeightSpec) -> torch.Tensor:
    """f32 [N, K] of an 8-bit weight and its per-channel or block-wise scale."""
    if spec.block is not None:
        rows, columns = spec.block
        scale = scale.repeat_interleave(rows, 0)[: spec.n]
        scale = scale.repeat_interleave(columns, 1)[:, : spec.k]
    return weight.float() * scale


def _cutlass_sparse24(
    bound: Binding, t: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from ctconvert.runtime.kernels.sparse24 import sparse24_linear

    return sparse24_linear(
        x,
        t["weight"],
        t["meta"],
        k=bound.spec.k,
        weight_scale=t["weight_scale"],
        input_scale=t.get("input_scale"),
        bias=_like(bias, x),
    )


def _xpu_w4a8(
    bound: Binding, t: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from ctconvert.runtime.kernels.xpu import int4_gemm_w4a8

    out = int4_gemm_w4a8(
        x,
        t["weight_packed"],
        t["weight_scale"],
        t["weight_zero_point"],
        bias,
        group_size=bound.group_size,
    )
    return out.to(x.dtype)


def _xpu_w4a16(
    bound: Binding, t: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from ctconvert.runtime.kernels.xpu import int4_gemm_w4a16

    def call(activations: torch.Tensor) -> torch.Tensor:
        return int4_gemm_w4a16(
            activations,
            t["weight_packed"],
            t["weight_scale"],
            t["weight_zero_point"],
            bias,
            group_size=bound.group_size,
        )

    return _fake_quantised(call, t, x)


#: The matmul of each layout.
LINEAR: Mapping[
    str, Callable[[Binding, Tensors, torch.Tensor, torch.Tensor | None], torch.Tensor]
] = {
    "triton-wna16": _triton_wna16,
    "marlin": _marlin,
    "marlin-mxfp4": _marlin_mxfp4,
    "scaled-mm": _scaled_mm,
    "cutlass-sparse24": _cutlass_sparse24,
    "xpu-w4a8": _xpu_w4a8,
    "xpu-w4a16": _xpu_w4a16,
}


def gather(bound: Binding, t: Tensors, ids: torch.Tensor) -> torch.Tensor:
    """The look-up of the ``gather`` layout."""
    from ctconvert.runtime.kernels.gather import embedding_gather

    return embedding_gather(
        ids,
        t["weight_packed"],
        t["weight_scale"],
        t.get("weight_zero_point"),
        bits=bound.spec.bits,
        hidden=bound.spec.k,
        packing=bound.details["packing"],
    )
