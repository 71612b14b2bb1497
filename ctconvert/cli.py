"""The command line. Every failure ends in one line on stderr and a documented exit code."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctconvert import __version__
from ctconvert.errors import CtconvertError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from ctconvert.console import Output
    from ctconvert.planning import Plan

app = typer.Typer(
    name="ctconvert",
    help="Converts compressed-tensors checkpoints into kernel-ready ones, offline.\n\n"
    "Exit codes: 0 done, 1 the conversion or the verification failed, 2 bad usage or bad input, "
    "3 the target cannot take a module, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory, or a Hub id: org/name[@revision].")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Target = Annotated[
    str, typer.Option("--target", "-t", help="What the kernels run on: triton, cuda or xpu.")
]
Workers = Annotated[int | None, typer.Option(help="Threads that read, transform and write.")]


def _printable(text: str) -> str:
    """``text`` on one line; names from a checkpoint may hold anything, terminal codes included."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _out_of_memory(device: str) -> str:
    if device == "auto":
        from ctconvert.device import resolve

        device = str(resolve(device))
    advice = "free some, or use a machine with more" if device == "cpu" else "use --device cpu"
    return f"out of memory on {device}; {advice}"


@contextmanager
def _failures(device: str = "cpu") -> Iterator[None]:
    """Turns errors into one line and an exit code; ``device`` is what may run out of memory."""
    from ctconvert.console import print_error

    try:
        yield
    except UnsupportedError as error:  # one line a refusal
        print_error("\n".join(map(_printable, str(error).split("\n"))))
        raise typer.Exit(error.exit_code) from None
    except CtconvertError as error:
        print_error(_printable(str(error)))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print_error("interrupted")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads on; do not complain at exit
        raise typer.Exit(1) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print_error(_printable(f"{where}{error.strerror or error}"))
        raise typer.Exit(1) from None
    except (MemoryError, RuntimeError) as error:
        from ctconvert.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print_error(_out_of_memory(device))
        raise typer.Exit(1) from None


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"ctconvert {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name it cannot spell is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")


