"""What the light reader does not know goes to compressed-tensors, which is imported only then.

Works with compressed-tensors 0.17 and newer. Its models are turned into records, so nothing else
in the package depends on its version.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from msgspec import ValidationError, convert
from msgspec.structs import replace

from ctconvert.formats.quantization.reading import (
    ENDS,
    UnreadError,
    is_group_order,
    printable,
    shown,
)
from ctconvert.formats.quantization.records import QuantArgs, Scheme

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

_NEWER = "(as compressed-tensors reads it; a newer compressed-tensors may know the field)"


def known_formats() -> frozenset[str]:
    """The formats the installed compressed-tensors knows; none where it is not installed."""
    try:
        from compressed_tensors.config import CompressionFormat
    except ImportError:
        return frozenset()
    return frozenset(item.value for item in CompressionFormat)


def read_group(name: str, group: Any, unread: UnreadError) -> Scheme:
    """A config group as the installed compressed-tensors reads it.

    Args:
        name: of the group, for presets.
        group: its JSON value, checked by :func:`reading.check_values`.
        unread: what the light reader says.

    Raises:
        UnreadError: compressed-tensors refuses it, is not installed, or reads something for which
            there is no record.
    """
    _refuse_booleans(group)
    try:
        from compressed_tensors.quantization import QuantizationScheme
        from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
        from pydantic import ValidationError as PydanticError
    except ImportError:
        hint = "install compressed-tensors, which may know it"
        raise UnreadError(unread.path, f"{unread.text}; {hint}") from None
    plain, ordered = _without_group_order(group)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to who quantises
            if isinstance(plain, list):
                model = preset_name_to_scheme(name, plain)
            else:
                model = QuantizationScheme.model_validate(plain)
    except PydanticError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = ".".join(map(str, first["loc"]))
        said = printable(first["msg"].removeprefix("Value error, "))
        raise UnreadError(path, f"{said} {_NEWER}") from None
    except KeyError as error:
        raise UnreadError("", printable(str(error.args[0]))) from None
    except (NotImplementedError, TypeError, AttributeError):
        raise unread from None  # its validators take types on trust; our own words are clearer
    scheme = record_of(model)
    if ordered and scheme.weights is not None:
        scheme = replace(scheme, weights=replace(scheme.weights, actorder="group"))
    return scheme


def _refuse_booleans(group: Any) -> None:
    """compressed-tensors reads true as 1; a config that says so is wrong."""
    for end in ENDS:
        args = group.get(end) if isinstance(group, dict) else None
        for key in ("num_bits", "group_size", "block_structure"):
            value = args.get(key) if isinstance(args, dict) else None
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, bool):
                    raise UnreadError(f"{end}.{key}", f"is {shown(item)}, not a number")


def _without_group_order(group: Any) -> tuple[Any, bool]:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or not is_group_order(weights.get("actorder")):
        return group, False
    return {**group, "weights": {**weights, "actorder": None}}, True


def record_of(model: QuantizationScheme) -> Scheme:
    """The record of a compressed-tensors model.

    Raises:
        UnreadError: it holds a value for which there is no record.
    """
    ends = {end: _args_of(end, getattr(model, end)) for end in ENDS}
    stored = getattr(model.format, "value", model.format)
    return Scheme(targets=tuple(model.targets), format=stored, **ends)


def _args_of(end: str, model: Any) -> QuantArgs | None:
    if model is None:
        return None
    fields: dict[str, Any] = {}
    for name in QuantArgs.__struct_fields__:
        value = getattr(model, name, None)
        fields[name] = getattr(value, "value", value)
    for name in ("scale_dtype", "zp_dtype"):
        if fields[name] is not None:
            fields[name] = str(fields[name]).removeprefix("torch.")
    fields["actorder"] = {"static": "weight", "dynamic": "group", False: None}.get(
        fields["actorder"], fields["actorder"]
    )
    try:
        return convert(fields, QuantArgs)
    except ValidationError as error:
        text, _, below = str(error).partition(" - at `$")
        path = f"{end}{below.rstrip('`')}"
        raise UnreadError(path, f"{text[0].lower()}{text[1:]}") from None


def model_of(group: Mapping[str, Any] | Scheme) -> QuantizationScheme:
    """compressed-tensors' model of a config group, for its own code to work on.

    Raises:
        UnreadError: it does not take the group.
    """
    from compressed_tensors.quantization import QuantizationScheme
    from pydantic import ValidationError as PydanticError

    if isinstance(group, Scheme):
        plain: dict[str, Any] = {"targets": list(group.targets), "format": group.format}
        for end in ENDS:
            args = getattr(group, end)
            plain[end] = None if args is None else _plain(args)
    else:
        plain = dict(group)
    try:
        return QuantizationScheme.model_validate(_without_group_order(plain)[0])
    except (PydanticError, NotImplementedError) as error:
        raise UnreadError("", printable(str(error))) from None


def _plain(args: QuantArgs) -> dict[str, Any]:
    fields = {name: getattr(args, name) for name in args.__struct_fields__}
    if args.block_structure is not None:
        fields["block_structure"] = list(args.block_structure)
    return fields
