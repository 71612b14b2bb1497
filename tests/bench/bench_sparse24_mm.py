"""2:4 sparse matmul on CUTLASS against torch's dense matmul of the same shape and type.

``python tests/bench/bench_sparse24_mm.py`` prints a table. Each shape is first compared with the
dense product in f32; a wrong result ends the run. Times are medians, each call captured in a CUDA
graph, the L2 cache flushed before each. Ours writes bf16 with
per-row and (8-bit) per-token scales applied; the dense peers are ``torch.mm``, ``torch._scaled_mm``
with per-tensor scales and ``use_fast_accum=True``, and ``torch._int_mm``, which writes i32 and
takes no fewer than 17 tokens (32 are timed instead).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ctconvert.runtime.benchmark import ceilings, median_seconds
from ctconvert.runtime.kernels.sparse24 import cutlass
from ctconvert.runtime.kernels.sparse24.kernel import sparse24_mm
from ctconvert.transforms.sparse24 import sm90_compress

SHAPES = ((8192, 8192), (4096, 14336), (28672, 4096))  # N, K
TOKENS = (1, 16, 64, 256, 1024, 4096)
DTYPES = (torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).to(dtype)


def _random_weight(n: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A random dense 2:4 weight."""
    kept = torch.rand(n, k // 4, 4, device=device).argsort(dim=-1) < 2
    dense = _random((n, k), dtype, device)
    return torch.where(kept.view(n, k), dense, torch.zeros_like(dense))


def _dense(x: torch.Tensor, weight: torch.Tensor) -> tuple[str, Callable[[], Any]]:
    transposed = weight.t()
    if x.dtype == torch.int8:
        padded = x if x.shape[0] > 16 else x.new_zeros(32, x.shape[1])
        return "_int_mm", lambda: torch._int_mm(padded, transposed)
    if x.dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=x.device)
        return "_scaled_mm", lambda: torch._scaled_mm(
            x, transposed, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return "mm", lambda: torch.mm(x, transposed)


def measure(device: torch.device) -> list[dict[str, Any]]:
    """One row for each type, shape and token count.

    Raises:
        AssertionError: a result is wrong; nothing is timed then.
    """
    rows = []
    for dtype in DTYPES:
        out_dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
        for n, k in SHAPES:
            dense = _random_weight(n, k, dtype, device)
            weight, meta = sm90_compress(dense)
            for tokens in TOKENS:
                x = _random((tokens, k), dtype, device)
                row_scale = x_scale = None
                wanted = x.float() @ dense.float().t()
                if dtype.itemsize == 1:
                    row_scale = torch.rand(n, 1, device=device) / 100 + 0.001
                    x_scale = torch.rand(tokens, 1, device=device) / 100 + 0.001
                    wanted = wanted * row_scale.view(1, -1) * x_scale

                ours = functools.partial(
                    sparse24_mm,
                    x,
                    weight,
                    meta,
                    k=k,
                    weight_scale=row_scale,
                    x_scale=x_scale,
                    out_dtype=out_dtype,
                )
                error = ((ours().float() - wanted).norm() / wanted.norm()).item()
                assert error < 5e-3, f"{dtype} {n} x {k} x {tokens}: relative error {error:.1e}"
                variant = cutlass.VARIANTS[dtype.itemsize][cutlass.select(dtype, n, tokens)]
                peer, call = _dense(x, dense)
                ours_us, dense_us = (median_seconds(one, device) * 1e6 for one in (ours, call))
                rows.append(
                    {
                        "type": str(dtype).removeprefix("torch."),
                        "N": n,
                        "K": k,
                        "tokens": tokens,
                        "ours_us": ours_us,
                        "dense": peer,
                        "dense_us": dense_us,
                        "ratio": dense_us / ours_us,
                        "TB/s": (weight.nbytes + meta.nbytes + x.nbytes + 2 * tokens * n)
                        / ours_us
                        / 1e6,
                        "TFLOP/s": 2 * n * k * tokens / ours_us / 1e6,
                        "error": error,
                        "tile": "x".join(map(str, variant.tile))
                        + f" cluster {variant.cluster[0]}x{variant.cluster[1]} {variant.schedule}",
                    }
                )
    return rows


def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    rows = measure(device)
    print(f"{torch.cuda.get_device_name(device)}, copy {ceilings(device)[0] / 1e12:.2f} TB/s")
    print("| type | N x K | tokens | ours us | dense us | ratio | TB/s | TFLOP/s | error | tile |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['type']} | {row['N']} x {row['K']} | {row['tokens']} | {row['ours_us']:.1f} "
            f"| {row['dense_us']:.1f} ({row['dense']}) | {row['ratio']:.2f} | {row['TB/s']:.2f} "
            f"| {row['TFLOP/s']:.0f} | {row['error']:.1e} | {row['tile']} |"
        )


if __name__ == "__main__":
    main()
