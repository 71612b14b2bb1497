"""A config group, read without compressed-tensors; what is not known here goes to it.

The rules are those of its validators (compressed-tensors 0.20), for the values as it writes them.
It also takes ``"4"`` for 4 or ``INT`` for ``int``: such values are its own to judge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from msgspec import ValidationError, convert
from msgspec.structs import replace

from ctconvert.formats.quantization.presets import PRESETS
from ctconvert.formats.quantization.records import FORMAT_NAMES, QuantArgs, Scheme

ENDS = ("weights", "input_activations", "output_activations")
_FLOATS = "float16 bfloat16 float32 float64 float8_e4m3fn float8_e5m2 float8_e8m0fnu"
_INTS = "int8 int16 int32 int64 uint8 uint16 uint32 uint64"
_DTYPES = frozenset(f"{_FLOATS} {_INTS}".split())
_OBSERVERS = {"observer", "observer_kwargs"}
_DEEPEST = 8
_LONGEST = 10_000


class UnreadError(ValueError):
    """A value that cannot be read: ``path`` below the config group, ``text`` saying why."""

    def __init__(self, path: str, text: str) -> None:
        super().__init__(f"{path}: {text}")
        self.path = path
        self.text = text


def printable(text: str, length: int = 300) -> str:
    """One line that can be printed, whatever a checkpoint says."""
    shown = "".join(
        mark if mark.isprintable() else mark.encode("unicode_escape").decode()
        for mark in text[:length]
    )
    return shown + "..." * (len(text) > length)


def shown(value: Any) -> str:
    """A value of a config in a message: short, and never an error of its own."""
    if isinstance(value, str):
        return printable(repr(value[:80])) + "..." * (len(value) > 80)
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "a number out of all bounds"
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return repr(value)


def check_values(value: Any, path: str = "") -> None:
    """Raises UnreadError for what no reader should be handed: huge, deep, NaN, half characters."""
    waiting: list[tuple[str, Any, int]] = [(path, value, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        if isinstance(value, str):
            _check_text(path, value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UnreadError(path, f"is {value}, not a number")
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise UnreadError(path, f"is {shown(value)}")
        elif isinstance(value, list | dict):
            if depth == _DEEPEST:
                raise UnreadError(path, "is nested too deeply")
            keyed = value if isinstance(value, dict) else dict(enumerate(value))
            for key, item in keyed.items():
                if isinstance(key, str):
                    _check_text(path, key)
                waiting.append((f"{path}.{key}" if path else str(key), item, depth + 1))


def _check_text(path: str, text: str) -> None:
    if len(text) > _LONGEST:
        raise UnreadError(path, f"holds a text of {len(text)} characters")
    if not text.isascii() and any("\ud800" <= mark <= "\udfff" for mark in text):
        raise UnreadError(path, f"holds {shown(text)}, which is no Unicode")


def read_group(name: str, group: Any) -> Scheme:
    """A config group, or a list of targets under a preset's name.

    Args:
        name: of the group, for presets.
        group: its JSON value.

    Raises:
        UnreadError: it holds something that is not known here.
    """
    if isinstance(group, list):
        if name.upper() not in PRESETS:
            raise UnreadError("", f"is a list, but {shown(name)} is no preset scheme")
        group = {"targets": group, **PRESETS[name.upper()]}
    if not isinstance(group, dict):
        raise UnreadError("", f"is {shown(group)}, not an object")
    _known_fields("", group, Scheme.__struct_fields__)
    ends = {end: read_args(end, group.get(end)) for end in ENDS}
    if group.get("format") not in (None, *FORMAT_NAMES):
        raise UnreadError("format", f"{shown(group['format'])} is no known format")
    if group.get("format") == "mixed-precision":
        raise UnreadError("format", "'mixed-precision' is no format of a single group")
    inputs, outputs = ends["input_activations"], ends["output_activations"]
    if inputs is not None and inputs.strategy in ("channel", "block"):
        raise UnreadError("input_activations.strategy", f"is {inputs.strategy!r}")
    for end, args in (("input_activations", inputs), ("output_activations", outputs)):
        if args is not None and args.actorder is not None:
            raise UnreadError(f"{end}.actorder", "is for weights only")
    targets = _converted("", {"targets": group.get("targets")}, Scheme).targets
    return Scheme(targets=targets, format=group.get("format"), **ends)


def read_args(path: str, value: Any) -> QuantArgs | None:
    """The ``weights`` or activations of a config group, settled as compressed-tensors does.

    Raises:
        UnreadError: a value is not known here, or contradicts another.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise UnreadError(path, f"is {shown(value)}, not an object")
    _known_fields(path, value, (*QuantArgs.__struct_fields__, *_OBSERVERS))
    if not isinstance(value.get("observer"), str | None):
        raise UnreadError(f"{path}.observer", f"is {shown(value['observer'])}, not a name")
    if not isinstance(value.get("observer_kwargs", {}), dict):
        raise UnreadError(f"{path}.observer_kwargs", f"is {shown(value['observer_kwargs'])}")
    fields = {key: item for key, item in value.items() if key not in _OBSERVERS}
    for key in ("scale_dtype", "zp_dtype"):
        if isinstance(dtype := fields.get(key), str):
            fields[key] = dtype.removeprefix("torch.")
            if fields[key] not in _DTYPES:
                raise UnreadError(f"{path}.{key}", f"{shown(dtype)} is no known dtype")
    if is_group_order(order := fields.get("actorder")):
        fields["actorder"] = "group"
    elif order == "static":
        fields["actorder"] = "weight"
    elif order is False:
        fields["actorder"] = None
    if fields.get("strategy") is None:
        fields["strategy"] = _strategy_of(path, fields.get("group_size"))
    args = _converted(path, fields, QuantArgs)
    _check(path, args)
    return replace(args, zp_dtype=args.zp_dtype or _zero_point_dtype(path, args))


