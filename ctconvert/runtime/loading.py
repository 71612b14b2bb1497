"""Loads the modules of a converted checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from ctconvert.assembly import Part, leaves
from ctconvert.errors import ConversionError, UsageError, VerificationError
from ctconvert.layouts import get as get_layout
from ctconvert.output import Output
from ctconvert.records import Convert, rank_prefix
from ctconvert.runtime import kernels
from ctconvert.runtime.kernels import Binding
from ctconvert.runtime.modules import (
    KernelEmbedding,
    KernelExperts,
    KernelLinear,
    expert_tensors,
)
from ctconvert.store.safetensors import TensorEntry
from ctconvert.transforms import device as devices

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
        self.folder = Path(self.output.where)
        self.converted = {module.name: module for module in self.output.plan.modules}
        self.bindings = {name: binding(module) for name, module in self.converted.items()}
        self._stack = ExitStack()
        self._files = {
            shard.name: self._stack.enter_context(
                safe_open(self.folder / shard.name, "pt", device=str(self.device))
            )
            for shard in self.output.plan.shards
        }
        try:
            self.output.check_unchanged()  # what is open now is what its manifest means
        except ConversionError:
            self._stack.close()
            raise

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

    def read(self, entries: Iterable[TensorEntry]) -> dict[str, torch.Tensor]:
        """Tensors of the checkpoint on the device, by full name."""
        return {entry.name: self._files[entry.file].get_tensor(entry.name) for entry in entries}

    def load(self, names: Iterable[str]) -> Modules:
        """What :meth:`modules` gives of several converted modules."""
        return {key: made for name in names for key, made in self.modules(name).items()}

    def modules(self, name: str) -> Modules:
        """The modules of one converted module: itself, or ``NAME.e`` for each expert of a 3-D one.

        Where a kernel runs the experts of a 3-D one together, ``NAME`` is that, of the same
        tensors. Those go from the file to the device once; on the CPU they stay mapped.
        """
        binding, module = self.bindings[name], self.converted[name]
        cut = len(module.prefix)
        tensors = {key[cut:]: tensor for key, tensor in self.read(module.outputs).items()}
        bias = None
        if (entry := module.beside.get("bias")) is not None:
            bias = self.read([entry])[entry.name]
        elif module.rank is not None and "bias" in module.sources[0].beside:
            bias = self._rank_bias(module)
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

    def _rank_bias(self, module: Convert) -> torch.Tensor | None:
        """The rank's rows of what all ranks have; where K is cut, the first rank alone adds it."""
        if any((part.columns or (0, 0))[0] for part in leaves(module.units[0])):
            return None
        each = [
            torch.cat([self._part_bias(module, part) for part in leaves(unit)])
            for unit in module.units
        ]
        return each[0] if module.experts is None else torch.stack(each)

    def _part_bias(self, module: Convert, part: Part) -> torch.Tensor:
        name = module.sources[part.source].beside["bias"].name
        whole = self.read([self.output.plan.entries[name]])[name]
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
