"""The INT4 kernels (G = 128, bf16) beside vLLM's Marlin and Machete, cuBLAS and the floor.

    python tests/bench/bench_int4.py

Every kernel multiplies the same weight, in its own layout, and is first compared with the product
of the dense weight. Times are medians in us, each call a CUDA graph with a cold L2 cache; ``floor``
is the larger of bytes over a copy's bandwidth and operations over the bf16 rate of a large product,
all of the same run. vLLM's columns are there where its compiled ops are (0.20 to 0.26).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from printing import print_table

from ctconvert import layouts
from ctconvert.runtime.benchmark import ceilings, median_seconds
from ctconvert.runtime.kernels.marlin.kernel import marlin_gemm
from ctconvert.runtime.kernels.wna16.kernel import wna16_gemm
from ctconvert.specs import QuantizedWeight, WeightSpec
from ctconvert.transforms.dense import dense_weight

SHAPES = ((4096, 4096), (4096, 28672), (14336, 4096), (8192, 8192))  # K, N
TOKENS = (1, 16, 32, 64, 128, 192, 256, 512, 1024, 2048, 4096)
GROUP = 128
TOLERANCE = 5e-3
Gemm = Callable[[torch.Tensor], torch.Tensor]


def weight_of(n: int, k: int, device: torch.device) -> QuantizedWeight:
    """Random symmetric codes and scales."""
    spec = WeightSpec(
        format="pack-quantized",
        family="wna16",
        kind="int",
        bits=4,
        n=n,
        k=k,
        storage="packed",
        strategy="group",
        group_size=GROUP,
        scale_dtype="BF16",
        scale_shape=(n, k // GROUP),
    )
    codes = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int32, device=device)
    scale = (torch.rand(n, k // GROUP, device=device) / 100 + 0.005).bfloat16()
    return QuantizedWeight(spec, codes, scale)


def vllms_gemms(n: int, k: int, made: dict[str, dict[str, torch.Tensor]]) -> dict[str, Gemm]:
    """Of vLLM's ops those that are there."""
    try:
        from ctconvert.integrations.vllm.engine import base, marlin
    except ImportError:
        return {}
    gemms: dict[str, Gemm] = {}
    if (found := marlin._gemm()) is not None:
        op, names = found
        held = made["marlin"]
        given = {
            "c": None,
            "b_q_weight": held["qweight"],
            "b_scales": held["scales"],
            "workspace": marlin.locks(held["qweight"].device),
            "b_type_id": marlin.scalar_type("uint4b8"),
            "b_q_type_id": marlin.scalar_type("uint4b8"),
            "size_n": n,
            "size_k": k,
            "is_k_full": True,
            "use_atomic_add": False,
            "use_fp32_reduce": True,
            "is_zp_float": False,
        }

        def multiply(x: torch.Tensor) -> torch.Tensor:
            values = given | {"a": x, "size_m": len(x)}
            return op(*(values.get(name) for name in names))

        gemms["vLLM Marlin"] = multiply
    if (machete := base.op("machete_mm")) is not None:
        held = made["machete"]
        number = marlin.scalar_type("uint4b8")
        rest = (number, None, held["scales"], None, GROUP, None, None, None)
        gemms["vLLM Machete"] = lambda x: machete(x, held["qweight"], *rest)
    return gemms


def measure(device: torch.device) -> list[dict[str, Any]]:
    """One row for each shape and number of tokens.

    Raises:
        AssertionError: a result is wrong.
    """
    bandwidth, rate = ceilings(device)
    rows = []
    for k, n in SHAPES:
        weight = weight_of(n, k, device)
        dense = dense_weight(weight).bfloat16().t()
        made = {}
        for name in ("triton-wna16", "marlin", "machete"):
            layout = layouts.get(name)
            assert layout is not None
            made[name] = dict(layout.encode(weight))
        shape = {"bits": 4, "group_size": GROUP}
        gemms: dict[str, Gemm] = {
            "triton-wna16": partial(_on, wna16_gemm, made["triton-wna16"], shape),
            "marlin": partial(_on, marlin_gemm, made["marlin"], shape | {"n": n, "k": k}),
        }
        gemms |= vllms_gemms(n, k, made) | {"cuBLAS": lambda x, w=dense: torch.mm(x, w)}
        for m in TOKENS:
            x = torch.randn(m, k, device=device).bfloat16()
            wanted = torch.mm(x, dense).float()
            row: dict[str, Any] = {"K x N": f"{k} x {n}", "M": m}
            for name, gemm in gemms.items():
                error = float((gemm(x).float() - wanted).norm() / wanted.norm())
                assert error < TOLERANCE, f"{name} {k} x {n} x {m}: error {error:.1e}"
                row[name] = round(median_seconds(partial(gemm, x), device) * 1e6, 1)
            moved = n * k // 2 + 2 * n * k // GROUP + 2 * m * (k + n)
            row["floor"] = round(max(moved / bandwidth, 2 * m * n * k / rate) * 1e6, 1)
            rows.append(row)
    return rows


def _on(
    gemm: Callable[..., torch.Tensor],
    held: dict[str, torch.Tensor],
    shape: dict[str, int],
    x: torch.Tensor,
) -> torch.Tensor:
    return gemm(x, held["qweight"], held["scales"], **shape)


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    print_table(measure(torch.device("cuda")))
