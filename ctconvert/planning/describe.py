"""What a source checkpoint holds: every module's scheme, read from headers and config alone."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

import msgspec

from ctconvert import formats
from ctconvert.errors import BadInputError
from ctconvert.formats.base import METADATA_NAMES, ModuleTensors, activation_names
from ctconvert.formats.quantization import (
    ModuleScheme,
    QuantizationSettings,
    guess_class,
    is_router,
    looks_linear,
)
from ctconvert.records import SourceModule, expert_entry
from ctconvert.specs import TensorSpec, WeightSpec
from ctconvert.store.checkpoint import Checkpoint
from ctconvert.store.safetensors import TensorEntry, total_bytes

#: Tensors that show a module's weight is quantised, whatever the config says.
_EVIDENCE = frozenset({"weight_packed", "weight_scale", "compressed", "weight_global_scale"})
_QUANTISED_DTYPES = frozenset({"I8", "U8", "F8_E4M3", "F8_E5M2"})
#: How names of packed codes end in conventions that are not compressed-tensors'.
_PACKED_ENDINGS = ("_packed", "_blocks", "_bitmask", "_compressed", ".qweight")
#: Tensors that may stand beside a quantised weight and are no part of it.
_BESIDE = frozenset({"bias", "k_scale", "v_scale", "q_scale"})


@dataclass(slots=True)
class Module:
    """A module whose weight is quantised in the source, as its headers describe it.

    ``source`` is None where it cannot be read, ``reason`` then saying why; a module that is read
    can have a reason too, why nothing can take it. ``uncalibrated`` names activation scales of 0.
    """

    name: str
    format: str
    label: str
    entries: dict[str, TensorEntry]
    source: SourceModule | None = None
    uncalibrated: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def nbytes(self) -> int:
        return total_bytes(self.entries.values())


@dataclass
class Description:
    """The quantised modules and the plain tensors of a source, in file order."""

    checkpoint: Checkpoint
    settings: QuantizationSettings
    modules: dict[str, Module]
    plain: dict[str, TensorEntry]
    oddities: list[str]


def as_text(found: object) -> str:
    """A value of a config.json as text that can be written: JSON can spell what UTF-8 cannot."""
    return str(found).encode("utf-8", "backslashreplace").decode()


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


def describe(checkpoint: Checkpoint) -> Description:
    """Matches every module of a source with its scheme and checks its headers.

    Raises:
        BadInputError: the config cannot be read, or it and the tensors contradict each other.
    """
    where = checkpoint.store.path("config.json")
    settings = QuantizationSettings.parse(checkpoint.config, where)
    grouped: dict[str, dict[str, TensorEntry]] = {}
    for entry in checkpoint.tensors.values():
        module, _, local = entry.name.rpartition(".")
        grouped.setdefault(module, {})[local] = entry
    schemes: dict[str, ModuleScheme] = {}
    leaves = {name.rpartition(".")[2] for name, entries in grouped.items() if _evidence(entries)}
    for name, entries in grouped.items():
        scheme = _scheme_of(settings, name, entries, leaves)
        if scheme is not None:
            schemes[name] = scheme
    metadata = checkpoint.values(
        entry
        for name in schemes
        for local, entry in grouped[name].items()
        if local in METADATA_NAMES and entry.nbytes <= 64
    )
    reader = _Modules(settings, metadata)
    modules: dict[str, Module] = {}
    plain: dict[str, TensorEntry] = {}
    for name, entries in grouped.items():
        if name in schemes:
            modules[name] = reader.module(name, schemes[name], entries)
        else:
            plain |= {entry.name: entry for entry in entries.values()}
    _check_plain(plain)
    if rotated := settings.transforms_elsewhere(modules, grouped):
        for found in modules.values():
            found.reason = found.reason or (
                f"transform_config also rotates {as_text(rotated)} at run time, which no layout "
                "carries"
            )
    return Description(
        checkpoint, settings, modules, plain, _oddities(checkpoint, settings, modules)
    )


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


@dataclass(frozen=True)
class _Kind:
    """What modules with the same scheme, tensors and few-element values have in common."""

    spec: WeightSpec
    owned: list[str]
    valued: list[str]
    beside: list[str]
    uncalibrated: list[str]
    reason: str


class _Modules:
    """Describes the quantised modules of one checkpoint, each kind of module once."""

    def __init__(self, settings: QuantizationSettings, metadata: dict[str, bytes]) -> None:
        self.settings = settings
        self.metadata = metadata
        self._kinds: dict[object, _Kind] = {}

    def module(self, name: str, scheme: ModuleScheme, entries: dict[str, TensorEntry]) -> Module:
        """One module; its tensors are checked against its scheme.

        Raises:
            BadInputError: they contradict each other.
        """
        handler = formats.get(scheme.format)
        if handler is None:
            reason = formats.UNREAD.get(scheme.format, f"format {scheme.format} is not read")
            return Module(name, scheme.format, _label(scheme), entries, reason=reason)
        if handler.weight_name not in entries:
            have = ", ".join(f"{local} {entry.spec}" for local, entry in sorted(entries.items()))
            raise BadInputError(
                f"module {name}: the config says {scheme.format}, which stores "
                f"{handler.weight_name}, but it holds {have}; the config and the tensors "
                "contradict each other"
            )
        for few in METADATA_NAMES & entries.keys():
            if entries[few].name not in self.metadata:
                reason = f"{few} is {entries[few].spec}, expected a few elements"
                return Module(name, scheme.format, _label(scheme), entries, reason=reason)
        weight = entries[handler.weight_name].spec
        experts = weight.shape[0] if len(weight.shape) == 3 else None
        if experts == 0:
            raise BadInputError(f"module {name}: {handler.weight_name} is {weight}: no experts")
        kind = self._kind(name, scheme, handler, entries, experts)
        source = SourceModule(
            name=name,
            weight=kind.spec,
            experts=experts,
            tensors={key: entries[key] for key in kind.owned},
            values={key: self.metadata[entries[key].name].hex() for key in kind.valued},
            beside={key: entries[key] for key in kind.beside},
        )
        module = Module(name, scheme.format, kind.spec.label, entries, source)
        module.uncalibrated = kind.uncalibrated
        module.reason = kind.reason
        cls = "Embedding" if kind.spec.embedding else "Linear"
        if not module.reason and self.settings.transformed(name, cls):
            module.reason = (
                "transform_config rotates its inputs or outputs at run time, which no layout "
                "carries"
            )
        return module

    def _kind(
        self,
        name: str,
        scheme: ModuleScheme,
        handler: formats.Format,
        entries: dict[str, TensorEntry],
        experts: int | None,
    ) -> _Kind:
        """What the module has in common with others like it; checked once for all of them."""
        embedding = _is_embedding(self.settings, name, scheme)
        raw = tuple(self.metadata.get(entry.name) for entry in entries.values())
        specs = tuple((local, entry.spec) for local, entry in entries.items())
        key = (handler.name, id(scheme.scheme), embedding, specs, raw)
        found = self._kinds.get(key)
        if found is None:
            found = self._kinds[key] = self._new_kind(
                name, scheme, handler, entries, experts, embedding
            )
        return found

    def _new_kind(
        self,
        name: str,
        scheme: ModuleScheme,
        handler: formats.Format,
        entries: dict[str, TensorEntry],
        experts: int | None,
        embedding: bool,
    ) -> _Kind:
        local = entries if experts is None else self._first_expert(entries, experts)
        values = {
            key: _few(name, key, self.metadata[entry.name], entry.spec)
            for key, entry in local.items()
            if entry.name in self.metadata
        }
        tensors = ModuleTensors(
            name,
            {key: entry.spec for key, entry in local.items()},
            embedding,
            self.settings.version,
            values,
        )
        spec = handler.spec(tensors, scheme)
        owned = {*handler.parameter_names(spec), *activation_names(tensors, scheme)}
        beside = _BESIDE | ({"output_scale"} if self.settings.kv_cache else set())
        used = {key for key, _ in spec.side}
        unknown = [key for key in entries if key not in owned and key not in beside]
        shared = [
            key
            for key in entries
            if experts
            and key in owned
            and key not in values
            and entries[key].spec.shape[:1] != (experts,)
        ]
        reason = ""
        if shared:
            reason = f"its experts share {', '.join(shared)}; every expert needs one of its own"
        elif unknown:
            reason = f"holds {', '.join(unknown)}, which its scheme ({spec.label}) does not explain"
        return _Kind(
            spec,
            owned=[key for key in entries if key in owned],
            valued=[key for key in sorted(owned) if key in values],
            beside=[key for key in entries if key not in owned and key in beside],
            uncalibrated=[
                key for key in ("input_scale", "output_scale") if key in owned and key not in used
            ],
            reason=reason,
        )

    def _first_expert(self, entries: dict[str, TensorEntry], count: int) -> dict[str, TensorEntry]:
        """The tensors of one expert: slices of the 3-D ones, the shape tensor as it is."""
        found = {}
        for local, entry in entries.items():
            shape = entry.spec.shape
            if len(shape) >= 2 and shape[0] == count and entry.name not in self.metadata:
                found[local] = expert_entry(entry, 0)
            elif local == "weight_shape" and shape == (3,):
                spec = TensorSpec(entry.spec.dtype, (2,))
                found[local] = msgspec.structs.replace(entry, spec=spec)
            else:
                found[local] = entry
        return found


def _label(scheme: ModuleScheme) -> str:
    """For people, where no format describes the weight."""
    if scheme.scheme is None or scheme.scheme.weights is None:
        return scheme.format
    args = scheme.scheme.weights
    return f"{'fp' if args.type == 'float' else 'int'}{args.num_bits} {args.strategy}"


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


def _oddities(
    checkpoint: Checkpoint, settings: QuantizationSettings, modules: dict[str, Module]
) -> list[str]:
    found = []
    if checkpoint.config.get("tie_word_embeddings") and not any(
        name.split(".")[-2:-1] == ["lm_head"] for name in checkpoint.tensors
    ):
        found.append("tied embeddings: there is no lm_head tensor, and none is made")
    used = set(checkpoint.shards)
    others = [
        name
        for name in checkpoint.store.sizes()
        if name.endswith(".safetensors") and name not in used
    ]
    if others:
        found.append(
            f"{len(others)} safetensors files belong to no index and are left out "
            f"({', '.join(others[:3])}{', ...' if len(others) > 3 else ''})"
        )
    for name, reason in checkpoint.store.left_out().items():
        if name not in used:
            found.append(f"{name} is left out: {reason}")
    for module in modules.values():
        for scale in module.uncalibrated:
            found.append(f"{module.name}.{scale} is 0, never calibrated, and is dropped")
    if settings.transform_targets:
        found.append("transform_config: rotations are applied at run time")
    return found
