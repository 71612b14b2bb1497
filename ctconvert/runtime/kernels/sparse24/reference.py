"""The 2:4 sparse matmul in plain torch; the layout is in ``kernel.py``."""

from __future__ import annotations

import torch

from ctconvert.transforms.sparse24 import sm90_decompress


def sparse24_mm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    meta: torch.Tensor,
    *,
    k: int,
    weight_scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """:func:`sparse24_mm` in plain torch: decompress, multiply in f32 (i8: exactly), scale."""
    dense = sm90_decompress(weight, meta, weight.shape[0], k)
    # A sum of K products of i8 is exact in f64.
    wide = torch.float64 if weight.dtype == torch.int8 else torch.float32
    out = (x.to(wide) @ dense.to(wide).t()).float()
    if weight_scale is not None:
        out = out * weight_scale.view(1, -1)
    if x_scale is not None:
        out = out * x_scale.view(-1, 1)
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype)
