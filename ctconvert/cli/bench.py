"""``ctconvert bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctconvert.cli.failures import failures
from ctconvert.cli.options import Json, KernelDevice, Out, directories, parse_counts
from ctconvert.cli.sink import Sink
from ctconvert.errors import UsageError

if TYPE_CHECKING:
    from ctconvert.runtime.benchmark import BenchReport, BenchRow
    from ctconvert.runtime.loadtime import LoadReport


def bench(
    out: Out,
    device: KernelDevice = "auto",
    m: Annotated[
        str,
        typer.Option("--m", help="Numbers of tokens, or rows looked up, separated by commas."),
    ] = "1,16,256,4096",
    load: Annotated[
        bool, typer.Option("--load", help="Time loading it instead, against its source.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="With --load: what it was made from, a directory or org/name[@revision].",
            autocompletion=directories,
        ),
    ] = None,
    json_: Json = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", help="Write a roofline chart, .png, .svg or .pdf; by matplotlib."
        ),
    ] = None,
) -> None:
    """Time a checkpoint's kernels beside measured limits.

    A dense bf16 matmul, or look-up, of the same shape is timed beside each. The floor is bytes at
    a copy's rate or flops at a matmul's, whichever is slower. With --load, loading OUT is timed
    beside loading MODEL and the transforms that an engine then does, in plain torch.
    """
    sink = Sink(json_)
    with failures(sink, device):
        from ctconvert.work.importing import load_torch

        if load != (against is not None):
            raise UsageError("--load and --against MODEL go together: it is timed against that")
        if against is not None:
            if plot is not None:
                raise UsageError("--plot draws kernels' times, and --load measures none")
            load_torch()
            from ctconvert.runtime.loadtime import bench_load

            sink.show(bench_load(out, against, device), _print_load)
            return
        rows = parse_counts(m)
        load_torch()
        from ctconvert.runtime import benchmark, chart

        if plot is not None:
            chart.check_plot(plot)
        found = benchmark.bench(out, device, rows)
        sink.show(found, _print)
        if plot is not None:
            chart.plot(found, plot)


def _print_load(sink: Sink, found: LoadReport) -> None:
    modules = ", ".join(f"{count} x {layout}" for layout, count in found.modules.items())
    sink.line(f"{found.device}: {modules}; medians of {found.rounds}, every tensor equal")
    rows = (
        ("source, read", found.source_bytes, found.read_seconds),
        ("source, transformed", None, found.transform_seconds),
        ("source, both", found.source_bytes, found.source_seconds),
        ("converted", found.bytes, found.seconds),
    )
    sink.table(
        ["loading", "GB", "s", "GB/s", "of the converted's"],
        [
            (
                what,
                _number(size and size / 1e9, 2),
                _number(seconds, 3),
                _number(size and size / seconds / 1e9, 2),
                _number(seconds / found.seconds, 2),
            )
            for what, size, seconds in rows
        ],
    )
    sink.line("note: the transforms are in plain torch; an engine may have kernels for them")
    for layout, count in found.left_out.items():
        sink.line(f"note: {count} x {layout} left out: an engine's transforms are not known here")


def _print(sink: Sink, found: BenchReport) -> None:
    limits = ", ".join(
        f"{kind} matmul {rate / 1e12:.2f} TFLOP/s" for kind, rate in found.matmul_flops.items()
    )
    copy = found.copy_bytes_per_second / 1e12
    sink.line(f"{found.device}: copy {copy:.3f} TB/s, {limits}, measured now")
    columns = ["layout", "weights", "N x K", "M", "us", "TB/s", "TFLOP/s", "in", "floor us"]
    sink.table([*columns, "dense us", "dense/ours"], map(_cells, found.rows))
    for layout in dict.fromkeys(row.layout for row in found.rows if row.plain):
        sink.line(f"note: {layout} is a path in plain torch here, not the kernel that serves it")
    for layout in found.without_kernel:
        sink.line(f"note: no kernel here runs some modules of layout {layout}; they were not timed")
    products = {row.product: row.product_flops for row in found.rows}
    for product, limit in products.items():
        if product is None:
            sink.line(
                "note: an embedding multiplies nothing: M rows are looked up, its floor is of "
                "bytes alone, dense is a bf16 table"
            )
        elif limit is None:
            sink.line(
                f"note: no {product} limit can be measured here; those floors are of bytes alone"
            )
        elif product.endswith("2:4"):
            sink.line(
                f"note: the {product} limit is {limit / 1e12:.2f} TFLOP/s, twice the dense one"
            )


def _cells(row: BenchRow) -> tuple[object, ...]:
    seconds, flops, dense = row.seconds, row.flops, row.dense_seconds
    return (
        row.layout,
        row.weights,
        f"{row.n}x{row.k}",
        row.m,
        _number(seconds * 1e6, 1),
        _number(row.bytes_per_second / 1e12, 3),
        _number(flops and flops / 1e12, 2),
        row.product or "",
        _number(row.floor_seconds * 1e6, 1),
        _number(dense and dense * 1e6, 1),
        _number(dense and dense / seconds, 2),
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