def is_group_order(order: Any) -> bool:
    """Whether an ``actorder`` asks for a ``weight_g_idx``."""
    return order is True or (isinstance(order, str) and order.lower() in ("group", "dynamic"))


def _known_fields(path: str, value: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if unknown := value.keys() - set(known):
        first = printable(min(unknown), 80)
        raise UnreadError(f"{path}.{first}".lstrip("."), "is no known field")


def _converted(path: str, value: Any, kind: type[Any]) -> Any:
    try:
        return convert(value, kind)
    except ValidationError as error:
        text, _, below = str(error).partition(" - at `$")
        below = re.sub(r"\[(\d+)\]", r".\1", below.rstrip("`"))
        raise UnreadError(f"{path}{below}".lstrip("."), text[0].lower() + text[1:]) from None


def _strategy_of(path: str, group_size: Any) -> str:
    if not isinstance(group_size, int):
        return "tensor"
    if group_size == 0:
        raise UnreadError(f"{path}.group_size", "is 0, which is neither a group nor a channel")
    return "group" if group_size > 0 else "channel"


def _check(path: str, args: QuantArgs) -> None:
    """What contradicts itself, by the rules of ``QuantizationArgs.validate_model_after``."""
    grouped = args.strategy in ("group", "tensor_group")
    if args.strategy == "token" and not args.dynamic:
        raise UnreadError(path, "strategy 'token' needs dynamic")
    if grouped and (args.group_size is None or args.group_size < 1):
        raise UnreadError(f"{path}.group_size", f"strategy {args.strategy!r} needs one")
    if args.group_size is not None and args.group_size > 0 and not grouped:
        raise UnreadError(f"{path}.group_size", f"strategy {args.strategy!r} has none")
    if (args.block_structure is None) == (args.strategy == "block"):
        raise UnreadError(f"{path}.block_structure", "goes with strategy 'block' and with no other")
    if args.dynamic and args.strategy not in ("token", "tensor", "tensor_group", "group"):
        raise UnreadError(f"{path}.dynamic", f"strategy {args.strategy!r} cannot be dynamic")
    if args.dynamic == "local" and args.strategy != "tensor_group":
        raise UnreadError(f"{path}.dynamic", "'local' needs strategy 'tensor_group'")


def _zero_point_dtype(path: str, args: QuantArgs) -> str:
    if args.type == "int":
        return "int8" if args.num_bits <= 8 else "int16" if args.num_bits <= 16 else "int32"
    if args.num_bits not in (4, 6, 8):
        raise UnreadError(f"{path}.num_bits", f"there is no float of {args.num_bits} bits")
    return "float8_e4m3fn"
