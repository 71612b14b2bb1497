"""Puts the kernels of a converted checkpoint, empty, into a transformers model on the meta device.

What fills them is transformers' own loader, by the names that are worked out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ctconvert.assembly import Assembly, Concat, Pad, Part, Stack, leaves, units
from ctconvert.errors import ConversionError, UsageError
from ctconvert.integrations.transformers.names import InExperts, InModule, Names
from ctconvert.integrations.transformers.standins import (
    Apart,
    Columns,
    KernelMoe,
    KernelSlot,
    SharedTable,
)
from ctconvert.records import Convert, Plan
from ctconvert.runtime.kernels import Binding
from ctconvert.runtime.loading import binding
from ctconvert.runtime.modules import (
    FusedPart,
    KernelEmbedding,
    KernelExperts,
    KernelLinear,
    TiedHead,
)
from ctconvert.store.safetensors import TensorEntry
from ctconvert.transforms.dtypes import torch_dtype

Kernel = KernelLinear | KernelEmbedding | KernelExperts


@dataclass(frozen=True)
class _Piece:
    """A kernel of experts: of which, and which part of their projection."""

    kernel: KernelLinear | KernelExperts
    module: Convert
    numbers: tuple[int, ...]
    orders: tuple[int, ...]
    parts: int
    kept: tuple[slice, ...] | None


class Placed:
    """The kernels in a model, and the names that the checkpoint's tensors have there.

    Args:
        model: on the meta device, as transformers makes it.
        plan: of the checkpoint.
        dtype: of the activations.

    Raises:
        ConversionError: the model has no place for a module, or another one's shape.
        UsageError: there is no kernel for a module, or none for that dtype.
    """

    def __init__(self, model: Any, plan: Plan, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self.kernels: dict[str, Kernel] = {}
        #: The tensors of the converted modules.
        self.entries: dict[str, TensorEntry] = {}
        #: Tensors of modules that the model says it does not use.
        self.unused: set[str] = set()
        self._names = Names(model)
        self._experts: dict[str, dict[str, list[_Piece]]] = {}
        for module in plan.modules:
            self._put(module)
        for path, found in self._experts.items():
            self._put_experts(path, found)
        present = {self._names.renamed(copy.name)[0] for copy in plan.copies}
        self._share(present)
        #: Names in the checkpoint to names in the model.
        self.names = self._find_names({module.name: module for module in plan.modules})

    def _put(self, module: Convert) -> None:
        recipe = module.recipe
        parts = list(leaves(recipe.assembly))
        if _is_cut(recipe.assembly):
            raise ConversionError(
                f"module {module.name}: it is cut for tensor parallelism, and transformers loads "
                "whole models; convert the checkpoint without"
            )
        places = [self._names.place(module.sources[part.source].name) for part in parts]
        if None in places:
            self.unused |= {entry.name for entry in module.made}
            return
        for local, entry in module.beside.items():
            if local != "bias" and not self._names.ignored(entry.name):
                raise ConversionError(
                    f"tensor {entry.name}: {self._names.kind} has no place for it"
                )
        bound = binding(module)
        kernel = self._kernel(module, bound)
        self.kernels[module.name] = kernel
        if all(isinstance(place, InModule) for place in places):
            self._put_plain(module, kernel, [place.path for place in places])  # type: ignore[union-attr]
        elif all(isinstance(place, InExperts) for place in places):
            self._add_experts(module, kernel, parts, places)  # type: ignore[arg-type]
        else:
            raise ConversionError(f"module {module.name}: it is of experts and of others at once")

    def _kernel(self, module: Convert, bound: Binding) -> Kernel:
        spec = bound.spec
        if spec.element in ("F16", "BF16") and torch_dtype(spec.element) != self.dtype:
            held = torch_dtype(spec.element)
            raise UsageError(
                f"module {module.name}: weights of {str(held).removeprefix('torch.')} multiply "
                f"activations of that dtype only: pass dtype={held}"
            )
        cut = len(module.prefix)
        tensors = {entry.name[cut:]: _empty(entry) for entry in module.outputs}
        self.entries |= {entry.name: entry for entry in module.outputs}
        bias = None
        if (entry := module.beside.get("bias")) is not None:
            bias = _empty(entry)
            self.entries[entry.name] = entry
        if spec.embedding:
            table = KernelEmbedding(bound, tensors, bias)
            table.dtype = self.dtype
            return table
        return (KernelLinear if module.experts is None else KernelExperts)(bound, tensors, bias)

    # --- plain modules ---

    def _put_plain(self, module: Convert, kernel: Kernel, paths: Sequence[str]) -> None:
        if isinstance(kernel, KernelExperts):
            raise ConversionError(f"module {module.name}: the model has no experts there")
        spec, shared = kernel.binding.spec, dict[str, Any]()
        widths = kernel.binding.widths if len(paths) > 1 else (spec.n,)
        for index, (path, width) in enumerate(zip(paths, widths, strict=True)):
            old = self.model.get_submodule(path)
            shape = (width, spec.k)
            if tuple(old.weight.shape) != shape or isinstance(old, nn.Embedding) != spec.embedding:
                raise ConversionError(
                    f"module {module.name}: it is {list(shape)}, and {path} of "
                    f"{self._names.kind} is {type(old).__name__} {list(old.weight.shape)}"
                )
            if (getattr(old, "bias", None) is None) != (kernel.bias is None):
                has, lacks = ("a bias", "none") if kernel.bias is not None else ("no bias", "one")
                raise ConversionError(
                    f"module {module.name}: it has {has}, and {path} of {self._names.kind} {lacks}"
                )
            if len(paths) == 1:
                assert isinstance(kernel, KernelLinear | KernelEmbedding)
                self._replace(path, KernelSlot(kernel, shape, self.dtype))
            else:
                assert isinstance(kernel, KernelLinear)
                part = FusedPart(kernel, index, shared)
                self._replace(path, KernelSlot(part, shape, self.dtype))

    def _replace(self, path: str, module: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        owner = self.model.get_submodule(parent)
        setattr(owner, leaf, module)
        # transformers initialises what it did not load and reaches for the weights of an owner's
        # modules there; nothing of these is left to initialise.
        for inner in module.modules():
            inner._is_hf_initialized = True  # type: ignore[assignment]
        if not owner._non_persistent_buffers_set:
            owner._is_hf_initialized = True

    # --- experts ---

    def _add_experts(
        self, module: Convert, kernel: Kernel, parts: Sequence[Part], places: Sequence[InExperts]
    ) -> None:
        assert isinstance(kernel, KernelLinear | KernelExperts)
        place_of = dict(zip(parts, places, strict=True))
        numbers, orders = [], set()
        for unit in units(module.recipe.assembly):
            own = [(part, place_of[part]) for part in leaves(unit)]
            found = {part.expert if one.number is None else one.number for part, one in own}
            where = {(one.path, one.name, one.parts) for _, one in own}
            if len(found) != 1 or None in found or len(where) != 1:
                raise ConversionError(f"module {module.name}: it is of several experts at once")
            numbers.append(found.pop())
            orders.add(tuple(one.order for _, one in own))
        first = places[0]
        if len(orders) != 1 or len({(place.path, place.name) for place in places}) != 1:
            raise ConversionError(f"module {module.name}: its experts are not alike")
        piece = _Piece(
            kernel,
            module,
            tuple(number for number in numbers if number is not None),
            orders.pop(),
            first.parts,
            _kept(module),
        )
        self._experts.setdefault(first.path, {}).setdefault(first.name, []).append(piece)

    def _put_experts(self, path: str, found: dict[str, list[_Piece]]) -> None:
        old = self.model.get_submodule(path)
        kind = type(old).__name__
        name = next(iter(found.values()))[0].module.name
        wanted = {"gate_up_proj" if getattr(old, "has_gate", True) else "up_proj", "down_proj"}
        if not hasattr(old, "_apply_gate") or not wanted <= old._parameters.keys():
            raise ConversionError(
                f"module {name}: a kernel cannot stand for {kind}, which are not experts of "
                "transformers' common kind"
            )
        if getattr(old, "has_post_expert_norm", False):
            raise ConversionError(
                f"module {name}: a kernel cannot stand for {kind}, which say has_post_expert_norm"
            )
        columns = {leaf: self._columns(old, path, leaf, pieces) for leaf, pieces in found.items()}
        self._replace(path, KernelMoe(old, columns))

    def _columns(self, old: Any, path: str, leaf: str, pieces: Sequence[_Piece]) -> Columns:
        shape = tuple(self._names.tensors[f"{path}.{leaf}"].shape)
        if getattr(old, "is_transposed", False):  # [E, K, N], where a checkpoint has [E, N, K]
            shape = (shape[0], shape[2], shape[1])
        biased = [piece.kernel.bias is not None for piece in pieces]
        if any(biased) and not (all(biased) and getattr(old, "has_bias", False)):
            name = pieces[biased.index(True)].module.name
            lacks = "none" if all(biased) else "not all of them"
            raise ConversionError(
                f"module {name}: it has a bias, and {path}.{leaf} of {self._names.kind} {lacks}"
            )
        by_order: dict[tuple[int, ...], list[_Piece]] = {}
        for piece in pieces:
            by_order.setdefault(piece.orders, []).append(piece)
        every = list(range(shape[0]))
        rows, parts = 0, list[KernelExperts | Apart]()
        for own in (by_order[orders] for orders in sorted(by_order)):
            own.sort(key=lambda piece: piece.numbers)
            name, spec = own[0].module.name, own[0].kernel.binding.spec
            if [number for piece in own for number in piece.numbers] != every:
                raise ConversionError(
                    f"module {name}: not all {shape[0]} experts of {path}.{leaf} are converted, "
                    "each once; convert all of them or none"
                )
            sources = [s.weight for s in own[0].module.sources]
            first = units(own[0].module.recipe.assembly)[0]
            rows += sum(sources[part.source].n for part in leaves(first))
            if any(piece.kernel.binding.spec.k != shape[2] for piece in own) or any(
                piece.kernel.binding.spec.n != spec.n for piece in own
            ):
                raise ConversionError(
                    f"module {name}: it does not fit {path}.{leaf}, {list(shape)}, of "
                    f"{self._names.kind}"
                )
            if isinstance(own[0].kernel, KernelExperts):
                if len(own) != 1:
                    raise ConversionError(f"module {name}: its experts are in several stacks")
                parts.append(own[0].kernel)
            else:
                singles = [piece.kernel for piece in own]
                parts.append(Apart([one for one in singles if isinstance(one, KernelLinear)]))
        orders = sorted(order for group in by_order for order in group)
        if orders != list(range(pieces[0].parts)) or rows != shape[1]:
            raise ConversionError(
                f"module {pieces[0].module.name}: with {rows} rows it is not the whole of "
                f"{path}.{leaf}, {list(shape)}, of {self._names.kind}"
            )
        if any(list(group) != sorted(group) for group in by_order):
            raise ConversionError(f"module {pieces[0].module.name}: its parts are in another order")
        # Of several parts that the model has row by row in turn, as gpt-oss its gate and up.
        in_turn = len(orders) > 1 and not getattr(old, "is_concatenated", True)
        return Columns(parts, pieces[0].kept if len(by_order) == 1 else None, all(biased), in_turn)

    # --- tied embeddings ---

    def _share(self, present: set[str]) -> None:
        """Where a tied table was converted, gives the others of the tie its rows."""
        tied: dict[str, str] = self.model.all_tied_weights_keys
        for source in set(tied.values()):
            group = [source, *(target for target, own in tied.items() if own == source)]
            slots = {key: self.model.get_submodule(key.rpartition(".")[0]) for key in group}
            if not any(isinstance(slot, KernelSlot) for slot in slots.values()):
                continue
            tables = [
                slot.kernel
                for slot in slots.values()
                if isinstance(slot, KernelSlot) and isinstance(slot.kernel, KernelEmbedding)
            ]
            for key, slot in slots.items():
                tied.pop(key, None)
                if isinstance(slot, KernelSlot) or key in present or not tables:
                    continue
                stand_in: TiedHead | SharedTable
                if isinstance(slot, nn.Linear) and slot.bias is None:
                    stand_in = TiedHead(tables[0])
                elif type(slot) is nn.Embedding:
                    stand_in = SharedTable(tables[0])
                else:
                    raise ConversionError(
                        f"{key}: it is tied to a converted table, and a kernel cannot stand for "
                        f"{type(slot).__name__}"
                    )
                shape = tuple(slot.weight.shape)
                self._replace(key.rpartition(".")[0], KernelSlot(stand_in, shape, self.dtype))

    # --- names ---

    def _find_names(self, modules: dict[str, Convert]) -> dict[str, str]:
        paths = {id(module): path for path, module in self.model.named_modules()}
        found = dict[str, str]()
        for name, kernel in self.kernels.items():
            module, path = modules[name], paths[id(kernel)]
            cut = len(module.prefix)
            found |= {entry.name: f"{path}.{entry.name[cut:]}" for entry in module.outputs}
            if (entry := module.beside.get("bias")) is not None:
                found[entry.name] = f"{path}.bias"
        return found


def _empty(entry: TensorEntry) -> torch.Tensor:
    return torch.empty(entry.spec.shape, dtype=torch_dtype(entry.spec.dtype), device="meta")


def _is_cut(assembly: Assembly) -> bool:
    if isinstance(assembly, Part):
        return False
    if isinstance(assembly, Concat | Stack):
        return any(_is_cut(part) for part in assembly.parts)
    return not isinstance(assembly, Pad) or _is_cut(assembly.part)


def _kept(module: Convert) -> tuple[slice, ...] | None:
    """The columns of each part in what an expert makes, where parts are padded one by one."""
    unit = units(module.recipe.assembly)[0]
    real = [module.specs[part.source].n for part in leaves(unit)]
    starts = [0]
    for width in module.widths:
        starts.append(starts[-1] + width)
    if list(module.widths) == real:
        return None
    return tuple(
        slice(start, start + n) for (start, _), n in zip(pairwise(starts), real, strict=True)
    )
