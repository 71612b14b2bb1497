"""The int4 matmuls in plain torch; the layouts are in ``kernel.py``."""

from __future__ import annotations

import torch


def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 with one scale for each token, as vLLM's XPU path computes it.

    The scale is max(abs(x)) / 127 in float32, at least 1e-5, rounded to x's dtype before x is
    divided by it.

    Args:
        x: f16 or bf16 [..., K].

    Returns:
        q i8 [..., K] and scale [..., 1] in x's dtype.
    """
    largest = x.float().abs().amax(dim=-1, keepdim=True)
    scale = (largest / 127).clamp(min=1e-5).to(x.dtype)
    q = torch.round(x.float() / scale.float()).clamp(-128, 127).to(torch.int8)
    return q, scale


def _values(weight_packed: torch.Tensor, weight_zero_point: torch.Tensor) -> torch.Tensor:
    """q i32 [N, K] of packed words."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight_packed.device)
    codes = (weight_packed.unsqueeze(-1) >> shifts) & 15
    return codes.reshape(weight_packed.shape[0], -1) - weight_zero_point.int()


def int4_gemm_w4a8_reference(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
) -> torch.Tensor:
    """:func:`int4_gemm_w4a8` in plain torch."""
    n, k = weight_packed.shape[0], weight_packed.shape[1] * 8
    q, x_scale = quantize_activations(x.reshape(-1, k))
    groups = weight_scale.shape[0]
    # The integer sum of a group is exact in float32: at most 2**24 / (128 * 8) = 16384 columns
    # are summed at once.
    weight = _values(weight_packed, weight_zero_point).float()
    out = torch.zeros((q.shape[0], n), dtype=torch.float32, device=x.device)
    size = k // groups
    for group in range(groups):
        for start in range(group * size, (group + 1) * size, 16384):
            part = slice(start, min(start + 16384, (group + 1) * size))
            out += (q[:, part].float() @ weight[:, part].t()) * weight_scale[group].float()
    out *= x_scale.float()
    if bias is not None:
        out += bias.float()
    return out.to(torch.float16).reshape(*x.shape[:-1], n)


def int4_gemm_w4a16_reference(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
) -> torch.Tensor:
    """:func:`int4_gemm_w4a16` in plain torch."""
    size = weight_packed.shape[1] * 8 // weight_scale.shape[0]
    scale = weight_scale.t().float().repeat_interleave(size, dim=1)
    weight = _values(weight_packed, weight_zero_point).float() * scale
    out = x.float() @ weight.t()
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)
