"""The order of the SM90 metadata, in torch's operations, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ctconvert.transforms.words import as_words


def to_kernel_order(rows: Tensor, size: int) -> Tensor:
    """Row-major nibbles u8 [Np, Kp/8] -> the kernel's order, same shape."""
    if size == 1:
        # [N/64, 64, K/128, 16 bytes] -> [K/128, N/64, 64, 16 bytes]
        runs = rows.view(torch.int64).view(rows.shape[0] // 64, 64, rows.shape[1] // 16, 2)
        blocks = runs.permute(2, 0, 1, 3)
        return blocks.reshape(-1).view(torch.uint8).view(rows.shape)
    # Four nibbles (16 columns) are one int16:
    # [N/64, m'//16, m'//8%2, m'%8, K/128, k'//32, k'//16%2] -> the order of the formula.
    units = rows.view(torch.int16).view(rows.shape[0] // 64, 4, 2, 8, rows.shape[1] // 16, 4, 2)
    return units.permute(4, 0, 1, 6, 3, 5, 2).reshape(-1).view(torch.uint8).view(rows.shape)


def from_kernel_order(meta: Tensor, size: int) -> Tensor:
    """Inverse of the order of the SM90 metadata: u8 [Np, Kp/8] with row-major nibbles."""
    flat = as_words(meta, torch.int64).view(-1)
    blocks = meta.shape[1] // 16, meta.shape[0] // 64
    if size == 1:
        order = flat.view(*blocks, 64, 2).permute(1, 2, 0, 3)
    else:
        order = flat.view(torch.int16).view(*blocks, 4, 2, 8, 4, 2).permute(1, 2, 6, 4, 0, 5, 3)
    return order.reshape(-1).view(torch.uint8).view(meta.shape)


def padding_is_zero(nibbles: Tensor, n: int, k: int) -> bool:
    whole = -(-k // 8)
    edge = nibbles[:n, k // 8 : whole] >> 4
    return not any(bool(part.any()) for part in (nibbles[n:], nibbles[:n, whole:], edge))
