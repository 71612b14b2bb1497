"""Weight-only INT GEMM on ``triton-wna16`` (G = 128, bf16) beside torch's dense bf16 product.

``python tests/bench/bench_wna16.py`` prints a table. Each shape is first compared with the f32
reference; a wrong result ends the run. Times are medians, each call captured in a CUDA graph as
serving engines run it, the L2 cache flushed before each; an empty graph is timed as a yardstick.
``floor`` is the larger of bytes / copy bandwidth and flops / dense rate, measured in the same run.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from printing import print_table

from ctconvert.runtime.benchmark import ceilings, median_seconds
from ctconvert.runtime.kernels.wna16.kernel import wna16_gemm
from ctconvert.runtime.kernels.wna16.reference import dequantize_wna16

SHAPES = ((4096, 4096), (4096, 28672), (14336, 4096), (8192, 8192))  # K, N
TOKENS = (1, 16, 64, 256, 1024, 4096)
GROUP = 128
#: bits, K, N: int4 everywhere, the other widths on one shape.
CASES = (*((4, *shape) for shape in SHAPES), (2, 8192, 8192), (8, 8192, 8192))
TOLERANCE = 4e-3


def measure(device: torch.device) -> list[dict[str, Any]]:
    """One row for each width, shape and token count.

    Raises:
        AssertionError: a result is wrong; nothing more is timed then.
    """
    bandwidth, rate = ceilings(device)
    rows = []
    for bits, k, n in CASES:
        words = (k, n * bits // 32)
        qweight = torch.randint(-(2**31), 2**31 - 1, words, dtype=torch.int32, device=device)
        scales = (torch.rand(k // GROUP, n, device=device) / 100 + 0.005).bfloat16()
        weight = dequantize_wna16(qweight, scales, bits=bits, group_size=GROUP)
        dense = weight.bfloat16()
        for tokens in TOKENS:
            x = torch.randn(tokens, k, device=device).bfloat16()
            ours = functools.partial(wna16_gemm, x, qweight, scales, bits=bits, group_size=GROUP)
            wanted = x.float() @ weight
            error = ((ours().float() - wanted).norm() / wanted.norm()).item()
            assert error < TOLERANCE, f"int{bits} {k} x {n} x {tokens}: relative error {error:.1e}"
            moved = qweight.nbytes + scales.nbytes + 2 * tokens * (k + n)
            flops = 2 * tokens * n * k
            seconds = median_seconds(ours, device)
            plain = median_seconds(functools.partial(torch.mm, x, dense), device)
            rows.append(
                {
                    "bits": bits,
                    "K x N": f"{k} x {n}",
                    "M": tokens,
                    "us": seconds * 1e6,
                    "dense us": plain * 1e6,
                    "dense / ours": plain / seconds,
                    "floor us": max(moved / bandwidth, flops / rate) * 1e6,
                    "TB/s": moved / seconds / 1e12,
                    "TFLOP/s": flops / seconds / 1e12,
                }
            )
    return rows


def main() -> None:
    device = torch.device("cuda")
    empty = torch.empty(1, device=device)
    bandwidth, rate = ceilings(device)
    launch = median_seconds(functools.partial(empty.add_, 1), device)
    print(
        f"{torch.cuda.get_device_name(device)}: copy {bandwidth / 1e12:.2f} TB/s, "
        f"bf16 {rate / 1e12:.0f} TFLOP/s, empty graph {launch * 1e6:.1f} us"
    )
    print_table(
        [
            {key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()}
            for row in measure(device)
        ]
    )


if __name__ == "__main__":
    main()
