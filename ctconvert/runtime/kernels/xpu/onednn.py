"""oneDNN's int4 matmuls, as vLLM registers them; elsewhere the reference."""

from __future__ import annotations

import importlib.util

import torch

from ctconvert.runtime.kernels.xpu.reference import (
    int4_gemm_w4a8_reference,
    int4_gemm_w4a16_reference,
    quantize_activations,
)


def xpu_kernels_available() -> bool:
    """Whether vLLM's oneDNN kernels are installed, so that XPU tensors take them.

    Loads ``vllm_xpu_kernels`` if it is installed and its ops are not registered yet.
    """
    if hasattr(torch.ops._xpu_C, "int4_gemm_w4a8"):
        return True
    if importlib.util.find_spec("vllm_xpu_kernels") is None:
        return False
    importlib.import_module("vllm_xpu_kernels._xpu_C")
    return hasattr(torch.ops._xpu_C, "int4_gemm_w4a8")


def _runs(x: torch.Tensor) -> bool:
    return x.device.type == "xpu" and xpu_kernels_available()


def _group(weight_packed: torch.Tensor, group_size: int) -> int:
    """The group size oneDNN wants: K, not -1, where the scales are channel-wise."""
    return weight_packed.shape[1] * 8 if group_size == -1 else group_size


def int4_gemm_w4a8(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
) -> torch.Tensor:
    """``torch.ops._xpu_C.int4_gemm_w4a8`` on checked arguments, or the reference."""
    if not _runs(x):
        return int4_gemm_w4a8_reference(
            x, weight_packed, weight_scale, weight_zero_point, bias, group_size=group_size
        )
    q, scale = quantize_activations(x.reshape(-1, x.shape[-1]))
    out: torch.Tensor = torch.ops._xpu_C.int4_gemm_w4a8(
        q,
        scale,
        torch.zeros_like(scale, dtype=torch.int32),
        weight_packed.t(),
        weight_scale.to(x.dtype),
        weight_zero_point,
        _group(weight_packed, group_size),
        None,
        bias.to(torch.float16) if bias is not None else None,
    )
    return out.reshape(*x.shape[:-1], weight_packed.shape[0])


def int4_gemm_w4a16(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
) -> torch.Tensor:
    """``torch.ops._xpu_C.int4_gemm_w4a16`` on checked arguments, or the reference."""
    if not _runs(x):
        return int4_gemm_w4a16_reference(
            x, weight_packed, weight_scale, weight_zero_point, bias, group_size=group_size
        )
    out: torch.Tensor = torch.ops._xpu_C.int4_gemm_w4a16(
        x.reshape(-1, x.shape[-1]),
        weight_packed.t(),
        bias.to(x.dtype) if bias is not None else None,
        weight_scale.to(x.dtype),
        weight_zero_point,
        _group(weight_packed, group_size),
        None,
    )
    return out.to(x.dtype).reshape(*x.shape[:-1], weight_packed.shape[0])
