"""The rules that say of which source modules an output module is made."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ctconvert.assembly import Assembly, Concat, Pad, Part, Stack, assembled, can_join, units
from ctconvert.planning.describe import Description, Module
from ctconvert.records import SourceModule, rank_prefix
from ctconvert.specs import WeightSpec
from ctconvert.store.safetensors import TensorEntry

#: Fused modules and their parts, in order, under the names vLLM uses.
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
#: Attention whose queries read another input than its keys and values, by the module's name.
_CROSS_ATTENTION = re.compile(r"cross|encoder_attn|encdec|enc_dec|encoder_decoder", re.IGNORECASE)
#: What holds nothing else, whatever its attention is called: a few latents query a picture.
_RESAMPLER = re.compile(r"perceiver|resampler", re.IGNORECASE)


@dataclass(frozen=True)
class Candidate:
    """An output module before its layout is chosen; ``joint`` and ``rank`` as in :class:`Convert`.

    ``name`` is without the rank.
    """

    name: str
    sources: tuple[SourceModule, ...]
    assembly: Assembly
    joint: Literal[".", "_"] = "."
    rank: int | None = None

    @property
    def prefix(self) -> str:
        """How the full name of every tensor of it begins; the local name follows."""
        return rank_prefix(self.rank) + self.name + self.joint

    @property
    def experts(self) -> int | None:
        """The outputs' leading dimension where their tensors are stacks, else None."""
        return len(self.assembly.parts) if isinstance(self.assembly, Stack) else None

    @property
    def weight(self) -> WeightSpec:
        """The spec of one unit."""
        return assembled(self.assembly, [source.weight for source in self.sources])

    @property
    def beside(self) -> dict[str, list[TensorEntry]]:
        """The tensors that stand beside the weights, one of each source, by local name.

        None of a rank's: all ranks have those whole.
        """
        if self.rank is not None:
            return {}
        return {
            local: [source.beside[local] for source in self.sources]
            for local in self.sources[0].beside
        }

    @property
    def stacked(self) -> int | None:
        """:attr:`experts` where the source has them one by one, else None."""
        return self.experts if self.sources[0].experts is None else None


def alone(source: SourceModule) -> Candidate:
    """A module by itself; 3-D tensors are stacks of their experts."""
    assembly: Assembly = Part(0)
    if source.experts is not None:
        assembly = Stack(tuple(Part(0, expert) for expert in range(source.experts)))
    return Candidate(source.name, (source,), assembly)


def padded(assembly: Assembly, n: int, k: int) -> Assembly:
    """An assembly whose every unit is padded to N x K."""
    if isinstance(assembly, Stack):
        return Stack(tuple(padded(unit, n, k) for unit in units(assembly)))
    return Pad(assembly.part if isinstance(assembly, Pad) else assembly, n, k)


def possible_names(modules: Mapping[str, Module]) -> set[str]:
    """Every name an output module can have: the source's, and those of fused ones."""
    found = set(modules)
    for name in modules:
        parent, dot, leaf = name.rpartition(".")
        found |= {f"{parent}{dot}{fused}" for fused, leaves in FUSED.items() if leaf in leaves}
    return found


def fuse(
    description: Description, others: Collection[str], notes: list[str]
) -> list[tuple[Candidate, list[str]]]:
    """The modules that can be joined, each with the names of its parts.

    Only what reads the same input is joined, and nothing of ``others``. What stays apart although
    all its parts are there is told in ``notes``.
    """
    modules = description.modules
    found: list[tuple[Candidate, list[str]]] = []
    for name in modules:
        if name in others:
            continue
        parent, dot, leaf = name.rpartition(".")
        for fused, leaves in FUSED.items():
            if leaf not in leaves:
                continue
            names = [f"{parent}{dot}{item}" for item in leaves]
            if name != next(item for item in names if item in modules):
                continue  # considered with its first part
            made = _fused(description, f"{parent}{dot}{fused}", names)
            if isinstance(made, Candidate):
                found.append((made, names))
            elif made:
                notes.append(f"{parent}{dot}{fused} is not fused: {made}")
    return found


def _fused(description: Description, name: str, names: Sequence[str]) -> Candidate | str:
    """One fused module, the reason why its parts stay apart, or nothing where it has no sense."""
    modules = [description.modules[item] for item in names if item in description.modules]
    if len(modules) < len(names):
        missing = [item for item in names if item not in description.modules]
        if any(f"{item}.weight" not in description.plain for item in missing):
            return ""  # the model has no such part
        return f"{', '.join(missing)} is not quantised"
    if name.endswith("qkv_proj") and (
        _CROSS_ATTENTION.search(name.split(".")[-2:][0]) or _RESAMPLER.search(name)
    ):
        return "the queries of cross-attention read another input than its keys and values"
    if any(module.reason or module.source is None for module in modules):
        return "a part of it has no layout"
    sources = tuple(module.source for module in modules if module.source is not None)
    if len({source.experts for source in sources}) > 1:
        return "its parts have different numbers of experts"
    if sources[0].experts is not None and any(source.beside for source in sources):
        return "its experts have a bias each, which is not joined"
    support = can_join([source.weight for source in sources])
    if not support:
        return support.reason
    for local, _ in sources[0].weight.side:
        if len({source.values[local] for source in sources}) > 1:
            return f"its parts have different {local} values"
    besides = [source.beside for source in sources]
    if any(set(item) - {"bias"} for item in besides) or len({tuple(b) for b in besides}) > 1:
        return "its parts differ in the tensors beside the weight"
    if len({entry.spec.dtype for item in besides for entry in item.values()}) > 1:
        return "its parts' biases differ in dtype"
    return Candidate(name, sources, _join(sources))


def _join(sources: Sequence[SourceModule]) -> Assembly:
    experts = sources[0].experts
    if experts is None:
        return Concat(tuple(Part(index) for index in range(len(sources))))
    return Stack(
        tuple(
            Concat(tuple(Part(index, expert) for index in range(len(sources))))
            for expert in range(experts)
        )
    )
