"""JSON in and out: the one place that checks types and ranges."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from ctconvert.errors import VerificationError

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Blake3 = Sha256
Hex = Annotated[str, Meta(pattern="^([0-9a-f]{2})*$")]
T = TypeVar("T")


def to_json(record: Struct, indent: int | None = None) -> bytes:
    """A record as JSON, with a final newline; ``indent`` spaces a level, or on one line."""
    data = msgspec.json.encode(record)
    return (data if indent is None else msgspec.json.format(data, indent=indent)) + b"\n"


def from_json(data: bytes, kind: type[T], where: str) -> T:
    """A record of JSON, every type and range checked; ``where`` names it in messages.

    Raises:
        VerificationError: it is no JSON, or a field is not what it should be; the field is named.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        # msgspec's message repeats what the field holds, as it is
        text = "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode()
            for char in str(error)
        )
        raise VerificationError(f"{where}: damaged: {text}", file=where) from None
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{where}: damaged: not valid JSON ({error})", file=where) from None
