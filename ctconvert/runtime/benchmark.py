"""``bench``: how fast a checkpoint's kernels are, beside measured limits and a dense bf16 peer."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from msgspec import Struct

from ctconvert.errors import ConversionError, UsageError
from ctconvert.runtime import kernels
from ctconvert.runtime.kernels import Binding
from ctconvert.runtime.kernels.base import SPARSE
from ctconvert.runtime.loading import Loader
from ctconvert.runtime.modules import KernelEmbedding, KernelExperts, KernelLinear
from ctconvert.transforms.device import is_out_of_memory, on_device

#: Bytes of the largest bf16 table that a quantised embedding is compared with.
_LARGEST_TABLE = 4 << 30


def median_seconds(
    call: Callable[[], Any], device: torch.device, graph: bool = True, milliseconds: int = 100
) -> float:
    """The median time of a call, on a GPU without the host's part and with a cold L2 cache.

    On CUDA the call is captured in a graph, as serving engines run it, so that launching from
    Python is not what is measured; ``graph=False`` launches it. A GPU repeats it for about
    ``milliseconds``.
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

    # Events, the captured stream and the buffer that clears the cache are the current device's.
    with on_device(device):
        if graph and device.type == "cuda":
            call = _captured(call, device)
        median: float = do_bench(
            call, warmup=max(1, milliseconds // 4), rep=milliseconds, return_mode="median"
        )
    return median / 1e3


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
    size = 8192 if large else 512
    a = torch.randn((size, size), dtype=torch.bfloat16, device=device)
    b = torch.randn((size, size), dtype=torch.bfloat16, device=device)
    return copy, 2 * size**3 / median_seconds(partial(torch.matmul, a, b), device)


def eight_bit_rate(kind: str, device: torch.device) -> float | None:
    """Measured flop/s of a large dense matmul in ``int8`` or ``fp8``.

    Returns:
        None where there is none to measure: off CUDA; fp8 on AMD GPUs and before SM89.
    """
    if device.type != "cuda":
        return None
    size = 8192
    calls: list[Callable[[], Any]]
    if kind == "int8":
        from ctconvert.runtime.kernels.scaled_mm.kernel import scaled_mm

        a, b = torch.randint(-127, 128, (2, size, size), dtype=torch.int8, device=device)
        one = torch.ones(1, device=device)
        # torch's writes i32 and is slower than ours on some GPUs; the faster is the limit.
        calls = [
            partial(torch._int_mm, a, b.t()),
            partial(scaled_mm, a, b, one, one, out_dtype=torch.bfloat16),
        ]
    else:
        if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
            return None
        a, b = torch.randn((2, size, size), dtype=torch.bfloat16, device=device).to(
            torch.float8_e4m3fn
        )
        one = torch.ones((), device=device)
        product = partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=True)
        calls = [partial(product, a, b.t(), one, one)]
    return 2 * size**3 / min(median_seconds(call, device) for call in calls)


def product_of(binding: Binding, device: torch.device) -> str | None:
    """The type that a module's kernel multiplies in, which sets the flop/s it can reach.

    Returns:
        what :class:`~ctconvert.runtime.kernels.Kernel` says of products.
    """
    product = kernels.get(binding.layout, binding.spec).product(binding.spec)
    # No kernel runs on a CPU; torch computes the references densely.
    return product and "bf16" if device.type == "cpu" else product


@dataclass(frozen=True)
class Limits:
    """Measured limits of a device: bytes/s of a copy, flop/s of a dense matmul by its type."""

    copy: float
    matmul: Mapping[str, float]

    @classmethod
    def measure(cls, device: torch.device, products: set[str]) -> Limits:
        copy, rate = ceilings(device)
        matmul = {"bf16": rate}
        for kind in sorted({product.removesuffix(SPARSE) for product in products} - {"bf16"}):
            if found := eight_bit_rate(kind, device):
                matmul[kind] = found
        return cls(copy, matmul)

    def flops(self, product: str | None) -> float | None:
        """The flop/s limit of a product; None where there is none, or none could be measured."""
        if product is None:
            return None
        rate = self.matmul.get(product.removesuffix(SPARSE))
        return 2 * rate if rate and product.endswith(SPARSE) else rate