def parse_size(text: str) -> int:
    """Bytes of ``5GB``, ``500MB``, ``2GiB`` or a plain number.

    Raises:
        UsageError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise UsageError(f"{text!r} is no size; write for instance 5GB, 500MB or 2GiB")
    power = " KMGT".index(match[2].upper() or " ")
    count = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if count < 1:
        raise UsageError(f"{text!r}: a shard must hold at least one byte")
    return count


def parse_layouts(texts: list[str]) -> dict[str, str]:
    """``PATTERN=LAYOUT`` options as a dictionary, in order.

    Raises:
        UsageError: one has no ``=``.
    """
    found = {}
    for text in texts:
        pattern, equals, name = text.rpartition("=")
        if not equals or not pattern or not name:
            raise UsageError(f"--layout {text!r}: write it as PATTERN=LAYOUT")
        found[pattern] = name
    return found


@app.command()
def inspect(
    model: Model,
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="Also say what each module would become for it."),
    ] = None,
    json_: Json = False,
) -> None:
    """Show what is in a checkpoint: schemes by module, sizes, oddities."""
    with _failures():
        from ctconvert import api
        from ctconvert.console import Output, print_json

        found = api.inspect(model, target=target)
        if json_:
            print_json(found)
        else:
            _print_inspection(Output(), found)


def _print_notes(out: Output, notes: list[str]) -> None:
    from ctconvert.console import collapse

    for note, count in collapse((note, ()) for note in notes):
        out.line(f"note: {note}" + (f" ({count} times)" if count != "1" else ""))


def _print_inspection(out: Output, found: dict[str, Any]) -> None:
    from ctconvert.console import collapse, size

    version = found["compressed_tensors_version"]
    names = found["architectures"] or "?"  # of config.json, where anything may stand
    names = ", ".join(map(str, names)) if isinstance(names, list) else str(names)
    out.line(
        f"{found['model']}: {names}, {found['format']}"
        + (f" (compressed-tensors {version})" if version else "")
    )
    out.line(
        f"{len(found['modules'])} quantised modules, {size(found['quantised_bytes'])} of "
        f"{size(found['bytes'])} in {len(found['shards'])} file(s); "
        f"{found['unquantised_tensors']} tensors are not quantised"
    )
    out.line()
    columns = ["module", "format", "weights", "N x K"]
    columns += [f"for {found['target']}"] if found["target"] else []

    def row(module: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        shape = "x".join(map(str, module.get("shape", []))) or "?"
        if module.get("experts"):
            shape = f"{module['experts']} x {shape}"
        cells = [module["format"], module["weights"], shape]
        if found["target"]:
            cells.append(module["layout"] or f"none: {module['refused']}")
        elif "unsupported" in module:
            cells[-1] += f" ({module['unsupported']})"
        return module["name"], tuple(cells)

    out.table([*columns, "count"], collapse(map(row, found["modules"])))
    _print_notes(out, found["oddities"])


@app.command()
def repack(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="Directory to make; MODEL-TARGET beside MODEL."),
    ] = None,
    target: Target = ...,  # type: ignore[assignment]
    device: Annotated[
        str, typer.Option(help="Where transforms run: auto, cpu, cuda, cuda:1, xpu.")
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; read and write no weight data.")
    ] = False,
    json_: Json = False,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest output file; a module is never split.")
    ] = "5GB",
    workers: Workers = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a killed run from its finished shards.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing OUT.")
    ] = False,
    fuse: Annotated[
        bool, typer.Option("--fuse/--no-fuse", help="Join q/k/v and gate/up projections.")
    ] = False,
    keep_unsupported: Annotated[
        bool,
        typer.Option(
            "--keep-unsupported", help="Copy modules that no layout takes instead of refusing."
        ),
    ] = False,
    layout: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=LAYOUT", help="Layout for modules by glob or re:regex."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read the output back and check it.")
    ] = True,
) -> None:
    """Convert a compressed-tensors checkpoint into a kernel-ready one."""
    with _failures(device):
        from ctconvert import api
        from ctconvert.console import Output, ShownProgress, print_json, size

        shaping: dict[str, Any] = {
            "target": target,
            "fuse": fuse,
            "keep_unsupported": keep_unsupported,
            "layout": parse_layouts(layout or []),
            "max_shard_size": parse_size(max_shard_size),
        }
        printer = Output(quiet=json_)
        if dry_run:
            plan = api.plan(model, **shaping)
            _show_plan(printer, plan, json_)
            plan.refuse()
            return
        with nullcontext() if json_ else ShownProgress() as progress:
            report = api.repack(
                model,
                out,
                **shaping,
                device=device,
                workers=workers,
                resume=resume,
                overwrite=overwrite,
                verify=verify,
                progress=progress,
            )
        if json_:
            print_json(report)
            return
        made = ", ".join(f"{count} x {name}" for name, count in report["layouts"].items())
        printer.line(
            f"{report['out']}: {report['modules']} modules ({made or 'none'}), "
            f"{report['copied_tensors']} tensors copied, {size(report['output_bytes'])} in "
            f"{report['shards']} file(s)" + (", verified" if verify else ", not verified")
        )
        for refusal in report["kept"]:
            printer.line(f"kept unchanged: {refusal['module']}: {refusal['reason']}")
        _print_notes(printer, report["notes"])


def _show_plan(out: Output, plan: Plan, as_json: bool) -> None:
    from ctconvert.console import collapse, print_json, size
    from ctconvert.memory import peak_memory
    from ctconvert.planning import plan_as_json

    peak = peak_memory(plan)
    if as_json:
        print_json(plan_as_json(plan) | {"peak_memory_bytes": peak})
        return
    rows = [
        (
            module.name,
            (
                module.spec.format,
                module.spec.label,
                module.layout.name,
                f"{module.spec.n}x{module.spec.k}",
                size(module.output_bytes * len(module.units)),
            ),
        )
        for module in plan.modules
    ]
    out.table(
        ["module", "format", "weights", "layout", "N x K", "bytes each", "count"], collapse(rows)
    )
    out.line(f"{len(plan.copies)} tensors are copied unchanged")
    for refusal in plan.kept:
        out.line(f"kept unchanged: {refusal}")
    _print_notes(out, plan.notes)
    for shard in plan.shards:
        out.line(f"{shard.name}: {len(shard.specs)} tensors, {size(shard.size)}")
    out.line(
        f"disk needed: {size(plan.disk_bytes)}; peak memory about {size(peak)}; nothing was written"
    )


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A converted checkpoint.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also invert every layout and compare with the source."),
    ] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Also run every module against the reference.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="Where kernels run: auto, cpu, cuda, cuda:1, xpu.")
    ] = "auto",
    json_: Json = False,
    workers: Workers = None,
) -> None:
    """Prove a converted checkpoint: its bytes, and its codes and scales against the source."""
    with _failures(device):
        from ctconvert import api
        from ctconvert.console import Output, ShownProgress, print_json, size

        with nullcontext() if json_ else ShownProgress() as progress:
            report = api.verify(
                out,
                against=against,
                kernels=kernels,
                device=device,
                workers=workers,
                progress=progress,
            )
        if json_:
            print_json({"ok": True} | report)
            return
        printer = Output()
        printer.line(
            f"{out}: ok, {report['tensors']} tensors and {report['files']} files, "
            f"{size(report['bytes'])}, match the manifest"
        )
        if against is not None:
            compared = report["against"]
            printer.line(
                f"{out}: ok, {compared['modules']} modules hold the codes and scales of {against} "
                f"bit for bit, and {compared['copied_tensors']} tensors are its own"
            )
        if kernels and not report["kernels"]:
            printer.line(f"{out}: holds no converted module, so there is no kernel to run")
        for layout, run in report.get("kernels", {}).items():
            printer.line(
                f"{out}: ok, {run['modules']} {layout} kernels within {run['tolerance']:.0e} of "
                f"the reference; worst {run['worst_error']:.1e} ({run['module']}, {run['case']})"
            )


@app.command()
def bench(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A converted checkpoint.")],
    device: Annotated[
        str, typer.Option(help="Where kernels run: auto, cpu, cuda, cuda:1, xpu.")
    ] = "auto",
    m: Annotated[
        str,
        typer.Option("--m", help="Numbers of tokens, or rows looked up, separated by commas."),
    ] = "1,16,256,4096",
    json_: Json = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", help="Write a roofline chart, .png, .svg or .pdf; by matplotlib."
        ),
    ] = None,
) -> None:
    """Time a checkpoint's kernels beside measured limits and a dense bf16 matmul or look-up.

    The floor is bytes at a copy's rate or flops at a matmul's, whichever is slower.
    """
    with _failures(device):
        rows = _counts(m)
        from msgspec import to_builtins

        from ctconvert.console import print_json
        from ctconvert.runtime import benchmark, chart

        if plot is not None:
            chart.check_plot(plot)
        found = benchmark.bench(out, device, rows)
        if json_:
            print_json(to_builtins(found))
        else:
            _print_times(to_builtins(found))
        if plot is not None:
            chart.plot(found, plot)


def _print_times(found: dict[str, Any]) -> None:
    from ctconvert.console import Output

    printer = Output()
    limits = ", ".join(
        f"{kind} matmul {rate / 1e12:.2f} TFLOP/s" for kind, rate in found["matmul_flops"].items()
    )
    copy = found["copy_bytes_per_second"] / 1e12
    printer.line(f"{found['device']}: copy {copy:.3f} TB/s, {limits}, measured now")
    columns = ["layout", "weights", "N x K", "M", "us", "TB/s", "TFLOP/s", "in", "floor us"]

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    def row(row: dict[str, Any]) -> tuple[object, ...]:
        seconds, flops, dense = row["seconds"], row["flops"], row["dense_seconds"]
        return (
            row["layout"],
            row["weights"],
            f"{row['n']}x{row['k']}",
            row["m"],
            number(seconds * 1e6, 1),
            number(row["bytes_per_second"] / 1e12, 3),
            number(flops and flops / 1e12, 2),
            row["product"] or "",
            number(row["floor_seconds"] * 1e6, 1),
            number(dense and dense * 1e6, 1),
            number(dense and dense / seconds, 2),
        )

    printer.table([*columns, "dense us", "dense/ours"], map(row, found["rows"]))
    products = {row["product"]: row["product_flops"] for row in found["rows"]}
    for product, limit in products.items():
        if product is None:
            printer.line(
                "note: an embedding multiplies nothing: M rows are looked up, its floor is of "
                "bytes alone, dense is a bf16 table"
            )
        elif limit is None:
            printer.line(
                f"note: no {product} limit can be measured here; those floors are of bytes alone"
            )
        elif product.endswith("2:4"):
            printer.line(
                f"note: the {product} limit is {limit / 1e12:.2f} TFLOP/s, twice the dense one"
            )


def _counts(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise UsageError(f"--m {text!r}: write numbers of tokens separated by commas: 1,16,256")
    return tuple(map(int, text.split(",")))


@app.command()
def restore(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A converted checkpoint.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Directory to make.")],
    device: Annotated[
        str, typer.Option(help="Where transforms run: auto, cpu, cuda, cuda:1, xpu.")
    ] = "auto",
    json_: Json = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest output file.")] = "5GB",
    workers: Workers = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a killed run from its finished shards.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing DEST.")
    ] = False,
) -> None:
    """Turn a converted checkpoint back into the compressed-tensors one it was made from."""
    with _failures(device):
        from ctconvert import api
        from ctconvert.console import Output, ShownProgress, print_json, size

        with nullcontext() if json_ else ShownProgress() as progress:
            report = api.restore(
                out,
                dest,
                device=device,
                max_shard_size=parse_size(max_shard_size),
                workers=workers,
                resume=resume,
                overwrite=overwrite,
                progress=progress,
            )
        if json_:
            print_json(report)
            return
        Output().line(
            f"{dest}: {report['modules']} modules restored, {report['copied_tensors']} tensors "
            f"copied, {size(report['output_bytes'])} in {report['shards']} file(s)"
        )


@app.command()
def layouts(json_: Json = False) -> None:
    """List the layouts, what each takes, and which targets prefer it."""
    with _failures():
        from ctconvert.console import Output, print_json
        from ctconvert.layouts import LAYOUTS, TARGETS

        rows: list[dict[str, Any]] = [
            {
                "name": layout.name,
                "version": layout.version,
                "takes": layout.takes,
                "writes": layout.writes,
                "read_by": layout.read_by,
                "targets": [target for target, names in TARGETS.items() if layout.name in names],
            }
            for layout in LAYOUTS
        ]
        if json_:
            print_json(
                {"layouts": rows, "targets": {t: list(names) for t, names in TARGETS.items()}}
            )
            return
        cells: Callable[[dict[str, Any]], list[str]] = lambda row: [  # noqa: E731
            row["name"],
            row["takes"],
            row["writes"],
            row["read_by"],
            ", ".join(row["targets"]),
        ]
        out = Output()
        out.table(["layout", "takes", "writes", "read by", "targets"], map(cells, rows))
        for target, names in TARGETS.items():
            out.line(f"{target} prefers {', then '.join(names)}")
