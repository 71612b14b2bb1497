"""``inspect``: a description (and a plan for a target), or a converted checkpoint, as a record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct

from ctconvert.formats.quantization import copies_of_config
from ctconvert.formats.quantization.config import value_at
from ctconvert.names import natural
from ctconvert.planning.describe import Description, Module, as_text
from ctconvert.records import Convert, Plan, Refusal
from ctconvert.store.base import Store
from ctconvert.store.safetensors import TensorEntry, total_bytes


class StoredFile(Struct, frozen=True):
    """A file of the source that holds tensors."""

    name: str
    bytes: int


class StoredTensor(Struct, frozen=True):
    """A tensor of a module as the source holds it."""

    dtype: str
    shape: tuple[int, ...]
    file: str


class InspectedModule(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A quantised module.

    ``shape`` is N x K of one weight, ``experts`` the leading size of 3-D tensors. ``unsupported``
    says why nothing can take it. With a target, ``layout`` is what it becomes and ``becomes_bytes``
    how large, or ``refused`` says why it cannot. In a converted checkpoint ``layout`` is what it
    is, ``was`` the source's modules that it was made of and ``was_bytes`` how large they were;
    ``format`` and ``weights`` are theirs.
    """

    name: str
    format: str
    weights: str
    bytes: int
    tensors: dict[str, StoredTensor]
    scheme: str | None = None
    shape: tuple[int, int] | None = None
    experts: int | None = None
    unsupported: str | None = None
    layout: str | None = None
    becomes_bytes: int | None = None
    refused: str | None = None
    was: tuple[str, ...] = ()
    was_bytes: int | None = None


class OtherTensor(Struct, frozen=True):
    """A tensor of no quantised module."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


class Inspection(Struct, frozen=True, kw_only=True):
    """What a checkpoint holds: ``inspect --json``.

    ``converted`` says that it is kernel-ready; ``target`` is then what it was made for.
    """

    model: str
    revision: str | None
    architectures: list[str]
    format: str | None
    compressed_tensors_version: str | None
    shards: list[StoredFile]
    bytes: int
    quantised_bytes: int
    tensors: int
    unquantised_tensors: int
    modules: list[InspectedModule]
    others: list[OtherTensor]
    target: str | None
    converted: bool = False
    oddities: list[str]


def is_converted(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one that ctconvert wrote for a converted checkpoint."""
    found = (value_at(config, (*place, "quant_method")) for place in copies_of_config(config)[:1])
    return "ctconvert" in found


def _module(
    module: Module, layout: str | None, becomes: int | None, refused: str | None
) -> InspectedModule:
    source = module.source
    return InspectedModule(
        name=module.name,
        format=module.format,
        weights=module.label,
        bytes=module.nbytes,
        tensors={local: _stored(entry) for local, entry in module.entries.items()},
        scheme=None if source is None else source.weight.family,
        shape=None if source is None else (source.weight.n, source.weight.k),
        experts=None if source is None else source.experts,
        unsupported=module.reason or None,
        layout=layout,
        becomes_bytes=becomes,
        refused=refused,
    )


def _others(entries: Iterable[TensorEntry]) -> list[OtherTensor]:
    ordered = sorted(entries, key=lambda entry: natural(entry.name))
    return [OtherTensor(e.name, e.spec.dtype, e.spec.shape, e.nbytes) for e in ordered]


def _stored(entry: TensorEntry) -> StoredTensor:
    return StoredTensor(entry.spec.dtype, entry.spec.shape, entry.file)


def _architectures(found: object) -> list[str]:
    """What config.json says, where anything may stand, as text that can be written."""
    items = found if isinstance(found, list) else [] if found is None else [found]
    return [as_text(item) for item in items]


def inspection(description: Description, plan: Plan | None) -> Inspection:
    """A description as a record, with what a plan makes of it."""
    checkpoint, settings = description.checkpoint, description.settings
    made: dict[str, Convert] = {}
    refusals: dict[str, str] = {}
    if plan is not None:  # which joins nothing: a module of the output is one of the source
        made = {part.name: item for item in plan.modules for part in item.sources}
        refusals = {refusal.module: refusal.reason for refusal in plan.kept}
    sizes = checkpoint.store.sizes()
    return Inspection(
        model=checkpoint.store.where,
        revision=checkpoint.store.revision,
        architectures=_architectures(checkpoint.config.get("architectures")),
        format=settings.format or settings.sparse_format,
        compressed_tensors_version=(
            ".".join(map(str, settings.version)) if settings.version else None
        ),
        shards=[StoredFile(name, sizes[name]) for name in checkpoint.shards],
        bytes=total_bytes(checkpoint.tensors.values()),
        quantised_bytes=sum(module.nbytes for module in description.modules.values()),
        tensors=len(checkpoint.tensors),
        unquantised_tensors=len(description.plain),
        modules=[
            _module(
                module,
                made[name].recipe.layout if name in made else None,
                total_bytes(made[name].made) if name in made else None,
                refusals.get(name),
            )
            for name, module in sorted(description.modules.items(), key=lambda one: natural(one[0]))
        ],
        others=_others(description.plain.values()),
        target=None if plan is None else plan.options.target,
        oddities=description.oddities if plan is None else list(plan.notes),
    )


def converted_inspection(store: Store, plan: Plan) -> Inspection:
    """A converted checkpoint as a record, by the plan in its manifest."""
    config = json.loads(plan.config)
    kept = {refusal.module: refusal for refusal in plan.kept}
    tensors: dict[str, dict[str, TensorEntry]] = {name: {} for name in kept}
    others = []
    for copy in plan.copies:
        module, _, local = copy.name.rpartition(".")
        if copy.name in kept or module in kept:
            tensors[copy.name if copy.name in kept else module][local] = copy.output
        else:
            others.append(copy.output)
    modules = [_made(module) for module in plan.modules]
    modules += [_kept(refusal, tensors[name]) for name, refusal in kept.items()]
    modules.sort(key=lambda module: natural(module.name))
    return Inspection(
        model=store.where,
        revision=store.revision,
        architectures=_architectures(config.get("architectures")),
        format="ctconvert",
        compressed_tensors_version=None,
        shards=[StoredFile(shard.name, shard.size) for shard in plan.shards],
        bytes=total_bytes(plan.entries.values()),
        quantised_bytes=sum(module.bytes for module in modules),
        tensors=len(plan.entries),
        unquantised_tensors=len(others),
        modules=modules,
        others=_others(others),
        target=plan.options.target,
        converted=True,
        oddities=list(plan.notes),
    )


def _made(module: Convert) -> InspectedModule:
    weight = module.logical
    return InspectedModule(
        name=module.name,
        format=weight.format,
        weights=weight.label,
        bytes=total_bytes(module.made),
        tensors={entry.name[len(module.prefix) :]: _stored(entry) for entry in module.made},
        scheme=weight.family,
        shape=(weight.n, weight.k),
        experts=module.experts,
        layout=module.recipe.layout,
        was=tuple(source.name for source in module.sources),
        was_bytes=sum(
            source.nbytes + total_bytes(source.beside.values()) for source in module.sources
        ),
    )


def _kept(refusal: Refusal, tensors: dict[str, TensorEntry]) -> InspectedModule:
    size = total_bytes(tensors.values())
    return InspectedModule(
        name=refusal.module,
        format=refusal.format,
        weights=refusal.scheme,
        bytes=size,
        tensors={local: _stored(entry) for local, entry in tensors.items()},
        refused=refusal.reason,
        was=(refusal.module,),
        was_bytes=size,
    )
