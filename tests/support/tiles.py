"""Weights on Marlin tiles for tests: naive encoders, element by element, and what they encode."""

from __future__ import annotations

from typing import NamedTuple

import torch

E2M1 = [v * sign for sign in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
#: Values of the FP8 bytes without sign, but for the last, which is NaN.
E4M3 = [m * 2.0**-9 for m in range(8)] + [
    (1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)
]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """i32 words [R, C*bits/32] of codes [R, C], low first."""
    per = codes.reshape(codes.shape[0], -1, 32 // bits).long()
    words = sum(per[:, :, i] << (bits * i) for i in range(32 // bits))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def naive_tiles(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Marlin tiles of codes [K, N], from the order of the tensor cores' operand.

    Lane i of a warp holds, of the B operand of mma.m16n8k16, column i // 4 and rows 2 (i % 4),
    + 1, + 8, + 9; a word holds the lane's codes of one 16 x 16 tile (two operands side by side).
    """
    k, n = codes.shape
    order = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    places = []
    for lane in range(32):
        for column in range(4):
            entries = []
            for half in range(2):
                for row in (0, 1, 8, 9):
                    entries.append((2 * (lane % 4) + row, column * 16 + lane // 4 + 8 * half))
            for start in range(0, 8, len(order)):
                places.extend(entries[start + o] for o in order)
    in_k = torch.tensor([place[0] for place in places])
    in_n = torch.tensor([place[1] for place in places])
    rows = []
    for tile_k in range(0, k, 16):
        runs = [codes[tile_k + in_k, tile_n + in_n] for tile_n in range(0, n, 64)]
        rows.append(torch.cat(runs))
    return pack(torch.stack(rows), bits)


def naive_scales(scales: torch.Tensor) -> torch.Tensor:
    """Marlin's order of scales [K/G, N], element by element."""
    out = torch.empty_like(scales)
    for place in range(scales.shape[1]):
        if scales.shape[0] > 1:
            run, at = place // 64 * 64, place % 64
            source = run + at // 8 + 8 * (at % 8)
        else:
            run, at = place // 32 * 32, place % 32
            source = run + 2 * (at // 8) + (0, 1, 8, 9, 16, 17, 24, 25)[at % 8]
        out[:, place] = scales[:, source]
    return out


def naive_zero_points(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """vLLM's marlin_zero_points of codes [K/G, N]: permuted by 64, interleaved, packed along N."""
    run = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    rows = []
    for row in zeros.tolist():
        permuted = [row[p // 64 * 64 + p % 64 // 8 + 8 * (p % 8)] for p in range(len(row))]
        size = len(run)
        rows.append([permuted[p // size * size + run[p % size]] for p in range(len(row))])
    return pack(torch.tensor(rows), bits)


class Made(NamedTuple):
    """A form's tensors, and the float64 weight [N, K] that they hold."""

    weight: torch.Tensor
    scale: torch.Tensor
    zeros: torch.Tensor | None
    factor: torch.Tensor | None
    dense: torch.Tensor


def make_form(
    form: str,
    n: int,
    k: int,
    group: int,
    seed: int,
    zero_point: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Made:
    """Random codes and scales of a form; ``group`` -1 is channel-wise, ``dtype`` float scales'."""
    made = torch.Generator().manual_seed(seed)
    rows = k if group == -1 else group
    spread = torch.arange(k) // rows
    shape = (k // rows, n)
    bits = (
        4 if form in ("int4", "humming-int4", "mxfp4", "nvfp4", "nvfp4-f16", "humming-nvfp4") else 8
    )
    codes = torch.randint(0, 1 << bits, (k, n), generator=made)
    zeros = torch.randint(0, 1 << bits, shape, generator=made)
    stored, packed, factor, times = codes, None, None, 1.0
    if "int" in form:
        values = (codes - (zeros[spread] if zero_point else 1 << (bits - 1))).double()
        if form == "humming-int8":  # q, or 127 - q of a negative one
            stored = torch.where(codes >= 128, codes - 128, 255 - codes)
        if zero_point and form == "humming-int4":
            order = [p // 64 * 64 + p % 64 // 8 + 8 * (p % 8) for p in range(n)]
            packed = pack(zeros[:, order], 4)
        elif zero_point:
            packed = naive_zero_points(zeros, bits)
    elif bits == 4:
        values = torch.tensor(E2M1).double()[codes]
    else:
        codes[codes % 128 == 127] -= 1  # NaN
        values = torch.tensor([*E4M3, *(-v for v in E4M3)]).double()[codes]
    if form in ("mxfp4", "mxfp8"):
        raw = torch.randint(100, 122, shape, generator=made)
        scales, held = torch.exp2(raw.double() - 127), _fours(naive_scales(raw.byte()))
    elif form in ("nvfp4", "nvfp4-f16"):
        raw = torch.randint(128, 248, shape, generator=made)  # exponents 16 to 30
        raw[torch.rand(shape, generator=made) < 0.1] = 0
        exponent = torch.exp2(raw.double() // 8 - 22)
        scales = torch.where(raw == 0, 0.0, (1 + raw % 8 / 8) * exponent)
        held = _fours(naive_scales(raw.byte()))
        power = 119 if form == "nvfp4" else 7
        factor = torch.tensor([0.37 / 448]) * 2.0**power
        times = float(factor) * 2.0**-power
    elif form == "humming-nvfp4":
        raw = torch.randint(0, 127, shape, generator=made)
        scales, held = torch.tensor(E4M3).double()[raw], naive_scales(raw.byte())
        factor = torch.tensor([0.37 / 448])
        times = float(factor)
    else:
        base = (torch.rand(shape, generator=made) * 0.02 + 0.01).to(dtype)
        scales = base.double()
        power = 0 if form != "fp8" else 8 if dtype == torch.float16 else 120
        held = naive_scales((base.float() * 2.0**power).to(dtype))
    dense = values * scales[spread] * times
    return Made(naive_tiles(stored, bits), held, packed, factor, dense.t())


def _fours(scales: torch.Tensor) -> torch.Tensor:
    """Every run of four as (0, 2, 1, 3)."""
    order = [p // 4 * 4 + (0, 2, 1, 3)[p % 4] for p in range(scales.shape[1])]
    return scales[:, order]


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double().cpu()
    return float((out.double().cpu() - expected).norm() / expected.norm())
