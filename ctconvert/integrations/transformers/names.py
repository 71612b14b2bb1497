"""Where a tensor of a checkpoint goes in a transformers model, by transformers' own rules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ctconvert.errors import ConversionError

#: Tensors a model need not have a place for: scales of a quantised KV cache, and what older files
#: hold of rotary embeddings, which transformers computes.
_UNUSED = ("k_scale", "v_scale", "q_scale", "inv_freq")
#: The operations that only put experts' weights together.
_STACKING = {"MergeModulelist", "Concatenate"}
#: Where the modules of one expert go, in a model that has experts as 3-D parameters and no rule for
#: taking them one by one: the parameter, which part of it along N, of how many.
_ONE_BY_ONE = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
}


@dataclass(frozen=True)
class InModule:
    """The weight of a Linear or an Embedding, by its path."""

    path: str


@dataclass(frozen=True)
class InExperts:
    """A part of the 3-D parameter ``name`` of the experts at ``path``.

    Of expert ``number``, or of all where None; ``order`` of ``parts`` along N.
    """

    path: str
    name: str
    number: int | None
    order: int
    parts: int


class Names:
    """How transformers renames what a checkpoint holds, for one model as it is now.

    Args:
        model: on the meta device.
        conversions: what is done to names and weights; the model's own where None.
    """

    def __init__(self, model: Any, conversions: list[Any] | None = None) -> None:
        self.model = model
        self.kind = type(model).__name__
        self.tensors: dict[str, torch.Tensor] = model.state_dict()
        found = get_model_conversion_mapping(model) if conversions is None else conversions
        self.renamings = [entry for entry in found if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in found if isinstance(entry, WeightConverter)]

    def renamed(self, name: str) -> tuple[str, str | None]:
        """The model's name, and the pattern of the converter that changes the tensor, if any.

        As ``convert_and_load_state_dict_in_model`` of ``transformers/core_model_loading.py`` does.
        """
        prefix, tensors = self.model.base_model_prefix, self.tensors
        key, pattern = rename_source_key(name, self.renamings, self.converters, prefix, tensors)
        if key not in tensors and name in tensors:
            key, pattern = rename_source_key(name, [], [], prefix, tensors)
        return key, pattern

    def ignored(self, name: str) -> bool:
        """Whether the model says itself that it does not use a tensor of that name."""
        if name.rpartition(".")[2] in _UNUSED:
            return True
        key, _ = self.renamed(name)
        patterns = self.model._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, text) for pattern in patterns for text in (key, name))

    def place(self, source: str) -> InModule | InExperts | None:
        """Where the weight of a module of the source goes; None where the model does not use it.

        Raises:
            ConversionError: nowhere, or into something a kernel cannot stand for.
        """
        key, pattern = self.renamed(f"{source}.weight")
        if pattern is not None:
            return self._converted(source, key, pattern)
        path = key.removesuffix(".weight")
        if key in self.tensors and path != key:
            self._check_plain(source, self.model.get_submodule(path))
            return InModule(path)
        whole, pattern = self.renamed(source)
        if pattern is None and whole in self.tensors and self.tensors[whole].ndim == 3:
            path, _, leaf = whole.rpartition(".")
            return InExperts(path, leaf, None, 0, 1)
        if (found := self._one_by_one(whole)) is not None:
            return found
        if self.ignored(f"{source}.weight"):
            return None
        raise ConversionError(f"module {source}: {self.kind} has no such module")

    def _one_by_one(self, name: str) -> InExperts | None:
        """As quantisers save the experts of gpt-oss: ``experts.3.gate_proj``."""
        rest, _, leaf = name.rpartition(".")
        path, _, number = rest.rpartition(".")
        parameter, order, parts = _ONE_BY_ONE.get(leaf, ("", 0, 0))
        tensor = self.tensors.get(f"{path}.{parameter}")
        if tensor is None or tensor.ndim != 3 or not number.isdecimal():
            return None
        return InExperts(path, parameter, int(number), order, parts)

    def _check_plain(self, source: str, module: nn.Module) -> None:
        # A class of its own may do more, as Gemma's embedding, which scales what it looks up.
        if type(module) not in (nn.Linear, nn.Embedding):
            raise ConversionError(
                f"module {source}: a kernel cannot stand for {type(module).__name__}, which is no "
                "plain Linear or Embedding; ctconvert.runtime.load gives the modules by themselves"
            )

    def _converted(self, source: str, key: str, pattern: str) -> InExperts:
        converter = next(c for c in self.converters if pattern in c.source_patterns)
        operations = {type(operation).__name__ for operation in converter.operations}
        numbers = [part for part in source.split(".") if part.isdecimal()]
        stacked = key in self.tensors and self.tensors[key].ndim == 3 and numbers
        if not stacked or not operations <= _STACKING:
            raise ConversionError(
                f"module {source}: {self.kind} changes its weight at load "
                f"({', '.join(sorted(operations))}), which cannot be done to a kernel's"
            )
        path, _, leaf = key.rpartition(".")
        order = converter.source_patterns.index(pattern)
        return InExperts(path, leaf, int(numbers[-1]), order, len(converter.source_patterns))


class Exactly(WeightRenaming):
    """Gives a converted tensor a name that no other rule matches, and then its own.

    The first of the renamings hides it, the last shows it: between them transformers' own, made
    for the names of plain weights, find nothing to change.
    """

    __slots__ = ("numbers", "shown", "shows")

    def __init__(self, names: dict[str, str], shows: bool) -> None:
        super().__init__(["^$"], ["^$"])
        self.numbers = {name: number for number, name in enumerate(names)}
        self.shown = list(names.values())
        self.shows = shows

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if self.shows:
            hidden = source_key.split("\0")[1:2]  # a prefix may have been added
            return (self.shown[int(hidden[0])] if hidden else source_key), None
        number = self.numbers.get(source_key)
        return (source_key if number is None else f"\0{number}\0"), None

    def was_used(self) -> bool:
        """It plays no part in saving, which is refused."""
        return False