@contextmanager
def _enough_memory(name: str, m: int, columns: int, device: torch.device) -> Iterator[None]:
    """Says of which M there is too much; ``columns`` are those of inputs and outputs."""
    try:
        if 2 * m * columns > sys.maxsize:
            raise MemoryError
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "a smaller --m" + ("" if device.type == "cpu" else " or --device cpu")
        raise ConversionError(
            f"{name} with M = {m}: out of memory on {device}; use {advice}"
        ) from None


class BenchRow(Struct, frozen=True):
    """One shape and M: ``module`` is the first of that shape.

    ``flops`` are flop/s, ``intensity`` flop per byte, ``product`` what it multiplies in (see
    :func:`product_of`) and ``product_flops`` the limit of that, twice the dense one for 2:4, None
    where none was measured; all are None for embeddings. ``floor_seconds`` is the roofline's, of
    bytes alone where there is no ``product_flops``; ``dense_seconds`` a bf16 matmul of the shape,
    or a look-up in a bf16 table (None where that takes more than 4 GiB, and for stacked experts).
    ``plain``: a path in plain torch ran, its kernel being none of those here.
    """

    layout: str
    weights: str
    module: str
    n: int
    k: int
    m: int
    seconds: float
    bytes_per_second: float
    flops: float | None
    intensity: float | None
    product: str | None
    product_flops: float | None
    floor_seconds: float
    dense_seconds: float | None
    plain: bool = False


class BenchReport(Struct, frozen=True):
    """A device's name, its measured limits, the matmul's by type, and what the kernels took.

    The types are ``bf16``, and ``int8`` and ``fp8`` where modules multiply in them and they can be
    measured. ``without_kernel`` are the layouts of modules that no kernel here runs.
    """

    device: str
    copy_bytes_per_second: float
    matmul_flops: dict[str, float]
    rows: list[BenchRow]
    without_kernel: tuple[str, ...] = ()


def bench(out: Path, device: str, rows: tuple[int, ...]) -> BenchReport:
    """Times the kernel of every distinct shape of a converted checkpoint, one module at a time.

    Args:
        out: a converted checkpoint.
        device: where the kernels run.
        rows: the numbers M of tokens, or of rows looked up, to time.

    Raises:
        UsageError: there is no such directory or device, nothing in it was converted, or
            no kernel here runs any of it.
        VerificationError: the manifest is damaged or does not fit the files.
        ConversionError: an M takes more memory than the device has.
    """
    measured: list[BenchRow] = []
    with Loader(out, device) as loader:
        chosen: list[str] = []
        missing: list[str] = []
        for whole in _distinct(loader.bindings):
            bound = loader.bindings[whole]
            run = kernels.find(bound.layout, bound.spec) is not None
            (chosen if run else missing).append(whole)
        if missing and not chosen:
            bound = loader.bindings[missing[0]]
            kernels.get(bound.layout, bound.spec)  # says that there is none
        if not chosen:
            raise UsageError(f"{out}: holds no converted module, so there is no kernel to time")
        products = {product_of(loader.bindings[whole], loader.device) for whole in chosen}
        limits = Limits.measure(loader.device, {p for p in products if p is not None})
        for whole in chosen:
            modules = loader.modules(whole)
            name, module = next(iter(modules.items()))
            if isinstance(module, KernelEmbedding):
                measured += _bench_embedding(name, module, rows, loader.device, limits)
            elif isinstance(module, KernelLinear):
                measured += _bench_linear(name, module, rows, loader.device, limits)
            if isinstance(stack := modules.get(whole), KernelExperts):
                measured += _bench_experts(whole, stack, rows, loader.device, limits)
    rates, unrun = dict(limits.matmul), {loader.bindings[whole].layout for whole in missing}
    return BenchReport(
        device_name(loader.device), limits.copy, rates, measured, tuple(sorted(unrun))
    )


def _distinct(bindings: Mapping[str, Binding]) -> list[str]:
    """The first module of every layout, shape and kind of weight."""
    first: dict[tuple[Any, ...], str] = {}
    for name, binding in bindings.items():
        spec = binding.spec
        first.setdefault((binding.layout, spec.n, spec.k, spec.label), name)
    return list(first.values())


