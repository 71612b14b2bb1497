"""``bench``: how fast a checkpoint's kernels are, beside the roofline and a dense matmul."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ctconvert.runtime.loading import Loader
from ctconvert.runtime.modules import KernelLinear


def median_seconds(call: Callable[[], Any], device: torch.device, graph: bool = True) -> float:
    """The median time of a call, on a GPU without the host's part and with a cold L2 cache.

    On CUDA the call is captured in a graph, as serving engines run it, so that launching from
    Python is not what is measured; ``graph=False`` launches it.
    """
    if device.type == "cpu":
        call()
        runs = []
        for _ in range(5):
            begin = time.perf_counter()
            call()
            runs.append(time.perf_counter() - begin)
        return statistics.median(runs)
    from triton.testing import do_bench

    if graph and device.type == "cuda":
        call = _captured(call, device)
    milliseconds: float = do_bench(call, return_mode="median")
    return milliseconds / 1e3


def _captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and picks what is measured
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def ceilings(device: torch.device) -> tuple[float, float]:
    """Measured limits: bytes/s of a device copy (read + written), flop/s of a bf16 matmul."""
    large = device.type != "cpu"
    source = torch.empty((1 << 30) if large else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Not in a graph, where a copy becomes a node of another kind, which is slower.
    copy = 2 * source.nbytes / median_seconds(partial(target.copy_, source), device, graph=False)
    del source, target
    size = 8192 if large else 1024
    a = torch.randn((size, size), dtype=torch.bfloat16, device=device)
    b = torch.randn((size, size), dtype=torch.bfloat16, device=device)
    return copy, 2 * size**3 / median_seconds(partial(torch.matmul, a, b), device)


def bench(out: Path, device: str, rows: tuple[int, ...]) -> dict[str, Any]:
    """Times the kernel of every distinct shape of a converted checkpoint, one module at a time.

    Args:
        out: a converted checkpoint.
        device: where the kernels run.
        rows: the numbers of tokens M to time.

    Returns:
        the device's measured limits and a row for each shape and M: seconds, achieved bytes/s and
        flop/s, the roofline's floor in seconds, and the time of a dense bf16 matmul of that shape.
    """
    measured = []
    with Loader(out, device) as loader:
        limits = ceilings(loader.device)
        seen = set()
        for whole, binding in loader.bindings.items():
            spec = binding.spec
            key = (binding.layout, spec.n, spec.k, spec.label)
            if spec.embedding or key in seen:
                continue
            seen.add(key)
            name, module = next(iter(loader.modules(whole).items()))
            assert isinstance(module, KernelLinear)
            measured += _bench_linear(name, module, rows, loader.device, limits)
    return {
        "device": _name(loader.device),
        "copy_bytes_per_second": limits[0],
        "matmul_flops": limits[1],
        "rows": measured,
    }


def _bench_linear(
    name: str,
    module: KernelLinear,
    rows: tuple[int, ...],
    device: torch.device,
    limits: tuple[float, float],
) -> list[dict[str, Any]]:
    spec = module.binding.spec
    dense = torch.randn((spec.k, spec.n), dtype=torch.bfloat16, device=device)
    dtype = torch.float16 if "F16" in (spec.scale_dtype, spec.element) else torch.bfloat16
    weight_bytes = sum(tensor.nbytes for tensor in module.tensors().values())
    measured = []
    for m in rows:
        x = torch.randn((m, spec.k), dtype=dtype, device=device)
        seconds = median_seconds(partial(module, x), device)
        plain = median_seconds(partial(torch.matmul, x.bfloat16(), dense), device)
        moved = weight_bytes + 2 * m * (spec.k + spec.n)
        flops = 2 * m * spec.n * spec.k
        measured.append(
            {
                "layout": module.binding.layout,
                "weights": spec.label,
                "module": name,
                "n": spec.n,
                "k": spec.k,
                "m": m,
                "seconds": seconds,
                "bytes_per_second": moved / seconds,
                "flops": flops / seconds,
                "intensity": flops / moved,
                "floor_seconds": max(moved / limits[0], flops / limits[1]),
                "dense_seconds": plain,
            }
        )
    return measured


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return str(getattr(torch, device.type).get_device_name(device))


def plot(result: dict[str, Any], path: Path) -> None:
    """A roofline chart: each kernel's flop/s over its intensity, under the measured limits.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        from ctconvert.errors import UsageError

        raise UsageError("--plot needs matplotlib: pip install 'ctconvert[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    copy, matmul = result["copy_bytes_per_second"], result["matmul_flops"]
    low = min([row["intensity"] for row in rows], default=1.0) / 2
    high = max([row["intensity"] for row in rows] + [4 * matmul / copy])
    figure, axes = pyplot.subplots(figsize=(9, 6))
    steps = [low * (high / low) ** (i / 200) for i in range(201)]
    axes.loglog(steps, [min(copy * x, matmul) / 1e12 for x in steps], color="black")
    for layout in dict.fromkeys(row["layout"] for row in rows):
        chosen = [row for row in rows if row["layout"] == layout]
        axes.scatter(
            [row["intensity"] for row in chosen],
            [row["flops"] / 1e12 for row in chosen],
            label=layout,
        )
    axes.set_xlabel("flop per byte moved")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(
        f"{result['device']}: copy {copy / 1e12:.2f} TB/s, bf16 {matmul / 1e12:.0f} TFLOP/s"
    )
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
