"""The jobs that transform weights: convert, restore, compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from ctconvert import codec, records
from ctconvert.errors import ConversionError, VerificationError
from ctconvert.planning.memory import comparison_bytes, item_bytes
from ctconvert.specs import TensorSpec
from ctconvert.store.base import Store
from ctconvert.store.safetensors import TensorEntry, total_bytes
from ctconvert.transforms.device import is_out_of_memory
from ctconvert.transforms.dtypes import empty, from_bytes, raw_bytes
from ctconvert.transforms.threads import stay_in_thread
from ctconvert.work.jobs import Context, Done, Job, PartJob, TensorWriter, copy_tensors, written
from ctconvert.work.lanes import lanes_of


def read_tensor(store: Store, entry: TensorEntry, pinned: bool = False) -> torch.Tensor:
    """One tensor of a store, on the CPU, in memory of its own; ``pinned``: for a device's copy."""
    if pinned:
        data = torch.empty(entry.nbytes, dtype=torch.uint8, pin_memory=True)
    else:
        data = empty((entry.nbytes,), torch.uint8)
    if entry.nbytes:
        store.read_into(entry.file, entry.offset, data.numpy().data)
    return from_bytes(data, entry.spec)


def _reader(store: Store, device: torch.device) -> codec.Read:
    """Reads what is then copied to the device."""
    return partial(read_tensor, store, pinned=device.type != "cpu")


@contextmanager
def _transforming(name: str, context: Context) -> Iterator[torch.device]:
    """On the thread's device and stream, and one thread for a worker.

    One line for a host or a device without memory left.
    """
    stay_in_thread()
    lane = lanes_of(context).mine()
    device = lane.device
    try:
        with lane.current():
            yield device
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "fewer --workers" if device.type == "cpu" else "--device cpu"
        raise ConversionError(f"{name}: out of memory on {device}; use {advice}") from None


def _common_power(context: Context, item: records.Convert) -> int | None:
    if item.experts is None:
        return None
    with context.budget.hold(item.input_bytes):
        return codec.common_power(item, partial(read_tensor, context.source))


@dataclass(frozen=True)
class ConvertJob(PartJob):
    """A module: its source tensors through the layout."""

    item: records.Convert

    def run(self, context: Context) -> Done:
        item, units = self.item, self.units
        writers: dict[str, TensorWriter] = {}
        for entry in item.outputs:
            one = entry.nbytes // len(item.units)
            writers[entry.name] = TensorWriter(context, entry, units.start * one, len(units) * one)
        kernels = item.recipe.layout, item.recipe.weight.bits
        with _transforming(item.name, context) as device, lanes_of(context).compiling(kernels):
            read = _reader(context.source, device)
            power = context.once(item.name, partial(_common_power, context, item))
            for unit in units:
                context.check_running()
                with context.budget.hold(item_bytes(item)):
                    for local, tensor in codec.encode(item, unit, read, device, power).items():
                        writers[item.prefix + local].put(raw_bytes(tensor))
                    del tensor
        hashes: dict[str, str] = {}
        for local, output in item.beside.items() if self.first == 0 else ():
            originals = [source.beside[local] for source in item.sources]
            hashes[output.name] = copy_tensors(context, originals, output)
        return written(self, writers, hashes)


@dataclass(frozen=True)
class RestoreJob(PartJob):
    """Converted modules back to their source tensors."""

    item: records.Restore

    def run(self, context: Context) -> Done:
        item = self.item
        outputs = {entry.name: entry for entry in item.outputs}
        writers: dict[str, TensorWriter] = {}
        with _transforming(item.name, context) as device:
            read = _reader(context.source, device)
            for unit in self.units:
                context.check_running()
                with context.budget.hold(item_bytes(item)):
                    for source, expert, tensors in codec.restore(item, unit, read, device):
                        for local, tensor in tensors.items():
                            name = source.tensors[local].name
                            if name not in writers:
                                own = None if local in source.shared else expert
                                writers[name] = self._writer(
                                    context, outputs[name], source.experts, own
                                )
                            writers[name].put(raw_bytes(tensor))
                        del tensors, tensor
        hashes: dict[str, str] = {}
        for module in item.modules if self.first == 0 else ():
            self._beside(context, module, hashes)
            for source in module.sources:
                for local, data in source.values.items():
                    name = source.tensors[local].name
                    if name not in writers:
                        writers[name] = TensorWriter(context, outputs[name])
                        writers[name].put(memoryview(bytes.fromhex(data)))
        return written(self, writers, hashes)

    def _writer(
        self, context: Context, entry: TensorEntry, experts: int | None, first: int | None
    ) -> TensorWriter:
        """Of a tensor, or of this part's experts in it: the ``first`` and those after it."""
        if experts is None or first is None:
            return TensorWriter(context, entry)
        if first != self.first:
            raise AssertionError(f"{entry.name}: expert {first} comes in unit {self.first}")
        one = entry.nbytes // experts
        return TensorWriter(context, entry, first * one, len(self.units) * one)

    def _beside(self, context: Context, module: records.Convert, hashes: dict[str, str]) -> None:
        """Gives each source its rows of a tensor that stands beside the weight (``bias``)."""
        places = {entry.name: entry for entry in self.item.outputs}
        for local, joined in module.beside.items():
            offset = joined.offset
            for source in module.sources:
                output = places[source.beside[local].name]
                rows = TensorEntry(joined.name, joined.file, offset, output.spec)
                hashes[output.name] = copy_tensors(context, [rows], output)
                offset += output.nbytes


@dataclass(frozen=True)
class CompareSourcesJob(Job):
    """A source module that must hold the weights of another, if not the same bytes.

    Two 2:4 sparse modules may differ in which zeros they keep.
    """

    made: records.SourceModule
    original: records.SourceModule

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.made.name

    def run(self, context: Context) -> Done:
        assert context.against is not None
        spec, count = self.made.weight, self.made.experts or 1
        dense = TensorSpec(spec.element, (spec.n, spec.k)).nbytes
        whole = [e for local, e in self.original.tensors.items() if local not in self.made.values]
        share = total_bytes(whole) // count
        stores = context.source, context.against
        with _transforming(self.name, context) as device:
            reads = [_reader(store, device) for store in stores]
            for expert in [None] if self.made.experts is None else range(count):
                context.check_running()
                with context.budget.hold(2 * (self.made.nbytes // count + dense)):
                    made, original = (
                        codec.source_weight(source, expert, read, device)
                        for source, read in zip((self.made, self.original), reads, strict=True)
                    )
                    if wrong := codec.first_difference(original, made):
                        raise VerificationError(
                            f"module {self.name}: {wrong} differs from the source's",
                            module=self.name,
                        )
                context.progress.advance(share)
        return Done(self)


@dataclass(frozen=True)
class CompareJob(PartJob):
    """A module of an output that must hold what a source's modules hold."""

    item: records.Convert

    def run(self, context: Context) -> Done:
        assert context.against is not None
        stores = context.source, context.against
        with _transforming(self.item.name, context) as device:
            made, original = (_reader(store, device) for store in stores)
            for unit in self.units:
                context.check_running()
                with context.budget.hold(comparison_bytes(self.item)):
                    count = codec.compare(self.item, unit, made, original, device)
                context.progress.advance(count)
        return Done(self)
