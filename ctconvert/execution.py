"""Carries a plan out: read, decode, encode, write, all overlapping, in bounded memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ctconvert import __version__, formats
from ctconvert.budget import CancelledError
from ctconvert.checkpoint import manifest
from ctconvert.checkpoint.source import INDEX, LocalFiles, Reader
from ctconvert.checkpoint.staging import Staging, check_apart, complete_with
from ctconvert.checkpoint.writer import write_durably
from ctconvert.description import Part
from ctconvert.dtypes import raw_bytes, same_bits, spec_of
from ctconvert.errors import BadInputError, ConversionError, UsageError
from ctconvert.formats.quantization import with_config
from ctconvert.memory import memory_of, work_bytes
from ctconvert.planning import ModulePlan, Plan, index_of, summarise
from ctconvert.progress import Progress
from ctconvert.specs import QuantizedWeight, TensorSpec
from ctconvert.stacking import stack
from ctconvert.streaming import Copy, Stream, Work
from ctconvert.verification import verify_files


def execute(
    plan: Plan,
    out: Path,
    *,
    device: torch.device,
    workers: int,
    resume: bool,
    overwrite: bool,
    verify: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Writes the planned checkpoint under ``out``.

    Args:
        plan: without refusals.
        out: the directory to make; its parent is made where missing.
        device: where transforms run.
        workers: threads that read, transform and write.
        resume: take over the finished shards of an earlier, killed run.
        overwrite: replace what is there.
        verify: read the output back and check every hash before it appears under ``out``.
        progress: told of bytes done.

    Returns:
        the report: sizes, layouts, notes.

    Raises:
        UsageError: ``out`` exists, or overlaps the source.
        BadInputError: the source's data is damaged (a NaN scale, a code out of range).
        ConversionError: the disk is full, or a transform failed.
    """
    files = plan.description.source.files
    if not isinstance(files, LocalFiles):
        raise UsageError(f"{files.where}: the checkpoint must be downloaded before it is converted")
    plan.refuse()
    if out.is_symlink() or out.name in ("", ".."):  # the partial output lies beside what is meant
        out = out.resolve()
    check_apart(files.root, out)
    if out.exists() and out.samefile(Path.cwd()):
        raise UsageError(f"{out} is the current directory, which cannot be replaced; name another")
    digest = plan.digest()
    shards = plan.description.source.shards
    mtimes = {name: (files.root / name).stat().st_mtime_ns for name in shards}
    staging = Staging(out, digest, mtimes)
    check_apart(files.root, staging.root)
    if resume and complete_with(out, digest):
        if max(mtimes.values()) > (out / manifest.NAME).stat().st_mtime_ns:
            raise UsageError(
                f"{out} is complete, but the source has changed since it was made; use --overwrite "
                "to convert it again"
            )
        staging.discard_committed()
        if verify:
            verify_files(out, progress, workers)
        progress.note(f"{out} is already complete")
        return _report(plan, out, resumed=len(plan.shards))
    staging.open(resume=resume, overwrite=overwrite)
    try:
        staging.check_space(plan.disk_bytes, plan.shards)
        resumed = _convert(plan, files, staging, device, workers, progress)
        for name, modified in mtimes.items():
            if (files.root / name).stat().st_mtime_ns != modified:
                staging.discard()
                raise ConversionError(
                    f"{files.path(name)}: changed while it was being converted; nothing was kept"
                )
        if verify:
            verify_files(staging.folder, progress, workers)
        staging.commit()
    except BadInputError:
        staging.discard()  # nothing in it can be of use: the source must change
        raise
    finally:
        staging.close()
    return _report(plan, out, resumed)


class _Convert(Work):
    """A module: its source tensors through the layout."""

    def __init__(self, item: ModulePlan) -> None:
        self.name = item.name
        self.outputs = item.outputs
        self.item = item

    def run(self, stream: Stream) -> None:
        item = self.item
        for parts in item.units:
            stream.check_running()
            with stream.reading.hold(item.input_bytes):
                sources = [
                    {local: stream.reader.tensor(entry) for local, entry in part.entries.items()}
                    for part in parts
                ]
                with stream.working.hold(work_bytes(item)):
                    for name, tensor in transform(item, parts, sources, stream.device).items():
                        stream.put(name, raw_bytes(tensor))
                    del tensor
        for local, entries in item.beside.items():
            stream.copy(f"{item.name}.{local}", entries)


