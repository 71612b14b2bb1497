"""Matmul on Marlin tiles, beside a dense bf16 matmul and the roofline's floor.

    python tests/bench/bench_marlin_mm.py

The floor is the larger of the bytes (weight, scales, activations, output) over a copy's bandwidth
and the operations over the bf16 rate of a large dense matmul, both measured in the same run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from printing import print_table

from ctconvert.runtime.benchmark import ceilings, median_seconds
from ctconvert.runtime.kernels.marlin.forms import FORMS
from ctconvert.runtime.kernels.marlin.reference import tiles_dequantize
from ctconvert.runtime.kernels.marlin.tiles import marlin_tiles_gemm

SHAPES = [(4096, 4096), (4096, 28672), (14336, 4096), (8192, 8192)]  # (K, N)
TOKENS = [1, 16, 64, 256, 1024, 4096]
#: The forms and their groups; all but int4 at the last shape alone.
KINDS = {"int4": 128, "int8": 128, "mxfp4": 32, "nvfp4": 16, "fp8": -1, "mxfp8": 32}


def weight_of(
    kind: str, n: int, k: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(weight, scale, zeros, factor) of random codes."""
    form, group = FORMS[kind], KINDS[kind]
    shape = (k // 16, n * form.bits // 2)
    words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)
    if form.codes == "e4m3":
        words &= -0x40404041  # below 2: no NaN, and no sum of few great weights
    rows = 1 if group == -1 else k // group
    if form.scales == "float":
        scale = torch.rand(rows, n, device=device) * 0.02 + 0.01
        return words, (scale * 2.0 ** form.powers[1]).bfloat16(), None, None
    low, high = (118, 124) if form.scales == "e8m0" else (200, 240)
    scale = torch.randint(low, high, (rows, n), dtype=torch.uint8, device=device)
    if form.power is None:
        return words, scale, None, None
    return words, scale, None, torch.full((1,), 2.0**-form.power / 4096, device=device)


def measure(device: torch.device) -> list[dict[str, Any]]:
    """One row for each case; raises if a case is not near the dense product.

    ``/ int4`` is the time over int4's at that shape, scaled by the bytes of the weights.
    """
    torch.manual_seed(0)
    bandwidth, rate = ceilings(device)
    rows = []
    int4: dict[tuple[int, int, int], float] = {}  # seconds a byte
    for kind, group in KINDS.items():
        for k, n in SHAPES if kind == "int4" else SHAPES[3:]:
            shape = {"form": kind, "n": n, "k": k, "group_size": group}
            held = weight_of(kind, n, k, device)
            dense = tiles_dequantize(*held, **shape).bfloat16()
            weight_bytes = held[0].nbytes + held[1].nbytes
            for m in TOKENS:
                x = torch.randn(m, k, device=device).bfloat16()
                product = partial(torch.mm, x, dense.t())
                gemm = partial(marlin_tiles_gemm, x, *held, **shape)
                expected = product().float()
                error = float((gemm().float() - expected).norm() / expected.norm())
                if not error < 5e-3:
                    raise AssertionError(f"{kind} {m} x {n} x {k}: error {error}")
                seconds = median_seconds(gemm, device)
                int4.setdefault((k, n, m), seconds / weight_bytes)
                moved = weight_bytes + 2 * m * (k + n)
                flops = 2 * m * n * k
                rows.append(
                    {
                        "weight": kind,
                        "K x N": f"{k} x {n}",
                        "M": m,
                        "us": round(seconds * 1e6, 1),
                        "dense us": round(median_seconds(product, device) * 1e6, 1),
                        "floor us": round(max(moved / bandwidth, flops / rate) * 1e6, 1),
                        "GB/s": round(moved / seconds / 1e9),
                        "TFLOP/s": round(flops / seconds / 1e12, 1),
                        "/ int4": round(seconds / weight_bytes / int4[k, n, m], 2),
                    }
                )
    return rows


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    print_table(measure(torch.device("cuda")))
