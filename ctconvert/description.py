"""What a source checkpoint holds: every module's scheme, read from headers and config alone."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ctconvert import formats
from ctconvert.checkpoint.header import TensorEntry
from ctconvert.checkpoint.source import Source
from ctconvert.errors import BadInputError
from ctconvert.formats.base import METADATA_NAMES, ModuleTensors, activation_names
from ctconvert.formats.quantization import (
    ModuleScheme,
    QuantizationSettings,
    guess_class,
    is_router,
    looks_linear,
)
from ctconvert.specs import TensorSpec, WeightSpec

#: Tensors that show a module's weight is quantised, whatever the config says.
_EVIDENCE = frozenset({"weight_packed", "weight_scale", "compressed", "weight_global_scale"})
_QUANTISED_DTYPES = frozenset({"I8", "U8", "F8_E4M3", "F8_E5M2"})
#: How names of packed codes end in conventions that are not compressed-tensors'.
_PACKED_ENDINGS = ("_packed", "_blocks", "_bitmask", "_compressed", ".qweight")
#: Tensors that may stand beside a quantised weight and are no part of it.
_BESIDE = frozenset({"bias", "k_scale", "v_scale", "q_scale"})


@dataclass(frozen=True)
class Part:
    """One quantised 2-D weight of the source.

    ``entries`` are the tensors that hold it, by local name; ``values`` the raw bytes of the
    few-element ones (``weight_shape``, static activation scales), in hexadecimal.
    """

    module: str
    spec: WeightSpec
    entries: dict[str, TensorEntry]
    values: dict[str, str]


@dataclass
class Module:
    """A module whose weight is quantised in the source.

    ``experts`` holds one :class:`Part` a leading index of 3-D tensors, a single one otherwise;
    it is empty where the module cannot be read, ``reason`` then saying why. ``beside`` are
    tensors of the module that are no part of the weight (``bias``). ``uncalibrated`` names the
    activation scales that are 0.
    """

    name: str
    format: str
    label: str
    entries: dict[str, TensorEntry]
    experts: list[Part] = field(default_factory=list)
    stacked_experts: bool = False
    beside: list[str] = field(default_factory=list)
    uncalibrated: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


@dataclass
class Description:
    """The quantised modules and the plain tensors of a source, in file order."""

    source: Source
    settings: QuantizationSettings
    modules: dict[str, Module]
    plain: dict[str, TensorEntry]
    oddities: list[str]


def numbers(data: bytes, spec: TensorSpec) -> list[float]:
    """The values of a few-element tensor."""
    codes = {"I64": "q", "I32": "i", "I8": "b", "U8": "B", "F32": "f", "F16": "e", "F64": "d"}
    if spec.dtype == "BF16":
        halves = struct.unpack(f"<{len(data) // 2}H", data)
        data = struct.pack(f"<{len(halves)}I", *(half << 16 for half in halves))
        return list(struct.unpack(f"<{len(halves)}f", data))
    code = codes.get(spec.dtype)
    if code is None:
        raise BadInputError(f"a {spec.dtype} tensor where a shape or an activation scale belongs")
    return list(struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data))


def _few(module: str, local: str, data: bytes, spec: TensorSpec) -> list[float]:
    try:
        values = numbers(data, spec)
    except BadInputError as error:
        raise BadInputError(f"module {module}: {local}: {error}") from None
    if local.endswith("zero_point") and not all(map(math.isfinite, values)):
        raise BadInputError(f"module {module}: {local} is {values}, not a whole number")
    return values[-2:]


def describe(source: Source) -> Description:
    """Matches every module of a source with its scheme and checks its headers.

    Raises:
        BadInputError: the config cannot be read, or it and the tensors contradict each other.
    """
    where = source.files.path("config.json")
    settings = QuantizationSettings.parse(source.config, where)
    grouped: dict[str, dict[str, TensorEntry]] = {}
    for entry in source.tensors.values():
        module, _, local = entry.name.rpartition(".")
        grouped.setdefault(module, {})[local] = entry
    schemes: dict[str, ModuleScheme] = {}
    leaves = {name.rpartition(".")[2] for name, entries in grouped.items() if _evidence(entries)}
    for name, entries in grouped.items():
        scheme = _scheme_of(settings, name, entries, leaves)
        if scheme is not None:
            schemes[name] = scheme
    metadata = source.values(
        entry
        for name in schemes
        for local, entry in grouped[name].items()
        if local in METADATA_NAMES and entry.nbytes <= 64
    )
    modules: dict[str, Module] = {}
    plain: dict[str, TensorEntry] = {}
    for name, entries in grouped.items():
        if name in schemes:
            modules[name] = _module(settings, name, schemes[name], entries, metadata)
        else:
            plain |= {entry.name: entry for entry in entries.values()}
    _check_plain(plain)
    if rotated := settings.transforms_elsewhere(modules, grouped):
        for found in modules.values():
            found.reason = found.reason or (
                f"transform_config also rotates {rotated} at run time, which no layout carries"
            )
    return Description(source, settings, modules, plain, _oddities(source, settings, modules))


def _evidence(entries: dict[str, TensorEntry]) -> list[str]:
    """What shows that a module's weight is quantised."""
    found = sorted(_EVIDENCE & entries.keys())
    weight = entries.get("weight")
    if weight is not None and weight.spec.dtype in _QUANTISED_DTYPES:
        found.append(f"weight {weight.spec}")
    return found