def _convert(
    plan: Plan,
    files: LocalFiles,
    staging: Staging,
    device: torch.device,
    workers: int,
    progress: Progress,
) -> int:
    """Fills the staging folder; returns how many shards were taken over."""
    source = plan.description.source
    with Reader(files.root) as reader:
        reader.add(source.shards)
        stream = Stream(reader, staging, memory_of(plan), device, workers, progress)

        def hash_sources() -> None:
            for name in source.shards:
                if name not in staging.sources:
                    with suppress(CancelledError):
                        digest = stream.hash_file(name, source.sizes[name])
                        stream.recorded(partial(staging.finished_source, name, digest))

        works = [
            _Convert(item) if isinstance(item, ModulePlan) else Copy(item) for item in plan.items
        ]
        resumed = stream.fill(plan.shards, works, "converting", [hash_sources])
    _finish(plan, files, staging, stream.hashes)
    return resumed


def _finish(plan: Plan, files_in: LocalFiles, staging: Staging, hashes: dict[str, str]) -> None:
    """Everything but the shards; the manifest last."""
    folder = staging.folder
    files: dict[str, dict[str, Any]] = {}
    for shard in plan.shards:
        header = hashlib.sha256(shard.header).hexdigest()
        files[shard.name] = {"size": shard.size, "sha256": header}
    made = {"config.json": _json(output_config(plan))}
    if len(plan.shards) > 1:
        made[INDEX] = _json(index_of(plan.shards))
    for name in plan.side_files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_durably(target, files_in.pieces(name))
    for name, data in made.items():
        write_durably(folder / name, data)
    written = LocalFiles(folder)
    for name in [*made, *plan.side_files]:
        size = (folder / name).stat().st_size
        files[name] = {"size": size, "sha256": written.sha256(name)}
    record = output_manifest(plan, staging.sources, hashes, files)
    write_durably(folder / manifest.NAME, manifest.dump(record))


def decode_part(
    part: Part, tensors: dict[str, torch.Tensor], device: torch.device
) -> QuantizedWeight:
    """The logical weight of one part, on ``device``.

    Raises:
        BadInputError: the data is damaged.
    """
    handler = formats.get(part.spec.format)
    assert handler is not None
    moved = {local: tensor.to(device) for local, tensor in tensors.items()}
    try:
        return handler.decode(moved, part.spec)
    except ValueError as error:
        raise BadInputError(f"module {part.module}: {error}") from None


