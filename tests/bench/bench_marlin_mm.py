"""Matmul on Marlin tiles, beside a dense bf16 matmul and the roofline's floor.

    python tests/bench/bench_marlin_mm.py

The floor is the larger of the bytes (weight, scales, activations, output) over a copy's bandwidth
and the operations over the bf16 rate of a large dense matmul, both measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from triton.testing import do_bench

from ctconvert.runtime.kernels.marlin import (
    marlin_dequantize,
    marlin_gemm,
    marlin_mxfp4_dequantize,
    marlin_mxfp4_gemm,
)

SHAPES = [(4096, 4096), (4096, 28672), (14336, 4096), (8192, 8192)]  # (K, N)
TOKENS = [1, 16, 64, 256, 1024, 4096]
GROUP = 128


def median_us(function: Callable[[], Any], graph: bool = True) -> float:
    """Median time, the L2 cache flushed before each run; in a CUDA graph or launched one by one."""
    function()
    run = function
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            function()
        run = captured.replay
    return float(do_bench(run, warmup=10, rep=40, return_mode="median")) * 1e3


def ceilings(device: str) -> tuple[float, float]:
    """(TB/s of a device copy, TFLOP/s of a large bf16 matmul)."""
    source = torch.randint(0, 2**31, (2**28,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    # Not in a graph: there the copy becomes a node of its own kind, which is slower.
    copy = 2 * source.nbytes / median_us(partial(target.copy_, source), graph=False) / 1e6
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    return copy, 2 * 8192**3 / median_us(partial(torch.mm, a, b)) / 1e6


def words(*shape: int, device: str) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)


def measure(device: str = "cuda") -> list[dict[str, Any]]:
    """One row for each case; raises if a case is not near the dense product."""
    torch.manual_seed(0)
    copy, rate = ceilings(device)
    rows = []
    for kind, shapes in (("int4", SHAPES), ("int8", SHAPES[3:]), ("mxfp4", SHAPES[3:])):
        for k, n in shapes:
            bits = 8 if kind == "int8" else 4
            qweight = words(k // 16, n * bits // 2, device=device)
            if kind == "mxfp4":
                scale = torch.randint(118, 124, (k // 32, n), dtype=torch.uint8, device=device)
                dense = marlin_mxfp4_dequantize(qweight, scale, n=n, k=k).bfloat16()
                gemm = partial(marlin_mxfp4_gemm, weight=qweight, scale=scale, n=n, k=k)
            else:
                shape = {"bits": bits, "n": n, "k": k, "group_size": GROUP}
                scale = (torch.rand(k // GROUP, n, device=device) * 0.02 + 0.01).bfloat16()
                dense = marlin_dequantize(qweight, scale, **shape).bfloat16()
                gemm = partial(marlin_gemm, qweight=qweight, scales=scale, **shape)
            for m in TOKENS:
                x = torch.randn(m, k, device=device).bfloat16()
                product = partial(torch.mm, x, dense.t())
                expected = product().float()
                error = float((gemm(x).float() - expected).norm() / expected.norm())
                if not error < 5e-3:
                    raise AssertionError(f"{kind} {m} x {n} x {k}: error {error}")
                us = median_us(partial(gemm, x))
                moved = qweight.nbytes + scale.nbytes + 2 * m * (k + n)
                floor = max(moved / copy / 1e6, 2 * m * n * k / rate / 1e6)
                rows.append(
                    {
                        "weight": kind,
                        "K x N": f"{k} x {n}",
                        "M": m,
                        "us": round(us, 1),
                        "eager us": round(median_us(partial(gemm, x), graph=False), 1),
                        "dense bf16 us": round(median_us(product), 1),
                        "floor us": round(floor, 1),
                        "TB/s": round(moved / us / 1e6, 2),
                        "TFLOP/s": round(2 * m * n * k / us / 1e6, 1),
                    }
                )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown, one column for each key of the first row."""
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    print_table(measure())
