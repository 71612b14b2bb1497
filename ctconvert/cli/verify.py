"""``ctconvert verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctconvert.cli.failures import failures
from ctconvert.cli.options import Json, JsonEvents, KernelDevice, Out, Workers, directories
from ctconvert.cli.sink import Sink
from ctconvert.cli.text import size

if TYPE_CHECKING:
    from ctconvert.records import Verified


def verify(
    out: Out,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Also invert every layout and compare with the source.",
            autocompletion=directories,
        ),
    ] = None,
    independent: Annotated[
        bool,
        typer.Option(
            "--independent",
            help="With --against: also compare the weights with compressed-tensors' own decoding.",
        ),
    ] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Also run every module against the reference.")
    ] = False,
    device: KernelDevice = "auto",
    json_: Json = False,
    json_events: JsonEvents = None,
    workers: Workers = None,
) -> None:
    """Prove a converted checkpoint: its bytes, codes and scales."""
    sink = Sink(json_, json_events)
    with failures(sink, device):
        from ctconvert import api

        with sink.progress() as progress:
            found = api.verify(
                out,
                against=against,
                independent=independent,
                kernels=kernels,
                device=device,
                workers=workers,
                progress=progress,
            )
        missing = found.without_kernel
        sink.show(found, lambda sink, found: _print(sink, found, out, against))
        if missing:
            from ctconvert.errors import VerificationError

            listed = ", ".join(f"{count} of {layout}" for layout, count in missing.items())
            raise VerificationError(
                f"{out}: {listed} modules were not run: no kernel here runs them; "
                "`ctconvert verify --against MODEL` proves their bytes"
            )


def _print(sink: Sink, found: Verified, out: Path, source: str | None) -> None:
    sink.line(
        f"{out}: ok, {found.tensors} tensors and {found.files} files, {size(found.bytes)}, "
        "match the manifest"
    )
    if found.against is not None:
        compared = found.against
        tensors = f"{compared.copied_tensors} tensors are"
        if compared.modules:
            sink.line(
                f"{out}: ok, {compared.modules} modules hold the codes and scales of "
                f"{source} bit for bit, and {tensors} its own"
            )
        else:
            sink.line(f"{out}: ok, {tensors} those of {source} bit for bit")
    if found.independent is not None:
        judged = found.independent
        sink.line(
            f"{out}: ok, {judged.agree} weights are what compressed-tensors decodes of {source}"
        )
        for reason, count in judged.not_judged.items():
            sink.line(f"{out}: {count} weights were not judged: {reason}")
    if found.kernels == {} and not found.without_kernel:
        sink.line(f"{out}: holds no converted module, so there is no kernel to run")
    for layout, run in (found.kernels or {}).items():
        what = "modules in plain torch, for want of the kernel," if run.plain else "kernels"
        sink.line(
            f"{out}: ok, {run.modules} {layout} {what} within {run.tolerance:.0e} of "
            f"the reference; worst {run.worst_error:.1e} ({run.module}, {run.case})"
        )
