"""The weight-only INT GEMM in plain torch; the layout is in ``kernel.py``."""

from __future__ import annotations

import torch

from ctconvert.runtime.kernels.fake_quant.reference import fake_quant_int8_reference


def dequantize_wna16(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """The dense weight, transposed, in plain torch: f32 [K, N] from the arguments of the GEMM."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=qweight.device)
    mask = (1 << bits) - 1
    codes = ((qweight.unsqueeze(-1) >> shifts) & mask).flatten(1)
    if qzeros is None:
        zeros = torch.full_like(scales, 1 << (bits - 1), dtype=torch.int32)
    else:
        zeros = ((qzeros.unsqueeze(-1) >> shifts) & mask).flatten(1)
    zeros = zeros.repeat_interleave(group_size, dim=0)
    return (codes - zeros).float() * scales.float().repeat_interleave(group_size, dim=0)


def wna16_gemm_reference(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    input_scale: torch.Tensor | None = None,
    output_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`wna16_gemm` in plain torch: dequantise to f32, multiply in f32, round once."""
    if input_scale is not None:
        x = fake_quant_int8_reference(x, input_scale)
    weight = dequantize_wna16(qweight, scales, qzeros, bits=bits, group_size=group_size)
    out = x.float() @ weight
    if bias is not None:
        out += bias.float()
    out = out.to(x.dtype)
    return out if output_scale is None else fake_quant_int8_reference(out, output_scale)
