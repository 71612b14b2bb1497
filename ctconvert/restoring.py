"""The way back: a kernel-ready checkpoint to the compressed-tensors one it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctconvert import formats
from ctconvert.checkpoint import manifest
from ctconvert.checkpoint.header import Shard, TensorEntry
from ctconvert.checkpoint.source import INDEX, Reader
from ctconvert.checkpoint.staging import Staging, check_apart
from ctconvert.checkpoint.writer import write_durably
from ctconvert.comparison import decode_output, find_layout, unit_entry
from ctconvert.description import Part, numbers
from ctconvert.dtypes import raw_bytes, torch_dtype
from ctconvert.errors import VerificationError
from ctconvert.formats.base import ModuleTensors
from ctconvert.formats.quantization import QuantizationSettings, config_of_method, with_config
from ctconvert.memory import Memory
from ctconvert.planning import ModulePlan, index_of, split
from ctconvert.progress import Progress
from ctconvert.specs import TensorSpec
from ctconvert.stacking import stacked_spec
from ctconvert.streaming import Copy, Stream, Work
from ctconvert.verification import Output, verify_files


@dataclass(frozen=True)
class RecordedPart:
    """A part of an output module as the source held it."""

    part: Part
    tensors: Mapping[str, TensorSpec]
    values: Mapping[str, bytes]
    beside: Mapping[str, TensorSpec]


class _Restore(Work):
    """One output module back to its parts' source tensors."""

    def __init__(self, output: Output, name: str, settings: QuantizationSettings) -> None:
        record = output.manifest["modules"][name]
        self.name = name
        self.sources = [recorded_part(item, record, settings) for item in record["parts"]]
        layout = find_layout(name, record["layout"], record["layout_version"])
        spec = stacked_spec([source.part.spec for source in self.sources])
        count = record["experts"]
        units = [[source.part for source in self.sources]] * (count or 1)
        self.item = ModulePlan(name, layout, spec, units, count is not None, {})
        self.encoded = {
            local: output.tensors[f"{name}.{local}"] for local in layout.output_specs(spec)
        }
        self.joined = {local: output.tensors[f"{name}.{local}"] for local in self.sources[0].beside}
        self.outputs = {
            f"{source.part.module}.{local}": tensor
            for source in self.sources
            for local, tensor in [*source.tensors.items(), *source.beside.items()]
        }
        unit = sum(entry.nbytes for entry in self.encoded.values()) // len(units)
        made = sum(t.nbytes for source in self.sources for t in source.tensors.values())
        self.input_bytes, self.output_bytes = unit, made // len(units)

    def run(self, stream: Stream) -> None:
        item = self.item
        for index in range(len(item.units)):
            stream.check_running()
            with stream.reading.hold(self.input_bytes):
                encoded = {
                    local: stream.reader.tensor(unit_entry(entry, index, item.stacked_experts))
                    for local, entry in self.encoded.items()
                }
                with stream.working.hold(work_of(self)):
                    parts = decode_output(self.name, item.layout, encoded, item, stream.device)
                    for source, weight in zip(self.sources, parts, strict=True):
                        handler = formats.get(weight.spec.format)
                        assert handler is not None
                        for local, tensor in handler.encode(weight).items():
                            self._put(stream, source, local, tensor)
                    del encoded, parts, weight, tensor
        for source in self.sources:
            for local, data in source.values.items():
                stream.put(f"{source.part.module}.{local}", memoryview(data))
        for local, entry in self.joined.items():
            self._split(stream, local, entry)

    def _put(self, stream: Stream, source: RecordedPart, local: str, tensor: torch.Tensor) -> None:
        spec = source.tensors[local]
        shape = spec.shape[1:] if self.item.stacked_experts else spec.shape
        made = tensor.to("cpu").to(torch_dtype(spec.dtype)).reshape(shape)
        stream.put(f"{source.part.module}.{local}", raw_bytes(made.contiguous()))

    def _split(self, stream: Stream, local: str, entry: TensorEntry) -> None:
        """Gives each part its rows of a tensor that stands beside the weight (``bias``)."""
        offset = entry.offset
        for source in self.sources:
            spec = source.beside[local]
            rows = TensorEntry(entry.name, entry.file, offset, spec)
            stream.copy(f"{source.part.module}.{local}", [rows])
            offset += spec.nbytes


def work_of(work: _Restore) -> int:
    """What restoring a module holds beside its input: the weight, and what checks it."""
    return 2 * work.output_bytes + work.input_bytes