def _scheme_of(
    settings: QuantizationSettings, name: str, entries: dict[str, TensorEntry], leaves: set[str]
) -> ModuleScheme | None:
    """The scheme of a module that is quantised, None for one that is not; they must agree.

    ``leaves`` are the last names of all modules that hold quantised tensors.
    """
    weight = entries.get("weight")
    evidence = _evidence(entries)
    if evidence:
        scheme = settings.scheme_of_quantised(name)
        if scheme is None:
            raise BadInputError(
                f"module {name}: holds {', '.join(evidence)}, but no target of the "
                "quantization_config in config.json means it or its ignore list names it; the "
                "config and the tensors contradict each other"
            )
        return scheme
    scheme = settings.scheme_of(name, guess_class(name))
    if scheme is None or weight is None or len(weight.spec.shape) != 2:
        return None
    if scheme.scheme is not None and scheme.scheme.weights is None:
        return None
    if scheme.target != name:
        # a class name, or a pattern, means Linear and Embedding modules; a dense weight may be of
        # another class (a router, a table of biases), which the checkpoint does not say
        leaf = name.rpartition(".")[2]
        if is_router(name) or not (looks_linear(name) or leaf in leaves or not leaves):
            return None
    raise BadInputError(
        f"module {name}: the config says {scheme.format} (target {scheme.target!r}), but its "
        f"weight is dense, {weight.spec}; list it in quantization_config.ignore, under "
        "this very name, if it is meant to be unquantised"
    )


