"""Marlin tiles in plain torch; the layout is in ``kernel.py``.

The permutations are built from vLLM's definitions and undone by indexing.
"""

from __future__ import annotations

import functools

import torch

from ctconvert.runtime.kernels.marlin.forms import FORMS

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


_GROUPED = _scale_order(True)


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
    return tiles_dequantize(
        qweight, scales, qzeros, form=f"int{bits}", n=n, k=k, group_size=group_size
    )


def _zeros(words: torch.Tensor, bits: int, interleaved: bool) -> torch.Tensor:
    """Codes i32 [groups, N] of zero points, in the grouped order even where there is one row."""
    codes = _unpack(words, bits)
    return _unpermute(_unpermute(codes, _interleave(bits)) if interleaved else codes, _GROUPED)


def _byte_floats(bits: int, mantissa: int, bias: int) -> list[float]:
    """Values of every code of a small float without sign, infinities or NaN."""
    found = []
    for code in range(1 << bits):
        exponent, fraction = divmod(code, 1 << mantissa)
        significand = fraction / (1 << mantissa) + (exponent > 0)
        found.append(significand * 2.0 ** (max(exponent, 1) - bias))
    return found


def _e4m3(codes: torch.Tensor) -> torch.Tensor:
    """FP8 bytes in float32; 127 and 255, which are NaN, as the 480 that their bits amount to."""
    values = _byte_floats(7, 3, 7)
    return torch.tensor([*values, *(-v for v in values)], device=codes.device)[codes.long()]


def _float_scales(scale: torch.Tensor, kind: str) -> torch.Tensor:
    """Scales float32 [K/G, N] in the order of the columns."""
    if kind == "float":
        return _unpermute(scale.float(), _scale_order(scale.shape[0] > 1))
    raw = scale.view(torch.uint8)
    if kind != "e4m3":
        raw = _unpermute(raw, [0, 2, 1, 3])
    raw = _unpermute(raw, _GROUPED)
    if kind == "e4m3":
        return _e4m3(raw)
    if kind == "e5m3":
        return torch.tensor(_byte_floats(8, 3, 22), device=raw.device)[raw.long()]
    factor = torch.ldexp(torch.ones_like(raw, dtype=torch.float32), raw.int() - 127)
    return torch.where(raw == 255, torch.nan, factor)


def tiles_dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    *,
    form: str,
    n: int,
    k: int,
    group_size: int,
) -> torch.Tensor:
    """The weight of Marlin tiles, float32 [N, K]; see :func:`marlin_tiles_gemm`."""
    found = FORMS[form]
    rows = group_rows(group_size, k)
    codes = _codes(weight, found.bits, n, k)
    if found.codes == "e2m1":
        values = torch.tensor(_E2M1, device=weight.device)[codes.long()]
    elif found.codes == "e4m3":
        values = _e4m3(codes)
    elif found.codes == "magnitude8":
        values = torch.where(codes < 128, codes, 127 - codes).float()
    elif zeros is None:
        values = (codes - (1 << (found.bits - 1))).float()
    else:
        shifts = _zeros(zeros, found.bits, found.zeros == "interleaved")
        values = (codes - shifts.repeat_interleave(rows, dim=0)).float()
    scales = _float_scales(scale, found.scales)
    held = {torch.float16: found.powers[0], torch.bfloat16: found.powers[1]}.get(scale.dtype, 0)
    values = values * (scales * 2.0**-held).repeat_interleave(rows, dim=0)
    if factor is not None:
        assert found.power is not None
        # In float64: a factor that bfloat16's exponents are taken out of may be subnormal.
        values = (values.double() * factor.double() * 2.0**found.power).float()
    return values.t().contiguous()


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


def marlin_tiles_gemm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    form: str,
    n: int,
    k: int,
    group_size: int,
) -> torch.Tensor:
    """:func:`marlin_tiles_gemm` in plain torch, through the float32 weight."""
    dense = tiles_dequantize(
        weight, scale, zeros, factor, form=form, n=n, k=k, group_size=group_size
    )
    return _matmul(x, dense, bias)


def marlin_grouped_reference(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    form: str,
    n: int,
    k: int,
    group_size: int,
) -> torch.Tensor:
    """:func:`marlin_grouped` in plain torch, expert by expert."""
    out = x.new_empty((len(rows), n))
    for expert, (start, end) in enumerate(torch.stack((offsets[:-1], offsets[1:]), 1).tolist()):
        if start == end:
            continue
        shift, times, plus = (None if t is None else t[expert] for t in (zeros, factor, bias))
        dense = tiles_dequantize(
            weight[expert], scale[expert], shift, times, form=form, n=n, k=k, group_size=group_size
        )
        out[start:end] = _matmul(x[rows[start:end].long()], dense, plus)
    return out