def _specs(records: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return {
        local: TensorSpec(item["dtype"], tuple(item["shape"])) for local, item in records.items()
    }


def recorded_part(
    item: Mapping[str, Any], record: Mapping[str, Any], settings: QuantizationSettings
) -> RecordedPart:
    """A part of an output module, from what the manifest kept of the source's headers.

    Args:
        item: an entry of the module's ``parts``.
        record: the module's record.
        settings: of the original quantization_config.

    Raises:
        VerificationError: the config no longer says how the module was quantised.
    """
    name = item["name"]
    tensors = _specs(item["tensors"])
    values = {local: bytes.fromhex(data) for local, data in item["values"].items()}
    unit = dict(tensors)
    if record["experts"] is not None:
        for local, spec in tensors.items():
            if local == "weight_shape":
                unit[local] = TensorSpec(spec.dtype, (2,))
            elif local not in values:
                unit[local] = TensorSpec(spec.dtype, spec.shape[1:])
    handler = formats.get(record["format"])
    scheme = settings.scheme_of_quantised(name)
    if handler is None or scheme is None:
        raise VerificationError(
            f"module {name}: config.json no longer says how it was quantised; the output's "
            "config.json has been changed"
        )
    described = ModuleTensors(
        name,
        unit,
        record["scheme"] == "embedding",
        settings.version,
        {local: numbers(data, tensors[local])[-2:] for local, data in values.items()},
    )
    part = Part(name, handler.spec(described, scheme), {}, {})
    return RecordedPart(part, tensors, values, _specs(item["beside"]))


def restored_config(folder: Path) -> dict[str, Any]:
    """config.json with the original quantization_config in place of ours.

    Raises:
        VerificationError: it is no JSON, or it holds no original.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{path}: damaged: not valid JSON ({error})") from None
    found = config_of_method(config, "ctconvert")
    if found is None or "source" not in found[1]:
        raise VerificationError(f"{path}: no quantization_config of ctconvert")
    place, ours = found
    return with_config(config, place, ours["source"])


def restore(
    folder: Path,
    dest: Path,
    *,
    device: torch.device,
    workers: int,
    resume: bool,
    overwrite: bool,
    max_shard_size: int,
    progress: Progress,
) -> dict[str, Any]:
    """Writes the compressed-tensors checkpoint that an output was made from.

    Args:
        folder: the output of a conversion; it is verified first.
        dest: the directory to make.
        device, workers, resume, overwrite, progress: as for a conversion.
        max_shard_size: bytes of tensors in one file.

    Returns:
        the report: modules and tensors restored, sizes.

    Raises:
        UsageError: ``dest`` exists, or overlaps ``folder``.
        VerificationError: the output is damaged.
        ConversionError: the disk is full.
    """
    if dest.is_symlink() or dest.name in ("", ".."):
        dest = dest.resolve()
    check_apart(folder, dest)
    check_apart(folder, dest.with_name(dest.name + ".partial"))
    verify_files(folder, progress, workers)
    output = Output(folder)
    config = restored_config(folder)
    settings = QuantizationSettings.parse(config, str(folder / "config.json"))
    works = _works(output, settings)
    shards = split([work.outputs for work in works], max_shard_size)
    staging = Staging(dest, _digest(output, shards), {})
    staging.open(resume=resume, overwrite=overwrite)
    try:
        side = sum(output.sizes[name] for name in _side_files(output))
        staging.check_space(side + sum(shard.size for shard in shards), shards)
        with Reader(folder) as reader:
            reader.add(name for name in output.manifest["files"] if name.endswith(".safetensors"))
            stream = Stream(reader, staging, _memory(works), device, workers, progress)
            resumed = stream.fill(shards, works, "restoring")
        _finish(output, config, staging, shards)
        staging.commit()
    finally:
        staging.close()
    return {
        "out": str(dest),
        "modules": sum(len(w.sources) for w in works if isinstance(w, _Restore)),
        "copied_tensors": sum(isinstance(work, Copy) for work in works),
        "shards": len(shards),
        "resumed_shards": resumed,
        "output_bytes": sum(shard.size for shard in shards),
        "side_files": _side_files(output),
    }


def _works(output: Output, settings: QuantizationSettings) -> list[_Restore | Copy]:
    """In the order of the output's files, so that they are read through once."""
    places: list[tuple[tuple[str, int], _Restore | Copy]] = []
    for name, record in output.manifest["modules"].items():
        entries = [output.tensors[full] for full in record["tensors"]]
        first = min((entry.file, entry.offset) for entry in entries)
        places.append((first, _Restore(output, name, settings)))
    for name in output.manifest["tensors"]:
        entry = output.tensors[name]
        places.append(((entry.file, entry.offset), Copy(entry)))
    return [work for _, work in sorted(places, key=lambda item: item[0])]


def _memory(works: list[_Restore | Copy]) -> Memory:
    modules = [work for work in works if isinstance(work, _Restore)]
    return Memory.of(
        max((work.input_bytes for work in modules), default=0),
        max((work_of(work) for work in modules), default=0),
    )


def _digest(output: Output, shards: list[Shard]) -> str:
    state = [output.manifest["manifest_sha256"], *(shard.header.hex() for shard in shards)]
    return hashlib.sha256(json.dumps(["restore", *state]).encode()).hexdigest()


def _side_files(output: Output) -> list[str]:
    """Tokenizer and others, which the conversion had copied."""
    return [
        name
        for name in output.manifest["files"]
        if not name.endswith(".safetensors") and name not in ("config.json", INDEX, manifest.NAME)
    ]


def _finish(output: Output, config: dict[str, Any], staging: Staging, shards: list[Shard]) -> None:
    for name in _side_files(output):
        target = staging.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_durably(target, output.files.pieces(name))
    if len(shards) > 1:
        index = json.dumps(index_of(shards), indent=2) + "\n"
        write_durably(staging.folder / INDEX, index.encode())
    # last: without it the directory is no checkpoint
    write_durably(staging.folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
