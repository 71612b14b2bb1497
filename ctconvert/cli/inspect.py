"""``ctconvert inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctconvert.cli.failures import failures
from ctconvert.cli.options import Dtype, Json, Model, targets
from ctconvert.cli.sink import Sink
from ctconvert.cli.text import collapse, shape_text, size

if TYPE_CHECKING:
    from ctconvert.planning.inspection import InspectedModule, Inspection


def inspect(
    model: Model,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="Also say what each module would become for it.",
            autocompletion=targets,
        ),
    ] = None,
    dtype: Dtype = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write a page that shows it, layer by layer."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw it, .png, .svg or .pdf; by matplotlib."),
    ] = None,
    json_: Json = False,
) -> None:
    """Show what is in a checkpoint: schemes by module, sizes, oddities."""
    sink = Sink(json_)
    with failures(sink):
        from ctconvert import api

        if html is not None:
            from ctconvert.store.places import check_file

            check_file(html, "--html", (".html", ".htm"))
        if plot is not None:
            from ctconvert.runtime.chart import check_plot

            check_plot(plot)
        found = api.inspect(model, target=target, dtype=dtype)
        sink.show(found, _print)
        if html is not None:
            from ctconvert.cli.report.page import page

            html.write_text(page(found), encoding="utf-8", errors="backslashreplace")
        if plot is not None:
            from ctconvert.cli.report.picture import draw

            draw(found, plot)


def _print(sink: Sink, found: Inspection) -> None:
    version = found.compressed_tensors_version
    kind = f"kernel-ready for {found.target}" if found.converted else found.format
    sink.line(
        f"{found.model}: {', '.join(found.architectures) or '?'}, {kind}"
        + (f" (compressed-tensors {version})" if version else "")
    )
    sink.line(
        f"{len(found.modules)} quantised modules, {size(found.quantised_bytes)} of "
        f"{size(found.bytes)} in {len(found.shards)} file(s); "
        f"{found.unquantised_tensors} tensors are not quantised"
    )
    sink.line()
    columns = ["module", "format", "weights", "N x K"]
    columns += [f"for {found.target}"] if found.target else []
    rows = [(module.name, _cells(module, found.target)) for module in found.modules]
    sink.table([*columns, "count"], collapse(rows))
    sink.notes(found.oddities)


def _cells(module: InspectedModule, target: str | None) -> tuple[str, ...]:
    shape = shape_text(module.shape, module.experts)
    if target is not None:
        made = module.layout or f"none: {module.refused}"
        return module.format, module.weights, shape, made
    if module.unsupported:
        shape += f" ({module.unsupported})"
    return module.format, module.weights, shape
