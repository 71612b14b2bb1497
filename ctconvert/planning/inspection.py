"""``inspect``: a description (and a plan for a target) as a record."""

from __future__ import annotations

from msgspec import Struct

from ctconvert.planning.describe import Description, Module, as_text
from ctconvert.records import Plan
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
    says why nothing can take it. With a target, ``layout`` is what it becomes, or ``refused`` says
    why it cannot.
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
    refused: str | None = None


class Inspection(Struct, frozen=True, kw_only=True):
    """What a checkpoint holds: ``inspect --json``."""

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
    target: str | None
    oddities: list[str]


def _module(module: Module, layout: str | None, refused: str | None) -> InspectedModule:
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
        refused=refused,
    )


def _stored(entry: TensorEntry) -> StoredTensor:
    return StoredTensor(entry.spec.dtype, entry.spec.shape, entry.file)


def _architectures(found: object) -> list[str]:
    """What config.json says, where anything may stand, as text that can be written."""
    items = found if isinstance(found, list) else [] if found is None else [found]
    return [as_text(item) for item in items]


def inspection(description: Description, plan: Plan | None) -> Inspection:
    """A description as a record, with what a plan makes of it."""
    checkpoint, settings = description.checkpoint, description.settings
    layouts: dict[str, str] = {}
    refusals: dict[str, str] = {}
    if plan is not None:
        layouts = {part.name: item.recipe.layout for item in plan.modules for part in item.sources}
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
            _module(module, layouts.get(module.name), refusals.get(module.name))
            for module in description.modules.values()
        ],
        target=None if plan is None else plan.options.target,
        oddities=description.oddities if plan is None else list(plan.notes),
    )
