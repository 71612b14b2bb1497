"""Marlin tiles in plain torch; the layout is in ``kernel.py``.

The permutations are built from vLLM's definitions and undone by indexing.
"""

from __future__ import annotations

import functools

import torch

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _interleave(bits: int) -> list[int]:
    """Order of 8 (b = 4) or 4 (b = 8) codes inside a word, or of two."""
    return [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]


@functools.cache
def _weight_order(bits: int) -> torch.Tensor:
    """i64 [1024]: Marlin's place p of a run holds code order[p] of the four 16 x 16 tiles."""
    order: list[int] = []
    for i in range(32):
        one = []
        for block in (0, 1):
            for row in (2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4) + 8, 2 * (i % 4) + 9):
                one.append(16 * row + i // 4 + 8 * block)
        for j in range(4):
            order.extend(place + 256 * j for place in one)
    run = _interleave(bits)
    return torch.tensor(order).reshape(-1, len(run))[:, run].reshape(-1)


def _scale_order(grouped: bool) -> list[int]:
    """Order of 64 (grouped) or 32 (channel-wise) scales along N."""
    if grouped:
        return [i + 8 * j for i in range(8) for j in range(8)]
    return [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


def _unpermute(t: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Undo a permutation of every run of ``len(order)`` along the last dimension."""
    inverse = torch.empty(len(order), dtype=torch.int64)
    inverse[torch.tensor(order)] = torch.arange(len(order))
    runs = t.reshape(t.shape[0], -1, len(order))
    return runs[:, :, inverse.to(t.device)].reshape(t.shape)


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """i32 [R, C] to codes i32 [R, C*32/bits], low bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(words.shape[0], -1)


def _codes(qweight: torch.Tensor, bits: int, n: int, k: int) -> torch.Tensor:
    """Codes i32 [K, N] of Marlin tiles."""
    packed = _unpack(qweight, bits).reshape(k // 16, -1, 1024)
    order = _weight_order(bits).to(qweight.device)
    tiles = torch.empty_like(packed)
    tiles[:, :, order] = packed
    return tiles.reshape(k // 16, n // 16, 16, 16).transpose(1, 2).reshape(k, n)


def group_rows(group_size: int, k: int) -> int:
    """Rows along K that share a scale: all of them where channel-wise."""
    return k if group_size == -1 else group_size


def marlin_dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    *,
    bits: int,
    n: int,
    k: int,
    group_size: int,
) -> torch.Tensor:
    """The weight of Marlin tiles, float32 [N, K]; see :func:`marlin_gemm` for the arguments.

    With act-order the columns are in the order of the sorted groups, as they are stored.
    """
    rows = group_rows(group_size, k)
    codes = _codes(qweight, bits, n, k)
    scale = _unpermute(scales.float(), _scale_order(scales.shape[0] > 1))
    if qzeros is None:
        values = (codes - (1 << (bits - 1))).float()
    else:
        # Zero points take the permutation of grouped scales even where there is one row.
        run = _interleave(bits)
        zeros = _unpermute(_unpermute(_unpack(qzeros, bits), run), _scale_order(True))
        values = (codes - zeros.repeat_interleave(rows, dim=0)).float()
    return (values * scale.repeat_interleave(rows, dim=0)).t().contiguous()


def marlin_mxfp4_dequantize(
    weight: torch.Tensor, scale: torch.Tensor, *, n: int, k: int
) -> torch.Tensor:
    """The MXFP4 weight of Marlin tiles, float32 [N, K]; see :func:`marlin_mxfp4_gemm`."""
    values = torch.tensor(_E2M1, device=weight.device)[_codes(weight, 4, n, k).long()]
    scale = scale.view(torch.uint8)
    exponent = _unpermute(_unpermute(scale, [0, 2, 1, 3]), _scale_order(True))
    factor = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.int() - 127)
    factor = torch.where(exponent == 255, torch.nan, factor)
    return (values * factor.repeat_interleave(32, dim=0)).t().contiguous()


def _matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = x.float() @ weight.t()
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)


def marlin_gemm_reference(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    g_idx_sort_indices: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    n: int,
    k: int,
    group_size: int,
) -> torch.Tensor:
    """:func:`marlin_gemm` in plain torch, through the float32 weight."""
    weight = marlin_dequantize(qweight, scales, qzeros, bits=bits, n=n, k=k, group_size=group_size)
    if g_idx_sort_indices is not None:
        x = x[..., g_idx_sort_indices.long()]
    return _matmul(x, weight, bias)


def marlin_mxfp4_gemm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    n: int,
    k: int,
) -> torch.Tensor:
    """:func:`marlin_mxfp4_gemm` in plain torch, through the float32 weight."""
    return _matmul(x, marlin_mxfp4_dequantize(weight, scale, n=n, k=k), bias)