def _bench_linear(
    name: str, module: KernelLinear, rows: tuple[int, ...], device: torch.device, limits: Limits
) -> list[BenchRow]:
    spec = module.binding.spec
    dense = torch.randn((spec.k, spec.n), dtype=torch.bfloat16, device=device)
    weight_bytes = module.read_bytes
    measured = []
    for m in rows:
        with _enough_memory(name, m, spec.k + spec.n, device):
            x = torch.randn((m, spec.k), dtype=module.activation_dtype, device=device)
            seconds = median_seconds(partial(module, x), device)
            plain = median_seconds(partial(torch.matmul, x.bfloat16(), dense), device)
        moved = weight_bytes + 2 * m * (spec.k + spec.n)
        flops = 2 * m * spec.n * spec.k
        measured.append(_row(name, module, m, seconds, plain, moved, flops, device, limits))
    return measured


def _bench_experts(
    name: str, stack: KernelExperts, rows: tuple[int, ...], device: torch.device, limits: Limits
) -> list[BenchRow]:
    """M rows shared out evenly; experts that have none are not read."""
    spec, experts = stack.binding.spec, stack.experts
    measured = []
    for m in rows:
        with _enough_memory(name, m, spec.k + spec.n, device):
            x = torch.randn((m, spec.k), dtype=stack.activation_dtype, device=device)
            places = torch.arange(m, dtype=torch.int32, device=device)
            offsets = torch.arange(experts + 1, device=device) * m // experts
            seconds = median_seconds(partial(stack, x, places, offsets.int()), device)
        moved = stack.read_bytes * min(m, experts) // experts + 2 * m * (spec.k + spec.n)
        flops = 2 * m * spec.n * spec.k
        measured.append(_row(name, stack, m, seconds, None, moved, flops, device, limits))
    return measured


def _bench_embedding(
    name: str, module: KernelEmbedding, rows: tuple[int, ...], device: torch.device, limits: Limits
) -> list[BenchRow]:
    spec = module.binding.spec
    tensors = module.tensors()
    row_bytes = sum(tensor.nbytes for tensor in tensors.values()) // spec.n
    out_bytes = spec.k * tensors["weight_scale"].element_size()
    table = None
    if 2 * spec.n * spec.k <= _LARGEST_TABLE:
        table = torch.ones((spec.n, spec.k), dtype=torch.bfloat16, device=device)
    measured = []
    for m in rows:
        with _enough_memory(name, m, 4 + spec.k, device):
            # No row twice before all have been read, so that the bytes are those of min(M, N).
            ids = torch.randperm(spec.n, device=device).repeat(-(-m // spec.n))[:m]
            seconds = median_seconds(partial(module, ids), device)
            plain = None
            if table is not None:
                plain = median_seconds(partial(F.embedding, ids, table), device)
        moved = min(m, spec.n) * row_bytes + m * (ids.element_size() + out_bytes)
        measured.append(_row(name, module, m, seconds, plain, moved, None, device, limits))
    return measured


def _row(
    name: str,
    module: KernelLinear | KernelEmbedding | KernelExperts,
    m: int,
    seconds: float,
    dense_seconds: float | None,
    moved: int,
    flops: int | None,
    device: torch.device,
    limits: Limits,
) -> BenchRow:
    binding = module.binding
    product = product_of(binding, device)
    limit = limits.flops(product)
    floor = moved / limits.copy
    if flops is not None and limit is not None:
        floor = max(floor, flops / limit)
    return BenchRow(
        layout=binding.layout + (" grouped" if isinstance(module, KernelExperts) else ""),
        weights=binding.spec.label,
        module=name,
        n=binding.spec.n,
        k=binding.spec.k,
        m=m,
        seconds=seconds,
        bytes_per_second=moved / seconds,
        flops=None if flops is None else flops / seconds,
        intensity=None if flops is None else flops / moved,
        product=product,
        product_flops=limit,
        floor_seconds=floor,
        dense_seconds=dense_seconds,
        plain=module.kernel.plain,
    )


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cpu":
        return "cpu"
    return str(getattr(torch, device.type).get_device_name(device))
