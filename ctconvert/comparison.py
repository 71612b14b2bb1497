"""Codes and scales of an output against its source's: the long way, through both decoders."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import torch

from ctconvert import layouts
from ctconvert.budget import Budget
from ctconvert.checkpoint.header import TensorEntry
from ctconvert.checkpoint.source import Reader, Source
from ctconvert.description import describe, total_bytes
from ctconvert.dtypes import same_bits
from ctconvert.errors import VerificationError
from ctconvert.execution import decode_part, first_difference
from ctconvert.layouts import Layout
from ctconvert.memory import Memory, comparison_bytes
from ctconvert.planning import ModulePlan
from ctconvert.progress import Progress
from ctconvert.specs import QuantizedWeight, TensorSpec
from ctconvert.stacking import stacked_spec, unstack
from ctconvert.streaming import CHUNK
from ctconvert.verification import Output


class Comparison:
    """What must be compared, as callables that raise VerificationError.

    Everything of the source must have its place in the output, and nothing else may be there.
    """

    def __init__(
        self,
        output: Output,
        source: Source,
        made: Reader,
        original: Reader,
        progress: Progress,
    ) -> None:
        self.output = output
        self.made = made
        self.original = original
        self.progress = progress
        self.work: list[Callable[[threading.Event], None]] = []
        self.description = describe(source)
        largest = 0
        covered: set[str] = set()
        for name in output.manifest["modules"]:
            item = self._module(name)
            largest = max(largest, comparison_bytes(item))
            covered |= {entry.name for part in item.parts for entry in part.entries.values()}
            for local, entries in item.beside.items():
                covered |= {entry.name for entry in entries}
                joined = output.tensors[f"{name}.{local}"]
                self.work.append(partial(self._compare_bytes, joined, entries))
            self.work.append(partial(self._compare_module, item))
        for name in output.manifest["tensors"]:
            if name not in source.tensors:
                raise VerificationError(f"tensor {name}: not in {source.files.where}")
            covered.add(name)
            self.work.append(
                partial(self._compare_bytes, output.tensors[name], [source.tensors[name]])
            )
        if missing := source.tensors.keys() - covered:
            raise VerificationError(
                f"tensor {min(missing)} of {source.files.where} has no place in the output"
            )
        self.total = total_bytes(source.tensors.values())
        self.budget = Budget(Memory.of(0, largest).work)

    def _module(self, name: str) -> ModulePlan:
        record = self.output.manifest["modules"][name]
        layout = find_layout(name, record["layout"], record["layout_version"])
        modules = []
        for part in record["parts"]:
            module = self.description.modules.get(part["name"])
            if module is None or not module.experts:
                raise VerificationError(
                    f"module {name}: its part {part['name']} is no quantised module of the source"
                )
            modules.append(module)
        if len({len(module.experts) for module in modules}) > 1:
            raise VerificationError(f"module {name}: its parts have unequal numbers of experts")
        units = [list(parts) for parts in zip(*(item.experts for item in modules), strict=True)]
        spec = stacked_spec([part.spec for part in units[0]])
        if not (support := layout.supports(spec)):
            raise VerificationError(
                f"module {name}: {layout.name} cannot hold it: {support.reason}"
            )
        stacked = modules[0].stacked_experts
        outputs = {}
        for local, tensor in layout.output_specs(spec).items():
            shape = (len(units), *tensor.shape) if stacked else tensor.shape
            outputs[f"{name}.{local}"] = TensorSpec(tensor.dtype, shape)
        for full, tensor in outputs.items():
            entry = self.output.tensors.get(full)
            if entry is None or entry.spec != tensor:
                raise VerificationError(
                    f"tensor {full}: {entry.spec if entry else 'missing'}, expected {tensor}"
                )
        beside = {
            local: [module.entries[local] for module in modules] for local in modules[0].beside
        }
        return ModulePlan(name, layout, spec, units, stacked, outputs, beside)

    def _compare_module(self, item: ModulePlan, stop: threading.Event) -> None:
        for index in range(len(item.units)):
            with self.budget.hold(comparison_bytes(item)):
                if stop.is_set():
                    return
                self._compare_unit(item, index)

    def _compare_unit(self, item: ModulePlan, index: int) -> None:
        cpu = torch.device("cpu")
        encoded = {
            name.rpartition(".")[2]: self.made.tensor(
                unit_entry(self.output.tensors[name], index, item.stacked_experts)
            )
            for name in item.outputs
        }
        decoded = decode_output(item.name, item.layout, encoded, item, cpu)
        del encoded
        for part, found in zip(item.units[index], decoded, strict=True):
            tensors = {local: self.original.tensor(entry) for local, entry in part.entries.items()}
            want = decode_part(part, tensors, cpu)
            if wrong := first_difference(want, found):
                where = f" (expert {index})" if item.stacked_experts else ""
                raise VerificationError(
                    f"module {item.name}{where}: {wrong} of {part.module} differs from the source's"
                )
            self.progress.advance(total_bytes(part.entries.values()))

    def _compare_bytes(
        self, made: TensorEntry, sources: list[TensorEntry], stop: threading.Event
    ) -> None:
        expected = sources[0].spec
        if len(sources) > 1:
            rows = sum(source.spec.shape[0] for source in sources)
            expected = TensorSpec(expected.dtype, (rows, *expected.shape[1:]))
        if made.spec != expected:
            raise VerificationError(f"tensor {made.name}: {made.spec} is not the source's")
        position = 0
        for source in sources:
            for start in range(0, source.nbytes, CHUNK):
                if stop.is_set():
                    return
                size = min(CHUNK, source.nbytes - start)
                left, right = memoryview(bytearray(size)), memoryview(bytearray(size))
                self.original.read_into(source.file, source.offset + start, left)
                self.made.read_into(made.file, made.offset + position, right)
                if left != right:
                    raise VerificationError(f"tensor {made.name} differs from the source's")
                position += size
                self.progress.advance(size)


def find_layout(module: str, name: str, version: int) -> Layout:
    """The layout a manifest names.

    Raises:
        VerificationError: this program does not know it, or knows another version of it.
    """
    layout = layouts.get(name)
    if layout is None or layout.version != version:
        raise VerificationError(
            f"module {module}: layout {name} version {version} is not known to this ctconvert; "
            "use the one that wrote it"
        )
    return layout


def unit_entry(entry: TensorEntry, index: int, stacked: bool) -> TensorEntry:
    """One expert's slice of a tensor, or the tensor itself."""
    if not stacked:
        return entry
    spec = TensorSpec(entry.spec.dtype, entry.spec.shape[1:])
    return TensorEntry(entry.name, entry.file, entry.offset + index * spec.nbytes, spec)


def decode_output(
    name: str,
    layout: Layout,
    encoded: dict[str, torch.Tensor],
    item: ModulePlan,
    device: torch.device,
) -> list[QuantizedWeight]:
    """The parts of an output module as logical weights.

    Raises:
        VerificationError: the layout's tensors hold what it cannot have made.
    """
    moved = {local: tensor.to(device) for local, tensor in encoded.items()}
    try:
        weight = layout.decode(moved, item.spec)
        again = layout.encode(weight)
        for local, tensor in again.items():
            if not same_bits(tensor, moved[local]):
                raise VerificationError(
                    f"tensor {name}.{local}: holds bytes that layout {layout.name} does not make"
                )
        return unstack(weight, [part.spec for part in item.parts])
    except ValueError as error:
        raise VerificationError(f"module {name}: {error}") from None
