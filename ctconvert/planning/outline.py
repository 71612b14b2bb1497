"""What a plan comes to: the content of ``ctconvert repack --dry-run --json``."""

from __future__ import annotations

from msgspec import Struct

from ctconvert.names import natural
from ctconvert.planning.memory import peak_memory
from ctconvert.planning.place import disk_bytes, spool_bytes
from ctconvert.records import Convert, Plan, Refusal


class OutlinedTensor(Struct, frozen=True):
    """A tensor of the output."""

    dtype: str
    shape: tuple[int, ...]


class OutlinedModule(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A converted module: ``shape`` is N x K of one weight, ``experts`` how many are stacked."""

    name: str
    source: tuple[str, ...]
    format: str
    scheme: str
    weights: str
    layout: str
    shape: tuple[int, int]
    bytes: int
    tensors: dict[str, OutlinedTensor]
    experts: int | None = None


class OutlinedShard(Struct, frozen=True):
    """A file of the output."""

    name: str
    bytes: int
    tensors: tuple[str, ...]


class Outline(Struct, frozen=True, kw_only=True):
    """A plan for people and programs; as long as the lists of tensors, and no longer.

    ``download_bytes`` come from the Hub; ``disk_bytes`` has room for those that are kept meanwhile.
    """

    target: str | None
    modules: tuple[OutlinedModule, ...]
    copied: tuple[str, ...]
    kept: tuple[Refusal, ...]
    refused: tuple[Refusal, ...]
    shards: tuple[OutlinedShard, ...]
    side_files: tuple[str, ...]
    source_bytes: int
    output_bytes: int
    disk_bytes: int
    peak_memory_bytes: int
    download_bytes: int
    notes: tuple[str, ...]


def outline(plan: Plan, workers: int, download: int = 0, local_copy: bool = False) -> Outline:
    """A plan as that record.

    Args:
        plan: the plan.
        workers: threads that would make it.
        download: bytes that come from the Hub.
        local_copy: whether those are all kept.
    """
    kept = min(download, download if local_copy else spool_bytes(plan))
    return Outline(
        target=plan.options.target,
        modules=tuple(map(_module, sorted(plan.modules, key=lambda module: natural(module.name)))),
        copied=tuple(sorted((copy.name for copy in plan.copies), key=natural)),
        kept=plan.kept,
        refused=plan.refusals,
        shards=tuple(OutlinedShard(shard.name, shard.size, shard.tensors) for shard in plan.shards),
        side_files=tuple(file.name for file in plan.side_files),
        source_bytes=sum(file.size for file in plan.source.files),
        output_bytes=plan.tensor_bytes,
        disk_bytes=disk_bytes(plan) + kept,
        peak_memory_bytes=peak_memory(plan, workers),
        download_bytes=download,
        notes=plan.notes,
    )


def _module(module: Convert) -> OutlinedModule:
    weight = module.recipe.weight
    return OutlinedModule(
        name=module.name,
        source=tuple(source.name for source in module.sources),
        format=weight.format,
        scheme=weight.family,
        weights=weight.label,
        layout=module.recipe.layout,
        shape=(weight.n, weight.k),
        bytes=module.output_bytes * len(module.units),
        tensors={
            entry.name: OutlinedTensor(entry.spec.dtype, entry.spec.shape) for entry in module.made
        },
        experts=module.experts,
    )
