"""Where every output tensor lies: its shard and its offset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from ctconvert.errors import BadInputError
from ctconvert.records import Copy, Item, Plan, Restore, Shard
from ctconvert.specs import DTYPE_BITS, TensorSpec
from ctconvert.store.checkpoint import CONFIG, INDEX, MANIFEST
from ctconvert.store.safetensors import TensorEntry, build_header

Placed = dict[str, TensorEntry]


def place(
    groups: Iterable[Mapping[str, TensorSpec]],
    limit: int,
    metadata: Mapping[str, Mapping[str, str]],
    source: Mapping[str, TensorEntry],
    ranks: Iterable[int | None] = repeat(None),
    count: int = 1,
) -> tuple[tuple[Shard, ...], Placed]:
    """Fills shards in order, up to ``limit`` bytes of tensors each.

    Args:
        groups: the tensors of each unit of work by full name; they stay together, so a group
            larger than the limit stands alone.
        limit: bytes.
        metadata: what the headers of the source's files hold, by file.
        source: the source's tensors. Metadata that names one is an alias of it (of tied tensors)
            and goes where it lies; a shard of nothing but such tensors has that of their files.
            Where files differ that become one, the first has it.
        ranks: which of ``count`` ranks has each group, None for all; each fills shards of its own.

    Returns:
        the shards, those of all ranks first and then the first of every rank, the second, ..., and
        every tensor by name.

    Raises:
        BadInputError: two tensors have one name.
    """
    filled: dict[int | None, list[_Filled]] = {}
    seen: set[str] = set()
    for group, rank in zip(groups, ranks, strict=False):
        for name in group:
            if name in seen:
                raise BadInputError(
                    f"two tensors of the output would be named {name}; the source already holds "
                    "one of that name"
                )
            seen.add(name)
        own = filled.setdefault(rank, [])
        nbytes = sum(spec.nbytes for spec in group.values())
        if not own or (own[-1].tensors and own[-1].size + nbytes > limit):
            own.append(_Filled(rank, len(own) + 1))
        own[-1].tensors.extend(group.items())
        own[-1].size += nbytes
    made: list[Shard] = []
    placed: Placed = {}
    every = [one for shards in filled.values() for one in shards] or [_Filled(None, 1)]
    for one in sorted(every, key=lambda one: (one.rank is not None, one.index, one.rank or 0)):
        tensors = one.tensors
        # most aligned first, as safetensors writes them, so that every tensor is aligned
        tensors.sort(key=lambda item: -DTYPE_BITS[item[1].dtype])
        own_metadata = _metadata({name for name, _ in tensors}, metadata, source)
        header, offsets = build_header(tensors, own_metadata)
        of_rank = "" if one.rank is None else f"-rank-{one.rank:05}-of-{count:05}"
        file = f"model{of_rank}-{one.index:05}-of-{len(filled.get(one.rank, every)):05}.safetensors"
        if len(every) == 1:
            file = "model.safetensors"
        for (name, spec), offset in zip(tensors, offsets, strict=True):
            placed[name] = TensorEntry(name, file, offset, spec)
        total = len(header) + sum(spec.nbytes for _, spec in tensors)
        made.append(Shard(file, total, tuple(name for name, _ in tensors), own_metadata))
    return tuple(made), placed


@dataclass
class _Filled:
    """A shard that is being filled, of those of one rank."""

    rank: int | None
    index: int
    tensors: list[tuple[str, TensorSpec]] = field(default_factory=list)
    size: int = 0


def _metadata(
    here: set[str], metadata: Mapping[str, Mapping[str, str]], source: Mapping[str, TensorEntry]
) -> dict[str, str]:
    """What the header of a shard of the tensors ``here`` holds; see :func:`place`."""
    if all(values == {"format": "pt"} for values in metadata.values()):
        return {}
    files = set(metadata)
    if here <= source.keys():
        files = {source[name].file for name in here}
    found: dict[str, str] = {}
    for file, values in metadata.items():
        if file in files:
            found = {**values, **found}
    return {
        key: value
        for key, value in found.items()
        if (key, value) != ("format", "pt") and (value not in source or value in here)
    }


def check_names(shards: Sequence[Shard], side_files: Iterable[str]) -> None:
    """Made sure of before anything is written: no folder stands where the output has a file.

    Raises:
        BadInputError: a side file lies in a folder that is called as one of the output's files.
    """
    index = [INDEX] if len(shards) > 1 else []
    needed = {CONFIG, MANIFEST, *index, *(shard.name for shard in shards)}
    for name in side_files:
        first = name.partition("/")[0]
        if first in needed:
            raise BadInputError(
                f"{name}: {first} is a file of the output; rename that folder of the source, or "
                "leave it out"
            )


def index_of(shards: Sequence[Shard], entries: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """The content of ``model.safetensors.index.json``."""
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    total = sum(entries[name].nbytes for name in weight_map)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def disk_bytes(plan: Plan) -> int:
    """Bytes the output takes, side files and manifest (about) included."""
    side = sum(file.size for file in plan.side_files)
    manifest = 4096 + 3072 * len(plan.modules) + 768 * len(plan.copies)
    return plan.tensor_bytes + side + manifest


def files_read(item: Item) -> set[str]:
    """The files that an item's tensors are read from."""
    if isinstance(item, Copy):
        return {item.source.file}
    if isinstance(item, Restore):
        return {entry.file for module in item.modules for entry in module.made}
    return {
        entry.file
        for source in item.sources
        for entry in (*source.tensors.values(), *source.beside.values())
    }


def readers(plan: Plan) -> dict[str, list[str]]:
    """The files that each shard's tensors are read from, in the order of their first use."""
    found: dict[str, dict[str, None]] = {shard.name: {} for shard in plan.shards}
    for item in plan.items:
        found[item.made[0].file] |= dict.fromkeys(sorted(files_read(item)))
    return {name: list(files) for name, files in found.items()}


def spool_bytes(plan: Plan) -> int:
    """The most bytes of source files that are kept at a time where they are fetched from afar.

    A file is kept from the shard that first reads it to the last; the next shard's come meanwhile.
    """
    sizes = {file.name: file.size for file in plan.source.files}
    order = list(readers(plan).values())
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, files in enumerate(order):
        for name in files:
            first.setdefault(name, index)
            last[name] = index
    return max(
        (
            sum(sizes[name] for name in first if first[name] <= index + 1 and last[name] >= index)
            for index in range(len(order))
        ),
        default=0,
    )
