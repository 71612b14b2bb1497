"""vLLM's other kernels for NVIDIA GPUs: Machete, Triton W4A16, CUTLASS W8A8, W4A8 and NVFP4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ctconvert.integrations.vllm.engine import base
from ctconvert.integrations.vllm.engine.base import Engine, Make, same_scales
from ctconvert.integrations.vllm.engine.marlin import scalar_type
from ctconvert.runtime.kernels import Binding
from ctconvert.runtime.kernels.base import Tensors, like, padded

#: Group sizes that vLLM's Triton kernel lists, besides K.
_TRITON_GROUPS = (32, 64, 128, 256)
#: What static zero points add to every output: ``input_zero_point`` times a sum over K, i32 [1, N].
SHIFT = "azp_shift"


def _flat(bound: Binding, x: torch.Tensor) -> torch.Tensor:
    """x as [M, padded K]."""
    wide, _ = padded(bound, x, None)
    return wide.reshape(-1, wide.shape[-1])


def _machete(bound: Binding, dtype: torch.dtype) -> Engine | None:
    spec = bound.spec
    found = base.op("machete_mm")
    if found is None or base.capability() != 90 or not same_scales(spec, dtype):
        return None
    name = f"uint{spec.bits}" + (f"b{2 ** (spec.bits - 1)}" if spec.symmetric else "")
    return Engine("machete_mm", partial(_run_machete, found, scalar_type(name)))


def _run_machete(
    found: Any,
    number: int,
    bound: Binding,
    tensors: Tensors,
    x: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    out = found(
        _flat(bound, x),
        tensors["qweight"],
        number,
        None,  # out_type: x's
        tensors["scales"],
        tensors.get("zeros"),
        bound.spec.group_size or -1,
        None,
        None,
        None,
    )
    return base.cut(bound, x, out, bias)


def _triton(bound: Binding, dtype: torch.dtype) -> Engine | None:
    spec = bound.spec
    groups = bound.group_size in (*_TRITON_GROUPS, spec.k)
    if spec.bits != 4 or not groups or not base.capability() or not same_scales(spec, dtype):
        return None
    try:
        from vllm.model_executor.kernels.linear.mixed_precision.triton_w4a16 import (
            triton_w4a16_gemm,
        )
    except ImportError:
        return None
    return Engine("triton_w4a16_gemm", partial(_run_triton, triton_w4a16_gemm))


def _run_triton(
    gemm: Callable[..., torch.Tensor],
    bound: Binding,
    tensors: Tensors,
    x: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    out = gemm(
        a=x.reshape(-1, x.shape[-1]).contiguous(),
        b_q=tensors["qweight"],
        scales=tensors["scales"],
        qzeros=tensors.get("qzeros"),
        group_size=bound.group_size,
        zp_bias=8 if bound.spec.symmetric else 0,
    )
    return base.cut(bound, x, out, bias)


def _scaled(bound: Binding, dtype: torch.dtype) -> Engine | None:
    spec, number = bound.spec, base.capability()
    eight = spec.input_type is not None and spec.block is None and spec.symmetric
    if not number or not eight or spec.n % 16 or spec.k % 16:
        return None
    asymmetric = not spec.input_symmetric
    static = "input_scale" in dict(spec.side)
    name = "cutlass_scaled_mm_azp" if asymmetric else "cutlass_scaled_mm"
    if spec.kind == "int":
        quantise = "static_scaled_int8_quant" if static else "dynamic_scaled_int8_quant"
        fits = 75 <= number < 100
    else:
        quantise = "static_scaled_fp8_quant" if static else "dynamic_per_token_scaled_fp8_quant"
        supports = base.op("cutlass_scaled_mm_supports_fp8")
        fits = supports is not None and supports(number)
    found, quant = base.op(name), base.op(quantise)
    if not fits or found is None or quant is None:
        return None
    run = partial(_run_scaled, found, quant)
    if static and asymmetric:
        return Engine(name, run, _shift)
    return Engine(name, run)


def _shift(bound: Binding, tensors: Tensors) -> dict[str, torch.Tensor]:
    sums = tensors["weight"].sum(1, dtype=torch.int32)
    return {SHIFT: (sums * tensors["input_zero_point"].to(torch.int32)).unsqueeze(0)}


def _run_scaled(
    found: Any,
    quant: Any,
    bound: Binding,
    tensors: Tensors,
    x: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    weight, scale = tensors["weight"], tensors.get("input_scale")
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    q = torch.empty_like(flat, dtype=weight.dtype)
    asymmetric = not bound.spec.input_symmetric
    zero = None  # of every token, i32 [M, 1]
    if scale is not None:
        given = tensors["input_zero_point"].to(torch.int32) if asymmetric else None
        quant(q, flat, scale, given)
    else:
        scale = torch.empty((flat.shape[0], 1), dtype=torch.float32, device=x.device)
        zero = torch.empty_like(scale, dtype=torch.int32) if asymmetric else None
        quant(q, flat, scale, zero)
    out = torch.empty((flat.shape[0], bound.spec.n), dtype=x.dtype, device=x.device)
    factors = (out, q, weight.t(), scale, tensors["weight_scale"])
    if asymmetric:
        found(*factors, tensors["azp_adj" if zero is not None else SHIFT], zero, like(bias, x))
    else:
        found(*factors, like(bias, x))
    return out.reshape(*x.shape[:-1], bound.spec.n)


def _w4a8(bound: Binding, dtype: torch.dtype) -> Engine | None:
    found, quant = base.op("cutlass_w4a8_mm"), base.op("dynamic_per_token_scaled_fp8_quant")
    if found is None or quant is None or base.capability() != 90 or dtype != torch.bfloat16:
        return None
    return Engine("cutlass_w4a8_mm", partial(_run_w4a8, found, quant))


def _run_w4a8(
    found: Any,
    quant: Any,
    bound: Binding,
    tensors: Tensors,
    x: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    flat = _flat(bound, x)
    q = torch.empty_like(flat, dtype=torch.float8_e4m3fn)
    scale = torch.empty((flat.shape[0], 1), dtype=torch.float32, device=x.device)
    quant(q, flat, scale, None)
    n, k = bound.padded
    out = found(
        q,
        tensors["weight"].t(),
        tensors["weight_scale"].view(k // bound.group_size, n, 8),
        bound.group_size,
        tensors["weight_chan_scale"],
        scale,
        None,
        None,
    )
    return base.cut(bound, x, out, bias)


def _nvfp4(bound: Binding, dtype: torch.dtype) -> Engine | None:
    number, supports = base.capability(), base.op("cutlass_scaled_mm_supports_fp4")
    found, quant = base.op("cutlass_scaled_fp4_mm"), base.op("scaled_fp4_quant")
    if not number or found is None or quant is None or supports is None or not supports(number):
        return None
    return Engine("cutlass_scaled_fp4_mm", partial(_run_nvfp4, found, quant))


def _run_nvfp4(
    found: Any,
    quant: Any,
    bound: Binding,
    tensors: Tensors,
    x: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    flat = _flat(bound, x)
    q, scale = quant(flat, tensors["input_global_scale_inv"], True)  # in tiles of 128 x 4
    out = torch.empty((flat.shape[0], bound.padded[0]), dtype=x.dtype, device=x.device)
    found(
        out,
        q,
        tensors["weight"],
        scale.view(torch.float8_e4m3fn),
        tensors["weight_scale"],
        tensors["alpha"],
    )
    return base.cut(bound, x, out, bias)


LAYOUTS: Mapping[str, Make] = {
    "machete": _machete,
    "triton-wna16": _triton,
    "scaled-mm": _scaled,
    "w4a8-fp8": _w4a8,
    "nvfp4-cutlass": _nvfp4,
}
