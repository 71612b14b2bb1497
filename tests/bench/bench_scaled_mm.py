"""W8A8 matmul: the op, its Triton kernel and torch's own product, and the dynamic quantisation.

    python tests/bench/bench_scaled_mm.py

The choice between Triton and torch in ``runtime/kernels/scaled_mm/triton.py`` rests on this table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from printing import print_table

from ctconvert.runtime.benchmark import median_seconds
from ctconvert.runtime.kernels.quantize.kernel import quantize_per_token
from ctconvert.runtime.kernels.scaled_mm import triton
from ctconvert.runtime.kernels.scaled_mm.kernel import scaled_mm
from ctconvert.runtime.kernels.scaled_mm.reference import scaled_mm_reference

SHAPES = [(4096, 4096), (8192, 8192), (4096, 14336)]  # (N, K)
TOKENS = [1, 16, 64, 256, 1024, 4096]
CHECKED_ROWS = 256
NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "f8"}


def _us(call: Callable[[], Any], device: torch.device) -> float:
    return median_seconds(call, device) * 1e6


def torch_product(
    x_q: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor | None:
    """torch's product of the same operands; for int8 without its scales. None: it takes none."""
    if weight.dtype == torch.int8:
        return torch._int_mm(x_q, weight.t()) if x_q.shape[0] > 16 else None
    return torch._scaled_mm(
        x_q,
        weight.t(),
        scale_a=x_scale,
        scale_b=weight_scale.reshape(1, -1),
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )


def measure(device: torch.device) -> list[dict[str, Any]]:
    """One row for each case; raises if a case is not near the reference."""
    torch.manual_seed(0)
    rows = []
    for dtype, (n, k), m in ((d, s, m) for d in NAMES for s in SHAPES for m in TOKENS):
        dense = torch.randn(n, k, device=device)
        weight, weight_scale = quantize_per_token(dense, dtype)
        x = torch.randn(m, k, device=device).bfloat16()
        x_q, x_scale = quantize_per_token(x, dtype)
        operands = (x_q, weight, x_scale, weight_scale)
        out_dtype = torch.bfloat16
        config = triton._choose(m, n, k, dtype == torch.int8, False, x.device)
        # Of many rows only some: the reference's int8 product is a float64 one.
        some = torch.linspace(0, m - 1, min(m, CHECKED_ROWS), device=device).long()
        expected = scaled_mm_reference(
            x_q[some], weight, x_scale[some], weight_scale, out_dtype=torch.float32
        )
        for out in (
            scaled_mm(*operands, out_dtype=out_dtype),
            triton.scaled_mm(*operands, out_dtype=out_dtype, config=config),
        ):
            if out.shape != (m, n):
                raise AssertionError(f"{NAMES[dtype]} {m} x {n} x {k}: shape {list(out.shape)}")
            error = float((out[some].float() - expected).norm() / expected.norm())
            if not error < 4e-3:
                raise AssertionError(f"{NAMES[dtype]} {m} x {n} x {k}: error {error}")
        us = _us(partial(scaled_mm, *operands, out_dtype=out_dtype), device)
        forced = partial(triton.scaled_mm, *operands, out_dtype=out_dtype, config=config)
        has_torch = torch_product(*operands) is not None
        torch_us = _us(partial(torch_product, *operands), device) if has_torch else None
        quantise_us = _us(partial(quantize_per_token, x, dtype), device)
        rows.append(
            {
                "type": NAMES[dtype],
                "N x K": f"{n} x {k}",
                "M": m,
                "op us": round(us, 1),
                "Triton us": round(_us(forced, device), 1),
                "torch us": "" if torch_us is None else round(torch_us, 1),
                "TB/s": round((n * k + m * k + 2 * m * n) / us / 1e6, 2),
                "TFLOP/s": round(2 * m * n * k / us / 1e6, 1),
                "quantise us": round(quantise_us, 1),
                "quantise TB/s": round(3 * m * k / quantise_us / 1e6, 2),
            }
        )
    return rows


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    print_table(measure(torch.device("cuda")))
