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

from ctconvert.device import is_out_of_memory, on_device
from ctconvert.errors import ConversionError, UsageError
from ctconvert.runtime.bindings import Binding
from ctconvert.runtime.loading import Loader
from ctconvert.runtime.modules import KernelEmbedding, KernelLinear

#: What :func:`plot` writes, by the file's suffix.
CHARTS = (".png", ".svg", ".pdf")
#: Ends the name of a 2:4 sparse product, as in ``int8 2:4``: twice the rate of the dense one.
_SPARSE = " 2:4"
#: Bytes of the largest bf16 table that a quantised embedding is compared with.
_LARGEST_TABLE = 4 << 30


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

    # Events, the captured stream and the buffer that clears the cache are the current device's.
    with on_device(device):
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
        from ctconvert.runtime.kernels.scaled_mm import scaled_mm

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
        ``bf16`` (which stands for f16 too), ``int8`` or ``fp8``, with `` 2:4`` where the kernel
        skips the zeros of a sparse weight; None for a look-up, which multiplies nothing.
    """
    spec = binding.spec
    if spec.embedding:
        return None
    if device.type == "cpu":
        return "bf16"  # no kernel runs there; torch computes the references densely
    sparse = binding.layout == "cutlass-sparse24"
    quantised = {
        "cutlass-sparse24": spec.scale_shape is not None,
        "scaled-mm": spec.input_type is not None,
        "xpu-w4a8": True,
    }.get(binding.layout, False)
    kind = "bf16"
    if quantised:
        kind = "int8" if spec.kind == "int" else "fp8"
    return kind + _SPARSE if sparse else kind


@dataclass(frozen=True)
class Limits:
    """Measured limits of a device: bytes/s of a copy, flop/s of a dense matmul by its type."""

    copy: float
    matmul: Mapping[str, float]

    @classmethod
    def measure(cls, device: torch.device, products: set[str]) -> Limits:
        copy, rate = ceilings(device)
        matmul = {"bf16": rate}
        for kind in sorted({product.removesuffix(_SPARSE) for product in products} - {"bf16"}):
            if found := eight_bit_rate(kind, device):
                matmul[kind] = found
        return cls(copy, matmul)

    def flops(self, product: str | None) -> float | None:
        """The flop/s limit of a product; None where there is none, or none could be measured."""
        if product is None:
            return None
        rate = self.matmul.get(product.removesuffix(_SPARSE))
        return 2 * rate if rate and product.endswith(_SPARSE) else rate


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


def bench(out: Path, device: str, rows: tuple[int, ...]) -> dict[str, Any]:
    """Times the kernel of every distinct shape of a converted checkpoint, one module at a time.

    Args:
        out: a converted checkpoint.
        device: where the kernels run.
        rows: the numbers M of tokens, or of rows looked up, to time.

    Returns:
        ``device``: its name; ``copy_bytes_per_second`` and ``matmul_flops``, its measured limits,
        the latter by type: ``bf16``, and ``int8`` and ``fp8`` where modules multiply in them and
        they can be measured; ``rows``, one for each shape and M:

        - ``layout``, ``weights``, ``module`` (the first of that shape), ``n``, ``k``, ``m``;
        - ``seconds``, ``bytes_per_second``, ``flops`` (flop/s), ``intensity`` (flop per byte);
        - ``product``: what it multiplies in, see :func:`product_of`; ``product_flops``: the flop/s
          limit of that, twice the dense one for 2:4, None where none was measured;
        - ``floor_seconds``: the roofline's, of bytes alone where ``product_flops`` is None;
        - ``dense_seconds``: a bf16 matmul of the shape, or a look-up in a bf16 table (None where
          that takes more than 4 GiB).

        ``flops``, ``intensity`` and the two of the product are None for embeddings.

    Raises:
        UsageError: there is no such directory or device, or nothing in it was converted.
        VerificationError: the manifest is damaged or does not fit the files.
        ConversionError: an M takes more memory than the device has.
    """
    measured = []
    with Loader(out, device) as loader:
        chosen = _distinct(loader.bindings)
        if not chosen:
            raise UsageError(f"{out}: holds no converted module, so there is no kernel to time")
        products = {product_of(loader.bindings[whole], loader.device) for whole in chosen}
        limits = Limits.measure(loader.device, {p for p in products if p is not None})
        for whole in chosen:
            name, module = next(iter(loader.modules(whole).items()))
            if isinstance(module, KernelEmbedding):
                measured += _bench_embedding(name, module, rows, loader.device, limits)
            else:
                measured += _bench_linear(name, module, rows, loader.device, limits)
    return {
        "device": _name(loader.device),
        "copy_bytes_per_second": limits.copy,
        "matmul_flops": dict(limits.matmul),
        "rows": measured,
    }


def _distinct(bindings: Mapping[str, Binding]) -> list[str]:
    """The first module of every layout, shape and kind of weight."""
    first: dict[tuple[Any, ...], str] = {}
    for name, binding in bindings.items():
        spec = binding.spec
        first.setdefault((binding.layout, spec.n, spec.k, spec.label), name)
    return list(first.values())


def _bench_linear(
    name: str, module: KernelLinear, rows: tuple[int, ...], device: torch.device, limits: Limits
) -> list[dict[str, Any]]:
    spec = module.binding.spec
    dense = torch.randn((spec.k, spec.n), dtype=torch.bfloat16, device=device)
    dtype = torch.float16 if "F16" in (spec.scale_dtype, spec.element) else torch.bfloat16
    weight_bytes = sum(tensor.nbytes for tensor in module.tensors().values())
    measured = []
    for m in rows:
        with _enough_memory(name, m, spec.k + spec.n, device):
            x = torch.randn((m, spec.k), dtype=dtype, device=device)
            seconds = median_seconds(partial(module, x), device)
            plain = median_seconds(partial(torch.matmul, x.bfloat16(), dense), device)
        moved = weight_bytes + 2 * m * (spec.k + spec.n)
        flops = 2 * m * spec.n * spec.k
        measured.append(_row(name, module, m, seconds, plain, moved, flops, device, limits))
    return measured


def _bench_embedding(
    name: str, module: KernelEmbedding, rows: tuple[int, ...], device: torch.device, limits: Limits
) -> list[dict[str, Any]]:
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
    module: KernelLinear | KernelEmbedding,
    m: int,
    seconds: float,
    dense_seconds: float | None,
    moved: int,
    flops: int | None,
    device: torch.device,
    limits: Limits,
) -> dict[str, Any]:
    binding = module.binding
    product = product_of(binding, device)
    limit = limits.flops(product)
    floor = moved / limits.copy
    if flops is not None and limit is not None:
        floor = max(floor, flops / limit)
    return {
        "layout": binding.layout,
        "weights": binding.spec.label,
        "module": name,
        "n": binding.spec.n,
        "k": binding.spec.k,
        "m": m,
        "seconds": seconds,
        "bytes_per_second": moved / seconds,
        "flops": None if flops is None else flops / seconds,
        "intensity": None if flops is None else flops / moved,
        "product": product,
        "product_flops": limit,
        "floor_seconds": floor,
        "dense_seconds": dense_seconds,
    }


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return str(getattr(torch, device.type).get_device_name(device))


def check_plot(path: Path) -> None:
    """Checks that :func:`plot` can write ``path``, before anything is measured for it.

    Raises:
        UsageError: its suffix is none of :data:`CHARTS`, it cannot be written, or matplotlib is
            not installed.
    """
    try:
        if path.is_dir():
            raise UsageError(f"--plot {path}: a directory; name a file in it")
        if path.suffix.lower() not in CHARTS:
            raise UsageError(f"--plot {path}: write a {', '.join(CHARTS)} file")
        new = not (path.exists() or path.is_symlink())
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise UsageError(f"--plot {path}: cannot be written: {error.strerror}") from None
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'ctconvert[plot]'") from None


def plot(result: dict[str, Any], path: Path) -> None:
    """A roofline chart: each kernel's flop/s over its intensity, under the measured limits.

    There is a roof for each type the kernels multiply in. Embeddings, which multiply nothing, are
    not in it.

    Args:
        result: what :func:`bench` returned.
        path: the file to write, replaced where it exists.

    Raises:
        UsageError: as :func:`check_plot`.
    """
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if row["product"] is not None]
    copy = result["copy_bytes_per_second"]
    roofs = {row["product"]: row["product_flops"] for row in rows if row["product_flops"]}
    roofs = roofs or {"bf16": result["matmul_flops"]["bf16"]}
    low = min([row["intensity"] for row in rows], default=1.0) / 2
    high = max([row["intensity"] for row in rows] + [4 * max(roofs.values()) / copy])
    figure, axes = pyplot.subplots(figsize=(9, 6))
    steps = [low * (high / low) ** (i / 200) for i in range(201)]
    styles = ("-", "--", "-.", ":")
    for index, (product, roof) in enumerate(roofs.items()):
        axes.loglog(
            steps,
            [min(copy * x, roof) / 1e12 for x in steps],
            color="black",
            linestyle=styles[index % len(styles)],
            label=f"{product} limit, {roof / 1e12:.2f} TFLOP/s",
        )
    for layout in dict.fromkeys(row["layout"] for row in rows):
        chosen = [row for row in rows if row["layout"] == layout]
        axes.scatter(
            [row["intensity"] for row in chosen],
            [row["flops"] / 1e12 for row in chosen],
            label=layout,
        )
    axes.set_xlabel("flop per byte moved")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{result['device']}: copy {copy / 1e12:.3f} TB/s")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
