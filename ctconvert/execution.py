"""Carries a plan out: read, decode, encode, write, all overlapping, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    Future,
    ThreadPoolExecutor,
    wait,
)
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ctconvert import __version__, formats
from ctconvert.budget import Budget, CancelledError
from ctconvert.checkpoint import manifest
from ctconvert.checkpoint.header import Shard, TensorEntry
from ctconvert.checkpoint.source import INDEX, LocalFiles, Reader
from ctconvert.checkpoint.staging import Staging, check_apart, complete_with
from ctconvert.checkpoint.writer import ShardWriter, write_durably
from ctconvert.description import Part
from ctconvert.dtypes import raw_bytes, same_bits, spec_of
from ctconvert.errors import BadInputError, ConversionError, UsageError
from ctconvert.memory import memory_of, work_bytes
from ctconvert.planning import Item, ModulePlan, Plan, outputs_of, summarise
from ctconvert.progress import Progress
from ctconvert.specs import QuantizedWeight, TensorSpec
from ctconvert.stacking import stack
from ctconvert.verification import verify_files

#: Bytes read or copied at once where no transform needs a whole tensor.
CHUNK = 8 << 20


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
    check_apart(files.root, out)
    digest = plan.digest()
    if resume and complete_with(out, digest):
        progress.note(f"{out} is already complete")
        return _report(plan, out, resumed=len(plan.shards))
    shards = plan.description.source.shards
    mtimes = {name: (files.root / name).stat().st_mtime_ns for name in shards}
    staging = Staging(out, digest, mtimes)
    staging.open(resume=resume, overwrite=overwrite)
    try:
        _check_space(plan, staging)
        report = _Run(plan, files, staging, device, workers, progress).run(verify)
        staging.commit()
    except BadInputError:
        staging.discard()  # nothing in it can be of use: the source must change
        raise
    finally:
        staging.close()
    return report


def _check_space(plan: Plan, staging: Staging) -> None:
    done = sum(shard.size for shard in plan.shards if shard.name in staging.shards)
    need = plan.disk_bytes - done
    free = shutil.disk_usage(staging.root).free
    if free < need:
        if not staging.shards:
            staging.discard()
        raise ConversionError(
            f"{staging.out}: the output needs {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are "
            "free; free some space or choose another place"
        )


class _Run:
    """One conversion: the worker threads and what they share."""

    def __init__(
        self,
        plan: Plan,
        files: LocalFiles,
        staging: Staging,
        device: torch.device,
        workers: int,
        progress: Progress,
    ) -> None:
        self.plan = plan
        self.files = files
        self.staging = staging
        self.device = device
        self.workers = workers
        self.progress = progress
        memory = memory_of(plan)
        self.read_budget = Budget(memory.read)
        self.work_budget = Budget(memory.work)
        self.reader = Reader(files.root)
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.hashes: dict[str, str] = {}

    def run(self, verify: bool) -> dict[str, Any]:
        todo = [shard for shard in self.plan.shards if not self._reused(shard)]
        resumed = len(self.plan.shards) - len(todo)
        if resumed:
            self.progress.note(f"{resumed} of {len(self.plan.shards)} shards taken over")
        total = sum(shard.size for shard in todo)
        self.progress.phase("converting", total)
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.workers))
        try:
            with self.reader:
                self.reader.add(self.plan.description.source.shards)
                self._convert(todo)
        finally:
            torch.set_num_threads(threads)
        self._finish()
        if verify:
            verify_files(self.staging.folder, self.progress, self.workers)
        return _report(self.plan, self.staging.out, resumed)

    def _reused(self, shard: Shard) -> bool:
        """Whether a finished shard of an earlier run is whole; if so its hashes are taken over."""
        tensors = self.staging.shards.get(shard.name)
        path = self.staging.folder / shard.name
        if tensors is None or tensors.keys() != shard.specs.keys() or not path.exists():
            return False
        with path.open("rb") as file:
            if path.stat().st_size != shard.size or file.read(len(shard.header)) != shard.header:
                return False
            for name, spec in shard.specs.items():
                if file.tell() != shard.offsets[name]:
                    return False
                digest = hashlib.sha256()
                left = spec.nbytes
                while left:
                    data = file.read(min(CHUNK, left))
                    if not data:
                        return False
                    digest.update(data)
                    left -= len(data)
                if digest.hexdigest() != tensors[name]:
                    return False
        self.hashes |= tensors
        return True

    def _convert(self, todo: list[Shard]) -> None:
        place = {name: shard for shard in todo for name in shard.specs}
        items: dict[str, list[Item]] = {shard.name: [] for shard in todo}
        for item in self.plan.items:
            shard = place.get(next(iter(outputs_of(item))))
            if shard is not None:
                items[shard.name].append(item)
        with ThreadPoolExecutor(self.workers, "convert") as pool, ThreadPoolExecutor(1) as hasher:
            futures: set[Future[None]] = {hasher.submit(self._hash_sources)}
            try:
                for shard in todo:
                    writer = _SharedShard(self, shard, len(items[shard.name]))
                    for item in items[shard.name]:
                        futures.add(pool.submit(self._guarded, item, writer))
                        while len(futures) > 4 * self.workers:
                            futures = self._reap(futures, FIRST_COMPLETED)
                while futures:
                    futures = self._reap(futures, FIRST_EXCEPTION)
            finally:
                self.stop.set()
                self.read_budget.cancel()
                self.work_budget.cancel()
                pool.shutdown(wait=True, cancel_futures=True)

    @staticmethod
    def _reap(futures: set[Future[None]], until: str) -> set[Future[None]]:
        """Raises what a finished future raised; wakes often, so that Ctrl-C is noticed."""
        done, left = wait(futures, timeout=0.2, return_when=until)
        for future in done:
            future.result()
        return left

    def _hash_sources(self) -> None:
        """The hash of every source file; it also reads ahead of the workers."""
        buffer = memoryview(bytearray(CHUNK))
        for name in self.plan.description.source.shards:
            if name in self.staging.sources:
                continue
            digest = hashlib.sha256()
            size = self.plan.description.source.sizes[name]
            for start in range(0, size, CHUNK):
                if self.stop.is_set():
                    return
                part = buffer[: min(CHUNK, size - start)]
                self.reader.read_into(name, start, part)
                digest.update(part)
            with self.lock:
                self.staging.finished_source(name, digest.hexdigest())

    def _guarded(self, item: Item, writer: _SharedShard) -> None:
        if self.stop.is_set():
            return
        try:
            if isinstance(item, ModulePlan):
                self._convert_module(item, writer)
            else:
                self._copy(item.name, [item], writer)
            writer.item_done()
        except CancelledError:
            return
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise ConversionError(
                f"module {item.name}: {self.device} is out of memory ({reason}); use --device cpu "
                "or fewer --workers"
            ) from None

    def _copy(self, name: str, entries: list[TensorEntry], writer: _SharedShard) -> None:
        """Copies a tensor unchanged, or joins several along dimension 0."""
        digest = hashlib.sha256()
        position = 0
        size = min(CHUNK, max(entry.nbytes for entry in entries))
        with self.read_budget.hold(size):
            buffer = memoryview(bytearray(size))
            for entry in entries:
                for start in range(0, entry.nbytes, CHUNK):
                    if self.stop.is_set():
                        raise CancelledError
                    part = buffer[: min(CHUNK, entry.nbytes - start)]
                    self.reader.read_into(entry.file, entry.offset + start, part)
                    digest.update(part)
                    writer.write(name, part, position)
                    position += len(part)
        self._hashed(name, digest.hexdigest())

    def _hashed(self, name: str, digest: str) -> None:
        with self.lock:
            self.hashes[name] = digest

    def _convert_module(self, item: ModulePlan, writer: _SharedShard) -> None:
        made = [name for name in item.outputs if name.rpartition(".")[2] not in item.beside]
        digests = {name: hashlib.sha256() for name in made}
        for index, parts in enumerate(item.units):
            if self.stop.is_set():
                raise CancelledError
            with self.read_budget.hold(item.input_bytes):
                sources = [
                    {local: self.reader.tensor(entry) for local, entry in part.entries.items()}
                    for part in parts
                ]
                with self.work_budget.hold(work_bytes(item)):
                    outputs = transform(item, parts, sources, self.device)
                    del sources
                    for name, tensor in outputs.items():
                        data = raw_bytes(tensor)
                        digests[name].update(data)
                        writer.write(name, data, index * len(data))
                    del outputs, data, tensor
        for name, digest in digests.items():
            self._hashed(name, digest.hexdigest())
        for local, entries in item.beside.items():
            self._copy(f"{item.name}.{local}", entries, writer)

    def shard_done(self, shard: Shard) -> None:
        with self.lock:
            tensors = {name: self.hashes[name] for name in shard.specs}
            self.staging.finished_shard(shard.name, tensors)

    def _finish(self) -> None:
        """Everything but the shards; the manifest last."""
        plan, folder = self.plan, self.staging.folder
        files: dict[str, dict[str, Any]] = {}
        for shard in plan.shards:
            header = hashlib.sha256(shard.header).hexdigest()
            files[shard.name] = {"size": shard.size, "sha256": header}
        made = {"config.json": _json(output_config(plan))}
        if len(plan.shards) > 1:
            made[INDEX] = _json(_index(plan))
        for name in plan.side_files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_durably(target, self.files.read(name))
        for name, data in made.items():
            write_durably(folder / name, data)
        for name in [*made, *plan.side_files]:
            data = (folder / name).read_bytes()
            files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        record = output_manifest(plan, self.staging.sources, self.hashes, files)
        write_durably(folder / manifest.NAME, manifest.dump(record))


class _SharedShard:
    """A shard that several workers fill; the first opens it, the last finishes it."""

    def __init__(self, run: _Run, shard: Shard, items: int) -> None:
        self.run = run
        self.writer = ShardWriter(run.staging.folder, shard)
        self.left = items
        self.opened = False
        self.lock = threading.Lock()

    def write(self, name: str, data: memoryview, start: int) -> None:
        with self.lock:
            if not self.opened:
                self.writer.open()
                self.opened = True
        self.writer.write(name, data, start)
        self.run.progress.advance(len(data))

    def item_done(self) -> None:
        with self.lock:
            self.left -= 1
            last = self.left == 0
            if last and not self.opened:
                self.writer.open()  # every tensor of it is empty
        if last:
            self.writer.finish()
            self.run.shard_done(self.writer.shard)


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
    weight.spec = replace(item.spec)
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
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _index(plan: Plan) -> dict[str, Any]:
    weight_map = {name: shard.name for shard in plan.shards for name in shard.specs}
    total = sum(spec.nbytes for shard in plan.shards for spec in shard.specs.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }


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
    key = "quantization_config"
    if not plan.description.source.config.get(key):
        key = "compression_config"
    return {
        name: ours if name == key else value
        for name, value in plan.description.source.config.items()
    }


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
