"""The safetensors header: parsed strictly, and written.

A file is 8 bytes of header length (u64, little-endian), a JSON header, then the data; each tensor
has a dtype, a shape and [begin, end) offsets into the data, which the tensors cover without gap
or overlap. Source: the safetensors format description (huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, get_args

import msgspec
from msgspec import Meta, Struct

from ctconvert.errors import BadInputError
from ctconvert.specs import DTYPE_BITS, Dtype, Size, TensorSpec
from ctconvert.store.base import BLOCK, Store

#: safetensors' own bound on a header.
MAX_HEADER = 100_000_000
#: torch's bound on the dimensions of a tensor.
MAX_RANK = 64


class TensorEntry(Struct, frozen=True, gc=False):
    """Where a tensor lies: full name, file, absolute byte offset, and its spec."""

    name: str
    file: str
    offset: Size
    spec: TensorSpec

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    @property
    def end(self) -> int:
        return self.offset + self.spec.nbytes


def total_bytes(entries: Iterable[TensorEntry]) -> int:
    """Bytes of a set of tensors."""
    return sum(entry.nbytes for entry in entries)


class _Entry(Struct):
    """A tensor's entry of a header, as the file has it."""

    dtype: str
    shape: Annotated[tuple[Size, ...], Meta(max_length=MAX_RANK)]
    data_offsets: tuple[Size, Size]


_HEADER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY = msgspec.json.Decoder(_Entry)
_METADATA = msgspec.json.Decoder(dict[str, str] | None)
_DTYPES: Mapping[str, Dtype] = {name: name for name in get_args(Dtype)}


class Header(Struct, frozen=True):
    """A parsed header: the tensors in offset order, and the file's ``__metadata__``."""

    tensors: list[TensorEntry]
    metadata: dict[str, str]


def read_header(store: Store, name: str) -> Header:
    """The header of one safetensors file.

    Raises:
        BadInputError: the file is truncated or its header is damaged.
    """
    where = store.path(name)
    size = store.sizes()[name]
    length = header_length(store.read(name, 0, 8), size, where)
    return parse_header(store.read(name, 8, length), size, name, where)


def header_length(prefix: bytes, size: int, where: str) -> int:
    """The length of the JSON header.

    Args:
        prefix: the first 8 bytes (fewer if the file is shorter).
        size: the file's size in bytes.
        where: the file, for messages.

    Raises:
        BadInputError: the file is too short for it, or it is out of bounds.
    """
    if len(prefix) < 8:
        raise BadInputError(
            f"{where}: {size} bytes is too short for a safetensors file", file=where
        )
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER:
        raise BadInputError(
            f"{where}: header length {length} is over {MAX_HEADER}; this is no safetensors file "
            "or it is damaged",
            file=where,
        )
    if 8 + length > size:
        raise BadInputError(
            f"{where}: truncated: the header needs {8 + length} bytes, the file has {size}; "
            "download it again",
            file=where,
        )
    return int(length)


def _check_unique(text: bytes, count: int) -> None:
    """Raises ValueError where a name occurs twice, which a parsed dictionary no longer shows.

    Plain headers are told by counting; only what is written with escapes or holds these words in
    its names is parsed once more, slowly.
    """
    words = (b'"dtype"', b'"shape"', b'"data_offsets"')
    if b"\\" not in text and all(text.count(word) == count for word in words):
        return

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    json.loads(text, object_pairs_hook=unique)


def parse_header(text: bytes, size: int, file: str, where: str) -> Header:
    """The tensors of a file, in offset order.

    Args:
        text: the JSON header.
        size: the file's size in bytes.
        file: the file's name inside the checkpoint.
        where: the file, for messages.

    Raises:
        BadInputError: the header is not JSON, names an unknown dtype, or its offsets overlap,
            leave gaps or lie outside the file.
    """
    try:
        header = _HEADER.decode(text)
        raw_metadata = header.pop("__metadata__", None)
        _check_unique(text, len(header))
    except msgspec.ValidationError:
        raise BadInputError(f"{where}: the header is not a JSON object", file=where) from None
    except (ValueError, RecursionError) as error:
        raise BadInputError(
            f"{where}: the header is not valid JSON ({error})", file=where
        ) from None
    try:
        metadata = {} if raw_metadata is None else _METADATA.decode(raw_metadata) or {}
    except ValueError as error:  # names that are not UTF-8 among them
        raise BadInputError(f"{where}: the header's __metadata__: {error}", file=where) from None
    start, data = 8 + len(text), size - 8 - len(text)
    specs: dict[tuple[str, tuple[int, ...]], TensorSpec] = {}
    found = [_parse_entry(name, raw, file, where, start, specs) for name, raw in header.items()]
    found.sort(key=lambda item: (item.offset, item.nbytes))
    position = start
    for item in found:
        if item.offset != position:
            how = "overlaps another tensor" if item.offset < position else "leaves a gap before it"
            raise BadInputError(
                f"{where}: tensor {item.name} at data offset {item.offset - start} {how}; the "
                "file is damaged",
                file=where,
            )
        position += item.nbytes
    if position > size:
        raise BadInputError(
            f"{where}: truncated: the header describes {position - start} bytes of data, the "
            f"file has {data}; download it again",
            file=where,
        )
    if position < size:
        raise BadInputError(
            f"{where}: {size - position} bytes follow the last tensor; the file is damaged",
            file=where,
        )
    return Header(found, metadata)


def _parse_entry(
    name: str,
    raw: msgspec.Raw,
    file: str,
    where: str,
    start: int,
    specs: dict[tuple[str, tuple[int, ...]], TensorSpec],
) -> TensorEntry:
    try:
        entry = _ENTRY.decode(raw)
    except ValueError as error:
        raise BadInputError(
            f"{where}: tensor {name}: its header entry: {error}", file=where
        ) from None
    begin, end = entry.data_offsets
    if begin > end:
        raise BadInputError(
            f"{where}: tensor {name}: bad data_offsets [{begin}, {end}]", file=where
        )
    spec = specs.get((entry.dtype, entry.shape))
    if spec is None:
        if entry.dtype not in _DTYPES:
            raise BadInputError(
                f"{where}: tensor {name}: unknown dtype {entry.dtype!r}", file=where
            )
        spec = TensorSpec(_DTYPES[entry.dtype], entry.shape)
        specs[entry.dtype, entry.shape] = spec
    if math.prod(spec.shape) * DTYPE_BITS[spec.dtype] != 8 * (end - begin):
        raise BadInputError(
            f"{where}: tensor {name}: {spec} does not fill its {end - begin} bytes", file=where
        )
    return TensorEntry(name, file, start + begin, spec)


def build_header(
    tensors: Sequence[tuple[str, TensorSpec]], metadata: Mapping[str, str]
) -> tuple[bytes, list[int]]:
    """The leading bytes of a file that holds ``tensors`` in their order, and their offsets.

    Args:
        tensors: names and specs.
        metadata: of the header, beside ``format: pt``.

    Returns:
        the length prefix and the JSON, padded with spaces so that the data starts at a multiple
        of :data:`BLOCK`, and the absolute offset of each tensor.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    begins = []
    position = 0
    for name, spec in tensors:
        begins.append(position)
        end = position + spec.nbytes
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % BLOCK)
    return struct.pack("<Q", len(text)) + text, [8 + len(text) + begin for begin in begins]