def _module(
    settings: QuantizationSettings,
    name: str,
    scheme: ModuleScheme,
    entries: dict[str, TensorEntry],
    metadata: dict[str, bytes],
) -> Module:
    module = Module(name, scheme.format, scheme.format, entries)
    if scheme.scheme is not None and scheme.scheme.weights is not None:
        args = scheme.scheme.weights
        module.label = f"{'fp' if args.type == 'float' else 'int'}{args.num_bits} {args.strategy}"
    handler = formats.get(scheme.format)
    if handler is None:
        module.reason = formats.UNREAD.get(scheme.format, f"format {scheme.format} is not read")
        return module
    if handler.weight_name not in entries:
        have = ", ".join(f"{local} {entry.spec}" for local, entry in sorted(entries.items()))
        raise BadInputError(
            f"module {name}: the config says {scheme.format}, which stores "
            f"{handler.weight_name}, but it holds {have}; the config and the tensors contradict "
            "each other"
        )
    count = 0
    weight = entries[handler.weight_name].spec
    if len(weight.shape) == 3:
        count = weight.shape[0]
        module.stacked_experts = True
    embedding = _is_embedding(settings, name, scheme)
    for few in METADATA_NAMES & entries.keys():
        if entries[few].name not in metadata:
            module.reason = f"{few} is {entries[few].spec}, expected a few elements"
            return module
    for index in range(count or 1):
        local = _slice_expert(entries, metadata, index, count) if count else entries
        values = {
            key: _few(name, key, metadata[entry.name], entry.spec)
            for key, entry in local.items()
            if entry.name in metadata
        }
        tensors = ModuleTensors(
            name,
            {key: entry.spec for key, entry in local.items()},
            embedding,
            settings.version,
            values,
        )
        spec = handler.spec(tensors, scheme)
        owned = {*handler.parameter_names(spec), *activation_names(tensors, scheme)}
        raw = {
            key: metadata[local[key].name].hex()
            for key in sorted(owned)
            if local[key].name in metadata
        }
        part = Part(name, spec, {key: local[key] for key in local if key in owned}, raw)
        module.experts.append(part)
    spec = module.experts[0].spec
    module.label = spec.label
    used = {key for key, _ in spec.side}
    module.uncalibrated = [
        key for key in ("input_scale", "output_scale") if key in owned and key not in used
    ]
    beside = _BESIDE | ({"output_scale"} if settings.kv_cache else set())
    module.beside = [key for key in entries if key not in owned and key in beside]
    unknown = [key for key in entries if key not in owned and key not in beside]
    shared = [
        key
        for key in module.experts[0].entries
        if count and entries[key].name not in metadata and entries[key].spec.shape[:1] != (count,)
    ]
    if shared:
        module.reason = f"its experts share {', '.join(shared)}; every expert needs one of its own"
    elif unknown:
        module.reason = (
            f"holds {', '.join(unknown)}, which its scheme ({spec.label}) does not explain"
        )
    elif count and len({part.spec for part in module.experts}) > 1:
        module.reason = "its experts differ in their activation scales"
    elif settings.transformed(name, "Embedding" if embedding else "Linear"):
        module.reason = (
            "transform_config rotates its inputs or outputs at run time, which no layout carries"
        )
    return module


def _check_plain(plain: dict[str, TensorEntry]) -> None:
    """Raises BadInputError for what looks packed and is named in a way no format here uses."""
    for name, entry in plain.items():
        if name.endswith(_PACKED_ENDINGS) and entry.spec.dtype in ("I32", "U8", "I8"):
            raise BadInputError(
                f"tensor {name}, {entry.spec}, looks like packed codes, but no compressed-tensors "
                "format names them so; ctconvert would copy what it should convert"
            )


def _is_embedding(settings: QuantizationSettings, name: str, scheme: ModuleScheme) -> bool:
    """A class target ``Embedding``, or a name that says so and that no Linear target means."""
    if scheme.target == "Embedding":
        return True
    return guess_class(name) == "Embedding" and scheme.target != "Linear"


def _slice_expert(
    entries: dict[str, TensorEntry], metadata: dict[str, bytes], index: int, count: int
) -> dict[str, TensorEntry]:
    """The tensors of one expert: slices of the 3-D ones, the shape tensor as it is."""
    found = {}
    for local, entry in entries.items():
        shape = entry.spec.shape
        if len(shape) >= 2 and shape[0] == count and entry.name not in metadata:
            spec = TensorSpec(entry.spec.dtype, shape[1:])
            offset = entry.offset + index * spec.nbytes
            found[local] = replace(entry, spec=spec, offset=offset)
        elif local == "weight_shape" and shape == (3,):
            found[local] = replace(entry, spec=TensorSpec(entry.spec.dtype, (2,)))
        else:
            found[local] = entry
    return found


def _oddities(
    source: Source, settings: QuantizationSettings, modules: dict[str, Module]
) -> list[str]:
    found = []
    if source.config.get("tie_word_embeddings") and not any(
        name.split(".")[-2:-1] == ["lm_head"] for name in source.tensors
    ):
        found.append("tied embeddings: there is no lm_head tensor, and none is made")
    others = [
        name for name in source.sizes if name.endswith(".safetensors") and name not in source.shards
    ]
    if others:
        found.append(
            f"{len(others)} safetensors files belong to no index and are left out "
            f"({', '.join(others[:3])}{', ...' if len(others) > 3 else ''})"
        )
    for module in modules.values():
        for scale in module.uncalibrated:
            found.append(f"{module.name}.{scale} is 0, never calibrated, and is dropped")
    if settings.transform_targets:
        found.append("transform_config: rotations are applied at run time")
    return found


def total_bytes(entries: Iterable[TensorEntry]) -> int:
    """Bytes of a set of tensors."""
    return sum(entry.nbytes for entry in entries)
