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
from ctconvert.runtime.kernels.marlin.kernel import marlin_gemm
from ctconvert.runtime.kernels.marlin.mxfp4 import marlin_mxfp4_gemm
from ctconvert.runtime.kernels.marlin.reference import marlin_dequantize, marlin_mxfp4_dequantize

SHAPES = [(4096, 4096), (4096, 28672), (14336, 4096), (8192, 8192)]  # (K, N)
TOKENS = [1, 16, 64, 256, 1024, 4096]
GROUP = 128


def words(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)


def measure(device: torch.device) -> list[dict[str, Any]]:
    """One row for each case; raises if a case is not near the dense product."""
    torch.manual_seed(0)
    bandwidth, rate = ceilings(device)
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
                seconds = median_seconds(partial(gemm, x), device)
                moved = qweight.nbytes + scale.nbytes + 2 * m * (k + n)
                flops = 2 * m * n * k
                rows.append(
                    {
                        "weight": kind,
                        "K x N": f"{k} x {n}",
                        "M": m,
                        "us": round(seconds * 1e6, 1),
                        "dense us": round(median_seconds(product, device) * 1e6, 1),
                        "floor us": round(max(moved / bandwidth, flops / rate) * 1e6, 1),
                        "TB/s": round(moved / seconds / 1e12, 2),
                        "TFLOP/s": round(flops / seconds / 1e12, 1),
                    }
                )
    return rows


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    print_table(measure(torch.device("cuda")))
