"""Which rows, columns or experts of a module each rank of tensor parallelism has, as in vLLM.

A layer is cut by its outputs (rows of its weight) or by its inputs (columns), which the last part
of its name tells; q, k and v by whole heads, those of keys and values repeated where there are
fewer than ranks; vocabularies by rows; experts as the layers they are, or whole. What no rule knows
all ranks have whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from msgspec import Struct, structs

from ctconvert.assembly import Assembly, Axis, Concat, Part, Range, Stack, can_cut, expanded
from ctconvert.planning.assemble import Candidate
from ctconvert.planning.describe import Description
from ctconvert.planning.experts import EXPERT
from ctconvert.records import Options, SourceModule

#: Layers by the last part of their names: cut by outputs, and by inputs.
_OUTPUTS = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "q_b_proj"),
        *("kv_b_proj", "gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "c_fc"),
        "dense_h_to_4h",
    }
)
_INPUTS = frozenset({"o_proj", "out_proj", "down_proj", "w2", "fc2", "c_proj", "dense_4h_to_h"})
_VOCABULARIES = frozenset({"embed_tokens", "lm_head"})
#: Layers that every rank has whole: the narrow side of latent attention, routers, gates.
_WHOLE = frozenset({"q_a_proj", "kv_a_proj_with_mqa", "gate", "router", "shared_expert_gate"})
#: Joined in the source in an order that differs between models.
_MIXED = frozenset({"query_key_value", "c_attn"})
#: vLLM pads a vocabulary to a multiple of this before it cuts it.
_VOCABULARY = 64


def axis_of(name: str) -> Axis | None:
    """How a module is cut over ranks; None where it is not, or nothing tells."""
    leaf = name.rpartition(".")[2]
    if leaf in _OUTPUTS or leaf in _VOCABULARIES:
        return "n"
    return "k" if leaf in _INPUTS else None


class Heads(Struct, frozen=True):
    """Attention heads, those of keys and values, and the rows that one may have; None if unsaid."""

    count: int | None
    shared: int | None
    sizes: tuple[int, ...]


def heads_of(config: Mapping[str, Any]) -> Heads:
    """What a config.json says of attention."""
    inner = config.get("text_config")
    parts = [config, *([inner] if isinstance(inner, Mapping) else [])]

    def number(key: str) -> int | None:
        found = [part[key] for part in parts if isinstance(part.get(key), int)]
        return found[0] if found and found[0] > 0 else None

    count, hidden = number("num_attention_heads"), number("hidden_size")
    own = number("head_dim") or (hidden // count if count and hidden else None)
    sizes = tuple(size for size in (own, number("v_head_dim")) if size is not None)
    return Heads(count, number("num_key_value_heads") or count, sizes)


@dataclass
class Ranks:
    """The ranks of a conversion."""

    description: Description
    options: Options

    def __post_init__(self) -> None:
        self.heads = heads_of(self.description.checkpoint.config)
        self.count = self.options.tensor_parallel
        self._whole: list[str] = []
        self._experts: dict[str, int] = {}
        for name in [*self.description.modules, *self.description.plain]:
            if found := EXPERT.fullmatch(name.removesuffix(".weight")):
                block = found[1] or ""
                self._experts[block] = max(self._experts.get(block, 0), int(found[2]) + 1)

    @property
    def notes(self) -> Iterator[str]:
        """What the user should know of modules that all ranks have whole."""
        leaves: dict[str, list[str]] = {}
        for name in self._whole:
            leaves.setdefault(name.rpartition(".")[2], []).append(name)
        for names in leaves.values():
            others = f" and {len(names) - 1} others of that name" if names[1:] else ""
            yield f"{names[0]}{others}: nothing tells how ranks share it, so all have it whole"

    def of(self, candidate: Candidate) -> list[Candidate] | str:
        """A module of each rank, the one that all have, or why it cannot be cut."""
        if self.count == 1:
            return [candidate]
        owned = [self._owned(source) for source in candidate.sources]
        if any(rank is not None for rank in owned):
            shares = [_experts(candidate, rank, owned) for rank in range(self.count)]
            return [share for share in shares if share is not None]
        if self.options.expert_parallel and candidate.sources[0].experts is not None:
            return "experts in 3-D tensors are not given to ranks whole; cut them, or --exclude"
        made = []
        for rank in range(self.count):
            each: list[list[Part]] = []
            for source in candidate.sources:
                found = self._parts(source, rank)
                if isinstance(found, str):
                    return found
                each.append(found)
            if each[0] == [Part(0)]:
                return [candidate]
            made.append(replace(candidate, assembly=_cut(candidate.assembly, each), rank=rank))
        return made

    def _owned(self, source: SourceModule) -> int | None:
        """The rank that has an expert whole, as vLLM places them: the first have one more."""
        found = EXPERT.fullmatch(source.name)
        if found is None or not self.options.expert_parallel:
            return None
        share, more = divmod(self._experts[found[1] or ""], self.count)
        number = int(found[2])
        if number < more * (share + 1):
            return number // (share + 1)
        return more + (number - more * (share + 1)) // share

    def _parts(self, source: SourceModule, rank: int) -> list[Part] | str:
        """The parts of one weight of a module that a rank has, in order, or why there are none."""
        axis, leaf = axis_of(source.name), source.name.rpartition(".")[2]
        if axis is None or leaf in _MIXED:
            if leaf not in _WHOLE and source.name not in self._whole:
                self._whole.append(source.name)
            return [Part(0)]
        weight = expanded(source.weight)
        ranges = self._ranges(source, axis, rank)
        if isinstance(ranges, str):
            return ranges
        for some in ranges:
            if not (support := can_cut(weight, axis, some)):
                return support.reason
        if axis == "n":
            return [Part(0, rows=some) for some in ranges]
        return [Part(0, columns=some) for some in ranges]

    def _ranges(self, source: SourceModule, axis: Axis, rank: int) -> list[Range] | str:
        leaf = source.name.rpartition(".")[2]
        size = source.weight.n if axis == "n" else source.weight.k
        heads, shared = self.heads.count, self.heads.shared
        if leaf in ("q_proj", "o_proj", "qkv_proj") and heads is not None and heads % self.count:
            return f"{heads} attention heads are no multiple of {self.count} ranks"
        if leaf in _VOCABULARIES and size % _VOCABULARY:
            return f"{size} rows are no multiple of {_VOCABULARY}, to which engines pad them"
        if leaf in ("k_proj", "v_proj"):
            return self._shared(size, 0, rank)
        if leaf == "qkv_proj":
            if heads is None or shared is None or size % (heads + 2 * shared):
                return f"config.json does not say which of {size} rows are q, k and v"
            head = size // (heads + 2 * shared)
            found = [_share(0, heads * head, rank, self.count)]
            for first in (heads * head, (heads + shared) * head):
                more = self._shared(shared * head, first, rank)
                if isinstance(more, str):
                    return more
                found += more
            return found
        if size % self.count:
            return f"{axis.upper()} = {size} is no multiple of {self.count} ranks"
        if leaf == "gate_up_proj" and not self._interleaved:
            if size // 2 % self.count:
                return f"{size // 2} rows each are no multiple of {self.count} ranks"
            return [_share(first, size // 2, rank, self.count) for first in (0, size // 2)]
        return [_share(0, size, rank, self.count)]

    def _shared(self, size: int, first: int, rank: int) -> list[Range] | str:
        """Rows of whole heads of keys or values, which begin at ``first``."""
        shared, parts = self.heads.shared, self.count
        if shared is not None and max(shared, parts) % min(shared, parts):
            return f"{shared} key and value heads cannot be shared out to {parts} ranks"
        if shared is not None and shared < parts:
            if self.heads.sizes and size not in [shared * one for one in self.heads.sizes]:
                return f"its {size} rows are not the {shared} heads that config.json has"
            rank, parts = rank // (parts // shared), shared
        if size % parts:
            return f"N = {size} is no multiple of {parts} ranks"
        return [_share(first, size, rank, parts)]

    @property
    def _interleaved(self) -> bool:
        """Whether a joined gate and up have their rows in turn."""
        return self.description.checkpoint.config.get("model_type") == "gpt_oss"


def _share(first: int, size: int, rank: int, ranks: int) -> Range:
    share = size // ranks
    return first + rank * share, first + (rank + 1) * share


def _cut(assembly: Assembly, each: list[list[Part]]) -> Assembly:
    """An assembly of parts of its sources: ``each`` has them by source."""
    if isinstance(assembly, Part):
        parts = [
            structs.replace(part, source=assembly.source, expert=assembly.expert)
            for part in each[assembly.source]
        ]
        return parts[0] if len(parts) == 1 else Concat(tuple(parts))
    assert isinstance(assembly, Concat | Stack)
    return structs.replace(assembly, parts=tuple(_cut(part, each) for part in assembly.parts))


def _experts(candidate: Candidate, rank: int, owned: list[int | None]) -> Candidate | None:
    """What of a candidate made of whole experts a rank has."""
    mine = [index for index, owner in enumerate(owned) if owner == rank]
    if not mine:
        return None
    places = {index: place for place, index in enumerate(mine)}

    def kept(assembly: Assembly) -> Assembly | None:
        if isinstance(assembly, Part):
            found = places.get(assembly.source)
            return None if found is None else structs.replace(assembly, source=found)
        assert isinstance(assembly, Concat | Stack)
        parts = [part for part in map(kept, assembly.parts) if part is not None]
        return structs.replace(assembly, parts=tuple(parts)) if parts else None

    assembly = kept(candidate.assembly)
    assert assembly is not None
    sources = tuple(candidate.sources[index] for index in mine)
    return replace(candidate, sources=sources, assembly=assembly, rank=rank)
