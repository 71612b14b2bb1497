"""The 8-bit matmul in plain torch; the layout is in ``kernel.py``."""

from __future__ import annotations

import torch

#: Rows and columns of a block that shares a scale.
BLOCK = 128


def blocks(size: int) -> int:
    return -(-size // BLOCK)


def is_blockwise(weight: torch.Tensor, weight_scale: torch.Tensor) -> bool:
    """Whether the weight has a scale for each 128 x 128 block (and not one for each row)."""
    return weight_scale.dim() == 2 and tuple(weight_scale.shape) != (weight.shape[0], 1)


def scaled_mm_reference(
    x_q: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    x_zero_point: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """:func:`scaled_mm` in plain torch. ``weight_sum`` is not needed here."""
    n, k = weight.shape
    if is_blockwise(weight, weight_scale):
        rows = weight_scale.repeat_interleave(BLOCK, dim=0)[:n]
        out = torch.zeros((x_q.shape[0], n), dtype=torch.float32, device=x_q.device)
        for block in range(blocks(k)):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            product = x_q[:, part].float() @ weight[:, part].float().t()
            x_part = x_scale[:, block : block + 1] if x_scale.numel() > x_q.shape[0] else x_scale
            out += product * x_part * rows[:, block]
    else:
        if weight.dtype == torch.int8:
            # float64 holds every int32 sum exactly, and has a matmul on every device.
            values = x_q.double()
            if x_zero_point is not None:
                values = values - x_zero_point.double()
            product = (values @ weight.double().t()).float()
        else:
            product = x_q.float() @ weight.float().t()
        out = product * x_scale * weight_scale.reshape(1, -1)
    if bias is not None:
        out += bias.float()
    return out.to(out_dtype)