def transform(
    item: ModulePlan,
    parts: list[Part],
    sources: list[dict[str, torch.Tensor]],
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """One unit of a module, source tensors to kernel tensors by full name, on the CPU.

    The layout is inverted on the spot and must give back every code and scale.

    Raises:
        BadInputError: the source's data is damaged.
        ConversionError: the layout does not invert; nothing wrong is ever written.
    """
    weights = []
    for part, tensors in zip(parts, sources, strict=True):
        weights.append(decode_part(part, tensors, device))
        tensors.clear()
    weight = stack(weights)
    weight.spec = item.spec
    del weights
    try:
        encoded = item.layout.encode(weight)
    except ValueError as error:
        raise BadInputError(f"module {item.name}: {error}") from None
    check_specs(item, encoded)
    if wrong := first_difference(weight, item.layout.decode(encoded, item.spec)):
        raise ConversionError(
            f"module {item.name}: layout {item.layout.name} does not give back its {wrong}; this "
            "is a bug in ctconvert, and the module was not written"
        )
    return {f"{item.name}.{local}": tensor.cpu() for local, tensor in encoded.items()}


def check_specs(item: ModulePlan, encoded: dict[str, torch.Tensor]) -> None:
    """Raises ConversionError unless a layout made what it had announced."""
    for local, spec in item.layout.output_specs(item.spec).items():
        if local not in encoded or spec_of(encoded[local]) != spec:
            have = spec_of(encoded[local]) if local in encoded else "nothing"
            raise ConversionError(
                f"module {item.name}: layout {item.layout.name} made {have} for {local}, planned "
                f"{spec}; this is a bug in ctconvert"
            )


def first_difference(a: QuantizedWeight, b: QuantizedWeight) -> str | None:
    """The first of codes, scale, zero_point, ... in which two weights differ, bit for bit."""
    left, right = a.tensors(), b.tensors()
    for name in [*left, *(set(right) - set(left))]:
        if name not in left or name not in right or not same_bits(left[name], right[name]):
            return name
    return None


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def output_config(plan: Plan) -> dict[str, Any]:
    """config.json of the output: the source's, its quantization_config wrapped in ours."""
    settings = plan.description.settings
    ours = {
        "quant_method": "ctconvert",
        "format_version": manifest.FORMAT_VERSION,
        "target": plan.options.target,
        "modules": summarise(plan, lambda module: module.layout.name),
        "source": settings.source,
    }
    if plan.kept:
        ours["unconverted"] = [refusal.module for refusal in plan.kept]
    return with_config(plan.description.source.config, settings.path, ours)


def output_manifest(
    plan: Plan,
    sources: dict[str, str],
    hashes: dict[str, str],
    files: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The manifest, as :mod:`ctconvert.checkpoint.manifest` describes it."""
    place = {name: shard.name for shard in plan.shards for name in shard.specs}
    source = plan.description.source

    def tensor(name: str, spec: TensorSpec) -> dict[str, Any]:
        return _spec_json(spec) | {"file": place[name], "sha256": hashes[name]}

    modules = {
        item.name: _module_json(plan, item)
        | {"tensors": {name: tensor(name, spec) for name, spec in item.outputs.items()}}
        for item in plan.modules
    }
    return {
        "format_version": manifest.FORMAT_VERSION,
        "tool": {"name": "ctconvert", "version": __version__},
        "target": plan.options.target,
        "options": {"fuse": plan.options.fuse, "keep_unsupported": plan.options.keep_unsupported},
        "plan": plan.digest(),
        "source": {
            "id": source.files.id,
            "revision": source.files.revision,
            "files": [
                {"name": name, "size": source.sizes[name], "sha256": sources[name]}
                for name in source.shards
            ],
        },
        "modules": modules,
        "kept": {refusal.module: refusal.reason for refusal in plan.kept},
        "tensors": {entry.name: tensor(entry.name, entry.spec) for entry in plan.copies},
        "files": files,
        "notes": plan.notes,
    }


def _spec_json(spec: TensorSpec) -> dict[str, Any]:
    return {"dtype": spec.dtype, "shape": list(spec.shape)}


def _module_json(plan: Plan, item: ModulePlan) -> dict[str, Any]:
    spec = item.spec

    def parts() -> Iterator[dict[str, Any]]:
        for part in item.parts:
            module = plan.description.modules[part.module]
            yield {
                "name": part.module,
                "rows": part.spec.n,
                "tensors": {
                    local: _spec_json(module.entries[local].spec) for local in part.entries
                },
                "values": part.values,
                "beside": {
                    local: _spec_json(module.entries[local].spec) for local in module.beside
                },
            }

    return {
        "format": spec.format,
        "scheme": spec.family,
        "weights": spec.label,
        "activations": spec.activations,
        "layout": item.layout.name,
        "layout_version": item.layout.version,
        "shape": [spec.n, spec.k],
        "bits": spec.bits,
        "group_size": spec.group_size,
        "symmetric": spec.symmetric,
        "experts": len(item.units) if item.stacked_experts else None,
        "parts": list(parts()),
        "details": item.layout.details(spec),
        "notes": item.notes,
    }


def _report(plan: Plan, out: Path, resumed: int) -> dict[str, Any]:
    return {
        "out": str(out),
        "target": plan.options.target,
        "layouts": summarise(plan, lambda module: module.layout.name),
        "modules": len(plan.modules),
        "copied_tensors": len(plan.copies),
        "kept": [vars(refusal) for refusal in plan.kept],
        "shards": len(plan.shards),
        "resumed_shards": resumed,
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.tensor_bytes,
        "notes": plan.notes,
    }
