"""W4A16 GEMM (G = 128, bf16) against torch's dense bf16 product of the same shape.

``python tests/bench/bench_wna16.py`` prints a table. Each shape is first compared with the f32
reference; a wrong result ends the run. Times are medians of ``triton.testing.do_bench``, which
clears the L2 cache before each run; an empty launch is in the list as a yardstick, and ``floor``
is the larger of bytes / copy bandwidth and flops / dense rate, both measured in the same run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ctconvert.runtime.kernels.wna16 import dequantize_wna16, wna16_gemm

SHAPES = ((4096, 4096), (4096, 28672), (14336, 4096), (8192, 8192))  # K, N
TOKENS = (1, 16, 64, 256, 1024, 4096)
GROUP = 128
BITS = 4
TOLERANCE = 4e-3


def _time(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    milliseconds: float = do_bench(call, return_mode="median")
    return milliseconds * 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Device-to-device copy in TB/s, bytes read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _time(lambda: target.copy_(source)) / 1e6


def dense_rate(device: torch.device) -> float:
    """A large bf16 product in TFLOP/s."""
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    return 2 * 8192**3 / _time(lambda: torch.mm(a, b)) / 1e6


def measure(device: torch.device) -> list[dict[str, Any]]:
    """One row for each shape and token count.

    Raises:
        AssertionError: a result is wrong; nothing more is timed then.
    """
    bandwidth, rate = copy_bandwidth(device), dense_rate(device)
    rows = []
    for k, n in SHAPES:
        qweight = torch.randint(
            -(2**31), 2**31 - 1, (k, n * BITS // 32), dtype=torch.int32, device=device
        )
        scales = (torch.rand(k // GROUP, n, device=device) / 100 + 0.005).bfloat16()
        weight = dequantize_wna16(qweight, scales, bits=BITS, group_size=GROUP)
        dense = weight.bfloat16()
        for tokens in TOKENS:
            x = torch.randn(tokens, k, device=device).bfloat16()
            ours = functools.partial(wna16_gemm, x, qweight, scales, bits=BITS, group_size=GROUP)
            wanted = x.float() @ weight
            error = ((ours().float() - wanted).norm() / wanted.norm()).item()
            assert error < TOLERANCE, f"{k} x {n} x {tokens}: relative error {error:.1e}"
            moved = qweight.nbytes + scales.nbytes + x.nbytes + 2 * tokens * n
            ours_us, dense_us = _time(ours), _time(functools.partial(torch.mm, x, dense))
            rows.append(
                {
                    "K": k,
                    "N": n,
                    "tokens": tokens,
                    "ours_us": ours_us,
                    "dense_us": dense_us,
                    "ratio": dense_us / ours_us,
                    "floor_us": max(moved / bandwidth, 2 * tokens * n * k / rate) / 1e6,
                    "TB/s": moved / ours_us / 1e6,
                    "TFLOP/s": 2 * tokens * n * k / ours_us / 1e6,
                    "error": error,
                }
            )
    return rows


def main() -> None:
    device = torch.device("cuda")
    empty = torch.empty(1, device=device)
    print(
        f"{torch.cuda.get_device_name(device)}: copy {copy_bandwidth(device):.2f} TB/s, "
        f"bf16 {dense_rate(device):.0f} TFLOP/s, empty launch {_time(empty.zero_):.1f} us"
    )
    rows = measure(device)
    print("  ".join(f"{name:>9}" for name in rows[0]))
    for row in rows:
        cells = (f"{v:9.2e}" if k == "error" else f"{v:9.1f}" for k, v in list(row.items())[3:])
        print("  ".join([*(f"{v:9d}" for v in list(row.values())[:3]), *cells]))


if __name__ == "__main__":
    main()
