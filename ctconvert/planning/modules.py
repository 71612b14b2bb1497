"""One quantised module of a source: its tensors checked against a scheme."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from ctconvert import formats
from ctconvert.errors import BadInputError, IncompleteError
from ctconvert.formats.base import METADATA_NAMES, ModuleTensors, activation_names
from ctconvert.formats.quantization import ModuleScheme, QuantizationSettings, guess_class
from ctconvert.records import SourceModule, expert_entry
from ctconvert.specs import TensorSpec, WeightSpec
from ctconvert.store.safetensors import TensorEntry, total_bytes

#: Tensors that may stand beside a quantised weight and are no part of it.
_BESIDE = frozenset({"bias", "k_scale", "v_scale", "q_scale"})

_ACTIVATIONS = ("input_scale", "output_scale", "input_global_scale")

Entries = Mapping[str, TensorEntry]


@dataclass(slots=True)
class Module:
    """A module whose weight is quantised in the source, as its headers describe it.

    ``source`` is None where it cannot be read, ``reason`` then saying why; a module that is read
    can have a reason too, why nothing can take it. ``fault`` says that the reason is one of the
    source, whose config and tensors contradict each other. ``scheme`` is what the config says of
    it. ``uncalibrated`` names activation scales of 0.
    """

    name: str
    format: str
    label: str
    entries: Entries
    source: SourceModule | None = None
    scheme: ModuleScheme | None = None
    uncalibrated: list[str] = field(default_factory=list)
    reason: str = ""
    fault: bool = False

    @property
    def nbytes(self) -> int:
        return total_bytes(self.entries.values())


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
        raise BadInputError(f"module {module}: {local}: {error}", module=module) from None
    if local.endswith("zero_point") and not all(map(math.isfinite, values)):
        raise BadInputError(
            f"module {module}: {local} is {values}, not a whole number", module=module
        )
    if local == "weight_shape" and spec.shape[1:] == (2,) and values != values[-2:] * spec.shape[0]:
        raise BadInputError(
            f"module {module}: {local} says that its experts differ in shape", module=module
        )
    return values[-2:]


@dataclass(frozen=True)
class _Kind:
    """What modules with the same scheme, tensors and few-element values have in common.

    ``spec`` is None where the format cannot be read. ``fault`` says that ``reason`` is a
    contradiction of the source, ``incomplete`` that something of the module is missing.
    """

    spec: WeightSpec | None
    label: str = ""
    owned: list[str] = field(default_factory=list)
    valued: list[str] = field(default_factory=list)
    zeros: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    beside: list[str] = field(default_factory=list)
    uncalibrated: list[str] = field(default_factory=list)
    reason: str = ""
    fault: bool = False
    incomplete: bool = False


class Reader:
    """Describes the quantised modules of one checkpoint, each kind of module once.

    Args:
        settings: the checkpoint's.
        metadata: contents of the few-element tensors by full name.
    """

    def __init__(self, settings: QuantizationSettings, metadata: Mapping[str, bytes]) -> None:
        self.settings = settings
        self.metadata = metadata
        self._kinds: dict[object, _Kind] = {}

    def fits(self, name: str, scheme: ModuleScheme, entries: Entries) -> bool:
        """Whether a module's tensors are exactly what a scheme stores."""
        kind = self._kind(name, scheme, entries)
        return kind.spec is not None and not kind.reason

    def module(self, name: str, scheme: ModuleScheme, entries: Entries) -> Module:
        """One module; its tensors are checked against its scheme.

        Raises:
            IncompleteError: one is missing.
        """
        kind = self._kind(name, scheme, entries)
        if kind.incomplete:
            raise IncompleteError(f"module {name}: {kind.reason}", module=name)
        if kind.spec is None:
            found = Module(name, scheme.format, _label(scheme), entries)
        else:
            source = SourceModule(
                name=name,
                weight=kind.spec,
                experts=_experts(scheme, entries),
                shared=kind.shared,
                tensors={key: entries[key] for key in kind.owned},
                values={key: self.metadata[entries[key].name].hex() for key in kind.valued},
                zeros=kind.zeros,
                beside={key: entries[key] for key in kind.beside},
            )
            found = Module(name, scheme.format, kind.label, entries, source)
        found.scheme, found.uncalibrated = scheme, kind.uncalibrated
        found.reason, found.fault = kind.reason, kind.fault
        cls = "Embedding" if kind.spec and kind.spec.embedding else "Linear"
        if not found.reason and (rotation := self.settings.rotation_of(name, cls)):
            found.reason = (
                f"transform_config rotates its inputs or outputs at run time ({rotation}), which "
                "no layout carries"
            )
        return found

    def _kind(self, name: str, scheme: ModuleScheme, entries: Entries) -> _Kind:
        """What the module has in common with others like it; checked once for all of them."""
        raw = tuple(self._told(local, entry) for local, entry in entries.items())
        specs = tuple((local, entry.spec) for local, entry in entries.items())
        embedding = _is_embedding(name, scheme)
        key = (scheme.format, id(scheme.scheme), embedding, specs, raw)
        found = self._kinds.get(key)
        if found is None:
            try:
                found = self._new_kind(name, scheme, entries, embedding)
            except BadInputError as error:
                text = str(error).removeprefix(f"module {name}: ")
                missing = isinstance(error, IncompleteError)
                found = _Kind(None, reason=text, fault=True, incomplete=missing)
            self._kinds[key] = found
        return found

    def _told(self, local: str, entry: TensorEntry) -> object:
        """What a few-element tensor's value tells of its module; of a sound scale, that it is."""
        data = self.metadata.get(entry.name)
        if data is None or entry.spec.dtype != "F32" or not local.endswith("_scale"):
            return data
        return all(0 < value < math.inf for value in numbers(data, entry.spec)) or data

    def _new_kind(
        self, name: str, scheme: ModuleScheme, entries: Entries, embedding: bool
    ) -> _Kind:
        handler = formats.get(scheme.format)
        if handler is None:
            return _Kind(
                None,
                reason=formats.UNREAD.get(scheme.format, f"format {scheme.format} is not read"),
            )
        if handler.weight_name not in entries:
            have = ", ".join(f"{local} {entry.spec}" for local, entry in sorted(entries.items()))
            raise BadInputError(
                f"the config says {scheme.format}, which stores {handler.weight_name}, but it "
                f"holds {have}; the config and the tensors contradict each other"
            )
        for few in METADATA_NAMES & entries.keys():
            if entries[few].name not in self.metadata:
                return _Kind(None, reason=f"{few} is {entries[few].spec}, expected a few elements")
        experts = _experts(scheme, entries)
        if experts == 0:
            weight = entries[handler.weight_name].spec
            raise BadInputError(f"{handler.weight_name} is {weight}: no experts")
        local = entries if experts is None else self._first_expert(entries, experts)
        values = {
            key: _few(name, key, self.metadata[entry.name], entries[key].spec)
            for key, entry in local.items()
            if entry.name in self.metadata
        }
        tensors = ModuleTensors(
            name,
            {key: entry.spec for key, entry in local.items()},
            embedding,
            self.settings.version,
            values,
            experts is not None,
        )
        spec = handler.spec(tensors, scheme)
        owned = {*handler.parameter_names(spec), *activation_names(tensors, scheme)}
        zeros: tuple[str, ...] = ()
        if spec.symmetric and "weight_zero_point" in local:
            tensors.check_zero_points(spec)
            zeros = ("weight_zero_point",)
        owned |= set(zeros)
        shared = (
            ()
            if experts is None
            else tuple(
                key
                for key in entries
                if key in owned and key not in values and entries[key].spec.shape[:1] != (experts,)
            )
        )
        beside = _BESIDE | ({"output_scale"} if self.settings.kv_cache else set())
        used = {key for key, _ in spec.side}
        unknown = [key for key in entries if key not in owned and key not in beside]
        reason = ""
        if unknown:
            reason = f"holds {', '.join(unknown)}, which its scheme ({spec.label}) does not explain"
        return _Kind(
            spec,
            spec.label,
            owned=[key for key in entries if key in owned],
            valued=[key for key in sorted(owned) if key in values],
            zeros=zeros,
            shared=shared,
            beside=[key for key in entries if key not in owned and key in beside],
            uncalibrated=[key for key in _ACTIVATIONS if key in owned and key not in used],
            reason=reason,
        )

    def _first_expert(self, entries: Entries, count: int) -> dict[str, TensorEntry]:
        """The tensors of one expert: slices of the 3-D ones, what all share as it is."""
        found = {}
        for local, entry in entries.items():
            shape = entry.spec.shape
            if shape[:1] == (count,) and entry.name not in self.metadata:
                found[local] = expert_entry(entry, 0)
            elif local == "weight_shape" and shape in ((3,), (count, 2)):
                spec = TensorSpec(entry.spec.dtype, (2,))
                found[local] = msgspec.structs.replace(entry, spec=spec)
            else:
                found[local] = entry
        return found


def _experts(scheme: ModuleScheme, entries: Entries) -> int | None:
    """How many experts 3-D tensors hold, None where they are 2-D."""
    handler = formats.get(scheme.format)
    assert handler is not None
    shape = entries[handler.weight_name].spec.shape
    return shape[0] if len(shape) == 3 else None


def _label(scheme: ModuleScheme) -> str:
    """For people, where no format describes the weight."""
    if scheme.scheme is None or scheme.scheme.weights is None:
        return scheme.format
    args = scheme.scheme.weights
    return f"{'fp' if args.type == 'float' else 'int'}{args.num_bits} {args.strategy}"


def _is_embedding(name: str, scheme: ModuleScheme) -> bool:
    """A class target ``Embedding``, or a name that says so and that no Linear target means."""
    if scheme.target == "Embedding":
        return True
    return guess_class(name) == "Embedding" and scheme.target != "Linear"
