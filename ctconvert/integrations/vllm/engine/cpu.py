"""vLLM's kernels for CPUs: AVX-512, and AMX, which must be enabled before a kernel uses it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ctconvert.integrations.vllm.engine.base import Engine, Make, Run, op, same_scales
from ctconvert.runtime.kernels import Binding
from ctconvert.runtime.kernels.base import Tensors, padded


def _engine(name: str, run: Run) -> Engine | None:
    if op(name) is None:
        return None
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # a kernel that uses it before kills the process
    return Engine(name, run)


def _w4a16(bound: Binding, dtype: torch.dtype) -> Engine | None:
    return _engine("cpu_gemm_wna16", _run_w4a16) if same_scales(bound.spec, dtype) else None


def _w4a8(bound: Binding, dtype: torch.dtype) -> Engine | None:
    fits = torch.cpu._is_amx_tile_supported() and dtype == torch.bfloat16
    return _engine("int4_scaled_mm_cpu", _run_w4a8) if fits else None


def _int8(bound: Binding, dtype: torch.dtype) -> Engine | None:
    fits = torch.cpu._is_amx_tile_supported()
    return _engine("int8_scaled_mm_with_quant", _run_int8) if fits else None


LAYOUTS: Mapping[str, Make] = {"cpu-w4a16": _w4a16, "cpu-w4a8": _w4a8, "cpu-int8": _int8}


def _run_w4a16(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from vllm import _custom_ops as ops

    amx = torch.cpu._is_amx_tile_supported() and x.dtype == torch.bfloat16
    wide, wide_bias = padded(bound, x, bias)
    out = ops.cpu_gemm_wna16(
        input=wide,
        q_weight=tensors["qweight"],
        scales=tensors["scales"],
        zeros=tensors.get("qzeros"),
        bias=wide_bias,
        pack_factor=8,
        isa_hint="amx" if amx else "vec",
    )
    return out[..., : bound.spec.n]


def _run_w4a8(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from vllm import _custom_ops as ops

    wide, wide_bias = padded(bound, x, bias)
    out = ops.int4_scaled_mm_cpu(
        x=wide,
        w=tensors["qweight"],
        w_zeros=tensors["qzeros"],
        w_scales=tensors["scales"],
        bias=None if wide_bias is None else wide_bias.float(),
    )
    return out[..., : bound.spec.n]


def _run_int8(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    wide, wide_bias = padded(bound, x, bias)
    out = torch.ops._C.int8_scaled_mm_with_quant(
        wide.flatten(0, -2),
        tensors["weight"],
        tensors["weight_scale"],
        None if wide_bias is None else wide_bias.float(),
        x.dtype,
        True,
    )
    return out.reshape(*x.shape[:-1], -1)[..., : bound.spec.n]
