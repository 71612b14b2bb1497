"""What a source checkpoint holds: every module's scheme, read from headers and config alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ctconvert.formats.base import METADATA_NAMES
from ctconvert.formats.quantization import QuantizationSettings, copies_of_config, guess_class
from ctconvert.formats.quantization.config import value_at
from ctconvert.planning.modules import Module, Reader
from ctconvert.planning.schemes import Matcher, evidence
from ctconvert.store.checkpoint import Checkpoint
from ctconvert.store.safetensors import TensorEntry

#: How names of packed codes end in conventions that are not compressed-tensors'.
_PACKED_ENDINGS = ("_packed", "_blocks", "_bitmask", "_compressed", ".qweight")
_FLOATS = ("BF16", "F16", "F32")
_FP8 = ("F8_E4M3", "F8_E5M2")
_INTS = ("I8", "U8")
#: How 3-D experts without modules of their own name the tensors of a projection, and what they are.
_EXPERT_ENDINGS = {
    "_packed": "weight_packed",
    "_scale": "weight_scale",
    "_zero_point": "weight_zero_point",
    "_shape": "weight_shape",
    "_g_idx": "weight_g_idx",
    "_global_scale": "weight_global_scale",
    "_bias": "bias",
    "_input_scale": "input_scale",
    "_input_zero_point": "input_zero_point",
    "_input_global_scale": "input_global_scale",
    "_output_scale": "output_scale",
    "_output_zero_point": "output_zero_point",
}
#: The most bytes of a few-element tensor; every expert may have a shape.
_FEW = {"weight_shape": 1 << 14}


@dataclass
class Description:
    """The quantised modules and the plain tensors of a source, in file order."""

    checkpoint: Checkpoint
    settings: QuantizationSettings
    modules: dict[str, Module]
    plain: dict[str, TensorEntry]
    oddities: list[str]

    @cached_property
    def owners(self) -> dict[str, str]:
        """The module of every tensor whose name does not begin with it."""
        return {
            entry.name: module.name
            for module in self.modules.values()
            for entry in module.entries.values()
            if entry.name.rpartition(".")[0] != module.name
        }


def as_text(found: object) -> str:
    """A value of a config.json as text that can be written: JSON can spell what UTF-8 cannot."""
    return str(found).encode("utf-8", "backslashreplace").decode()


def describe(checkpoint: Checkpoint) -> Description:
    """Matches every module of a source with its scheme and checks its headers.

    What is one module's own fault is its :attr:`Module.reason`.

    Raises:
        BadInputError: the config cannot be read, or it and the tensors contradict each other.
    """
    where = checkpoint.store.path("config.json")
    settings = QuantizationSettings.parse(checkpoint.config, where)
    grouped = _by_module(checkpoint.tensors)
    quantised = {name for name, entries in grouped.items() if evidence(entries)}
    metadata = checkpoint.values(
        entry
        for name, entries in grouped.items()
        if name in quantised
        for local, entry in entries.items()
        if local in METADATA_NAMES and entry.nbytes <= _FEW.get(local, 64)
    )
    matcher = Matcher(settings, Reader(settings, metadata), grouped)
    modules: dict[str, Module] = {}
    plain: dict[str, TensorEntry] = {}
    for name, entries in grouped.items():
        found = (matcher.quantised if name in quantised else matcher.dense)(name, entries)
        if found is None:
            plain |= {entry.name: entry for entry in entries.values()}
        else:
            modules[name] = found
    matcher.check_groups()
    for found in list(_unreadable(plain)):
        modules[found.name] = found
        for entry in found.entries.values():
            plain.pop(entry.name, None)
    if rotated := settings.rotation_elsewhere(modules, grouped):
        for found in modules.values():
            found.reason = found.reason or (
                "transform_config also rotates at run time what is no quantised module "
                f"({rotated}), which no layout carries"
            )
    oddities = [*matcher.notes(), *_oddities(checkpoint, settings, modules)]
    return Description(checkpoint, settings, modules, plain, oddities)


def _by_module(tensors: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """Tensors by module and local name.

    3-D experts that are parameters of one module (``experts.gate_up_proj_packed``,
    ``experts.gate_up_proj_scale``) become modules (``experts.gate_up_proj``) of the usual names.
    """
    grouped: dict[str, dict[str, TensorEntry]] = {}
    for entry in tensors.values():
        module, _, local = entry.name.rpartition(".")
        grouped.setdefault(module, {})[local] = entry
    for module, entries in list(grouped.items()):
        for local in list(entries):
            stem = local.removesuffix("_packed")
            name = f"{module}.{stem}".lstrip(".")
            if stem in ("", local, "weight") or name in grouped:
                continue
            if len(entries[local].spec.shape) != 3:
                continue
            grouped[name] = {
                usual: entries.pop(stem + ending)
                for ending, usual in _EXPERT_ENDINGS.items()
                if stem + ending in entries
            }
        if not entries:
            del grouped[module]
    return grouped


def _unreadable(plain: Mapping[str, TensorEntry]) -> Iterator[Module]:
    """What is quantised, or looks packed, and is stored in a way no format here reads."""
    for name, entry in plain.items():
        local = name.rpartition(".")[2]
        if name.endswith(_PACKED_ENDINGS) and entry.spec.dtype in ("I32", "U8", "I8"):
            reason = (
                f"tensor {name}, {entry.spec}, looks like packed codes, but no compressed-tensors "
                "format names them so"
            )
            yield Module(name, "unknown", "unknown", {local: entry}, reason=reason, fault=True)
            continue
        beside = (f"{name}{ending}" for ending in ("_scale", "_weight_scale", "_scales"))
        scale = next((scale for scale in beside if scale in plain), None)
        entries = {local: entry}
        if scale is not None:
            entries[scale.rpartition(".")[2]] = plain[scale]
        experts = len(entry.spec.shape) == 3 and scale is not None
        if experts and entry.spec.dtype in _FLOATS:
            reason = (
                f"tensor {name}, {entry.spec}, is unquantised, and {scale} stands beside it; save "
                "the model again with save_compressed=True"
            )
            yield Module(name, "dense", "dense", entries, reason=reason)
        elif (experts and entry.spec.dtype in _INTS) or (
            len(entry.spec.shape) > 1 and entry.spec.dtype in _FP8
        ):
            reason = (
                f"tensor {name}, {entry.spec}, is quantised, but no compressed-tensors format "
                "names its weight so"
            )
            yield Module(name, "unknown", "unknown", entries, reason=reason, fault=True)


def _oddities(
    checkpoint: Checkpoint, settings: QuantizationSettings, modules: Mapping[str, Module]
) -> Iterator[str]:
    places = copies_of_config(checkpoint.config)
    first = value_at(checkpoint.config, places[0])
    if differing := [path for path in places if value_at(checkpoint.config, path) != first]:
        named = ", ".join(".".join(path) for path in differing)
        verb = "holds" if len(differing) == 1 else "hold"
        yield (
            f"config.json: {named} {verb} another config than {'.'.join(places[0])}, which counts"
        )
    if checkpoint.config.get("tie_word_embeddings") and not any(
        name.split(".")[-2:-1] == ["lm_head"] for name in checkpoint.tensors
    ):
        yield "tied embeddings: there is no lm_head tensor, and none is made"
    used = set(checkpoint.shards)
    others = [
        name
        for name in checkpoint.store.sizes()
        if name.endswith(".safetensors") and name not in used
    ]
    if others:
        yield (
            f"{len(others)} safetensors files belong to no index and are left out "
            f"({', '.join(others[:3])}{', ...' if len(others) > 3 else ''})"
        )
    if names := checkpoint.unlisted:
        yield (
            f"{len(names)} tensors that the index does not list are left out "
            f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        )
    for name, reason in checkpoint.store.left_out().items():
        if name not in used:
            yield f"{name} is left out: {reason}"
    for module in modules.values():
        source = module.source
        if source and not source.weight.embedding and guess_class(module.name) == "Embedding":
            yield (
                f"{module.name} is an embedding by its name, and the config means it as Linear: "
                "its layout is for products, and nothing can be looked up in it"
            )
        for scale in module.uncalibrated:
            yield f"{module.name}.{scale} is 0, never calibrated, and is dropped"
    if settings.rotations:
        yield "transform_config: rotations are applied at run time"
