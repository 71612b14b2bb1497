"""The quantised embedding look-up in plain torch; the layout is in ``kernel.py``."""

from __future__ import annotations

import torch


def embedding_gather_reference(
    ids: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None = None,
    *,
    bits: int,
    hidden: int,
    packing: str = "dense",
    check: bool = True,
) -> torch.Tensor:
    """:func:`embedding_gather` in plain torch."""
    if check:
        check_range(ids, weight_packed.shape[0])
    flat = ids.reshape(-1).long()
    known = (flat >= 0) & (flat < weight_packed.shape[0])
    rows = torch.zeros((flat.numel(), weight_packed.shape[1]), dtype=torch.int64)
    rows = rows.to(ids.device)
    rows[known] = weight_packed[flat[known]].long() & 0xFFFFFFFF

    k = torch.arange(hidden, device=ids.device)
    if packing == "dense":
        word, shift = bits * k // 32, bits * k % 32
    else:
        word, shift = k // (32 // bits), bits * (k % (32 // bits))
    following = (word + 1).clamp(max=rows.shape[1] - 1)
    pair = rows[:, word] | (rows[:, following] << 32)
    codes = (pair >> shift) & ((1 << bits) - 1)

    size = hidden // weight_scale.shape[1]
    scale = torch.full(
        (flat.numel(), weight_scale.shape[1]), torch.nan, dtype=torch.float32, device=ids.device
    )
    scale[known] = weight_scale[flat[known]].float()
    zero = torch.full_like(scale, 1 << (bits - 1))
    if weight_zero_point is not None:
        zero[known] = weight_zero_point[flat[known]].float()
    out = codes.float() - zero.repeat_interleave(size, dim=1)
    out *= scale.repeat_interleave(size, dim=1)
    return out.to(weight_scale.dtype).reshape(*ids.shape, hidden)


def check_range(ids: torch.Tensor, rows: int) -> None:
    """Raise IndexError for an id outside the table. Waits for the device: not while capturing."""
    if ids.numel() == 0:
        return
    if ids.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    if low < 0 or high >= rows:
        raise IndexError(f"ids reach from {low} to {high}, the table has rows 0 to {rows - 1}")
