"""Loads the modules of a converted checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ctconvert.assembly import Part, leaves
from ctconvert.errors import ConversionError, UsageError, VerificationError
from ctconvert.layouts import get as get_layout
from ctconvert.output import Output
from ctconvert.records import Convert, rank_prefix
from ctconvert.runtime import kernels, reading
from ctconvert.runtime.kernels import Binding
from ctconvert.runtime.modules import (
    KernelEmbedding,
    KernelExperts,
    KernelLinear,
    expert_tensors,
)
from ctconvert.store.safetensors import TensorEntry
from ctconvert.transforms import device as devices

Tensors = dict[str, torch.Tensor]
Modules = dict[str, KernelLinear | KernelEmbedding | KernelExperts]


def binding(module: Convert) -> Binding:
    """What a converted module is, as its kernel needs to know it.

    Raises:
        VerificationError: its layout, or this version of it, is not known here.
    """
    recipe = module.recipe
    layout = get_layout(recipe.layout)
    if layout is None or layout.version != recipe.layout_version:
        raise VerificationError(
            f"module {module.name}: layout {recipe.layout} version {recipe.layout_version} is not "
            "known to this ctconvert; use the one that wrote it",
            module=module.name,
        )
    logical = module.logical
    return Binding(
        layout=recipe.layout,
        spec=logical,
        padded=(recipe.weight.n, recipe.weight.k),
        widths=module.widths,
    )


class Loader:
    """A converted checkpoint, open: its modules and tensors, read straight to the device by name.

    On the CPU tensors stay mapped.

    Args:
        out: a converted checkpoint, or its directory.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``xpu``.

    Raises:
        UsageError: there is no such directory or device.
        VerificationError: the manifest is damaged or does not fit the files.
        ConversionError: it is no longer the checkpoint that was opened.
    """

    def __init__(self, out: str | Path | Output, device: str = "auto") -> None:
        self.output = out if isinstance(out, Output) else Output.open(out)
        self.device = devices.resolve(device)
        self.converted = {module.name: module for module in self.output.plan.modules}
        self.bindings = {name: binding(module) for name, module in self.converted.items()}
        self._stack = ExitStack()
        self._stack.callback(self.output.store.close)
        self._mapped: dict[str, Any] = {}
        try:
            for shard in self.output.plan.shards:
                self._open(shard.name)
            self.output.check_unchanged()  # what is open now is what its manifest means
        except ConversionError:
            self._stack.close()
            raise

    def _open(self, file: str) -> None:
        if self.device.type == "cpu":
            path = Path(self.output.where) / file
            self._mapped[file] = self._stack.enter_context(safe_open(path, "pt"))
        else:
            self.output.store.read(file, 0, 1)  # and the store holds it open

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def sizes(self) -> dict[str, int]:
        """Bytes of every converted module."""
        return {
            name: sum(entry.nbytes for entry in module.made)
            for name, module in self.converted.items()
        }

    def read(self, entries: Iterable[TensorEntry]) -> Tensors:
        """Tensors of the checkpoint on the device, by full name."""
        if self.device.type == "cpu":
            return {one.name: self._mapped[one.file].get_tensor(one.name) for one in entries}
        return reading.read(self.output.store, entries, self.device)

    def modules(self, name: str) -> Modules:
        """The modules of one converted module: itself, or ``NAME.e`` for each expert of a 3-D one.

        Where a kernel runs the experts of a 3-D one together, ``NAME`` is that, of the same
        tensors. Those go from the file to the device once; on the CPU they stay mapped.
        """
        return self.load([name])

    def load(self, names: Iterable[str]) -> Modules:
        """What :meth:`modules` gives of several converted modules, read at once."""
        chosen = [self.converted[name] for name in names]
        entries = {entry.name: entry for module in chosen for entry in self._entries(module)}
        tensors = self.read(entries.values())
        return {key: made for m in chosen for key, made in self._modules(m, tensors).items()}

    def _entries(self, module: Convert) -> list[TensorEntry]:
        """What of the checkpoint a module is made of."""
        found = list(module.outputs)
        if "bias" in module.beside:
            found.append(module.beside["bias"])
        elif module.rank is not None and "bias" in module.sources[0].beside:
            names = [source.beside["bias"].name for source in module.sources]
            found += [self.output.plan.entries[name] for name in names]
        return found

    def _modules(self, module: Convert, given: Tensors) -> Modules:
        name, binding = module.name, self.bindings[module.name]
        tensors = {one.name[len(module.prefix) :]: given[one.name] for one in module.outputs}
        bias = None
        if (entry := module.beside.get("bias")) is not None:
            bias = given[entry.name]
        elif module.rank is not None and "bias" in module.sources[0].beside:
            bias = _rank_bias(module, given)
        kind = KernelEmbedding if binding.spec.embedding else KernelLinear
        if module.experts is None:
            return {name: kind(binding, tensors, bias)}
        found: Modules = {}
        for index in range(module.experts):
            one = expert_tensors(tensors, index)
            found[f"{name}.{index}"] = kind(binding, one, None if bias is None else bias[index])
        if kernels.get(binding.layout, binding.spec).grouped(binding.spec) is not None:
            found[name] = KernelExperts(binding, tensors, bias)
        return found


def _rank_bias(module: Convert, given: Tensors) -> torch.Tensor | None:
    """The rank's rows of what all ranks have; where K is cut, the first rank alone adds it."""
    if any((part.columns or (0, 0))[0] for part in leaves(module.units[0])):
        return None
    each = [
        torch.cat([_part_bias(module, part, given) for part in leaves(unit)])
        for unit in module.units
    ]
    return each[0] if module.experts is None else torch.stack(each)


def _part_bias(module: Convert, part: Part, given: Tensors) -> torch.Tensor:
    whole = given[module.sources[part.source].beside["bias"].name]
    if part.expert is not None:
        whole = whole[part.expert]
    return whole if part.rows is None else whole[slice(*part.rows)]


def load(out: str | Path, device: str = "auto", rank: int | None = None) -> Modules:
    """The converted modules of a checkpoint, by name, ready to be called.

    Tensors go from the file to the device once; on the CPU they stay mapped. The expert ``e`` of a
    stack is under ``NAME.e``, and under ``NAME`` all of them as one :class:`KernelExperts` where a
    kernel takes them so. :class:`Loader` gives them one at a time.

    Args:
        out: a converted checkpoint.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``xpu``.
        rank: of a checkpoint cut for tensor parallelism, whose modules, which have the names of
            whole ones; ``NAME.e`` then counts the rank's experts. The product of one that is cut
            along K is to be summed over the ranks, the first of which adds the bias.

    Raises:
        UsageError: there is no such directory or device, or no such rank.
        VerificationError: the manifest is damaged or does not fit the files.
    """
    with Loader(out, device) as loader:
        ranks = loader.output.plan.options.tensor_parallel
        if rank is None and ranks > 1:
            raise UsageError(f"{out}: cut for {ranks} ranks; say which to load: rank=0")
        if not 0 <= (rank or 0) < ranks:
            raise UsageError(f"{out}: there is no rank {rank} of {ranks}")
        chosen = [
            module.name for module in loader.converted.values() if module.rank in (None, rank)
        ]
        return {
            name.removeprefix(rank_prefix(rank)): made for name, made in loader.load(chosen).items()
        }
