"""8-bit quantisation of activations in plain torch."""

from __future__ import annotations

import torch

_FP8 = torch.float8_e4m3fn
_LARGEST = {torch.int8: 127.0, _FP8: 448.0}


def _to_quantized(
    scaled: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Round x / scale (float32) to ``dtype``, half to even; NaN becomes 0 where it has no place."""
    if dtype == _FP8:
        return scaled.clamp(-448.0, 448.0).to(_FP8)
    rounded = torch.nan_to_num(scaled, nan=0.0).clamp(-512.0, 512.0).round()
    if zero is not None:
        rounded = rounded + zero.float()
    return rounded.clamp(-128.0, 127.0).to(torch.int8)


def quantize_per_token_reference(
    x: torch.Tensor, dtype: torch.dtype, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_per_token` in plain torch."""
    k = x.shape[-1]
    size = group_size or max(k, 1)
    groups = -(-k // size)
    values = torch.nn.functional.pad(x.float(), (0, groups * size - k))
    values = values.reshape(*x.shape[:-1], groups, size)
    largest = torch.nan_to_num(values.abs(), nan=torch.inf, posinf=torch.inf).amax(-1, keepdim=True)
    # In a tensor: CUDA multiplies by the reciprocal of a plain number, which is another scale.
    scale = largest / largest.new_tensor(_LARGEST[dtype])
    scale = torch.where(scale == 0, 1.0, scale)
    quantized = _to_quantized(values / scale, None, dtype)
    quantized = quantized.reshape(*x.shape[:-1], groups * size)[..., :k].contiguous()
    return quantized, scale.squeeze(-1)


def quantize_static_reference(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    dtype: torch.dtype = torch.int8,
) -> torch.Tensor:
    """:func:`quantize_static` in plain torch."""
    return _to_quantized(x.float() / scale, zero_point, dtype)
