"""The safetensors header: parsed strictly, and written.

A file is 8 bytes of header length (u64, little-endian), a JSON header, then the data; each tensor
has a dtype, a shape and [begin, end) offsets into the data, which the tensors cover without gap
or overlap. Source: the safetensors format description (huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctconvert.errors import BadInputError
from ctconvert.specs import DTYPE_BITS, TensorSpec

#: safetensors' own bound on a header.
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: file name, absolute byte offset, and its spec."""

    name: str
    file: str
    offset: int
    spec: TensorSpec

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes


@dataclass(frozen=True)
class Shard:
    """An output file: its name, leading bytes, and each tensor's absolute offset."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    specs: Mapping[str, TensorSpec]

    @property
    def size(self) -> int:
        return len(self.header) + sum(spec.nbytes for spec in self.specs.values())


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
        raise BadInputError(f"{where}: {size} bytes is too short for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER:
        raise BadInputError(
            f"{where}: header length {length} is over {MAX_HEADER}; this is no safetensors file "
            "or it is damaged"
        )
    if 8 + length > size:
        raise BadInputError(
            f"{where}: truncated: the header needs {8 + length} bytes, the file has {size}; "
            "download it again"
        )
    return int(length)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def parse_header(text: bytes, size: int, file: str, where: str) -> list[TensorEntry]:
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
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{where}: the header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise BadInputError(f"{where}: the header is not a JSON object")
    start, data = 8 + len(text), size - 8 - len(text)
    found = []
    for name, entry in header.items():
        if name != "__metadata__":
            found.append(_parse_entry(name, entry, file, where, start))
    found.sort(key=lambda item: (item.offset, item.nbytes))
    position = start
    for item in found:
        if item.offset != position:
            how = "overlaps another tensor" if item.offset < position else "leaves a gap before it"
            raise BadInputError(
                f"{where}: tensor {item.name} at data offset {item.offset - start} {how}; the "
                "file is damaged"
            )
        position += item.nbytes
    if position > size:
        raise BadInputError(
            f"{where}: truncated: the header describes {position - start} bytes of data, the "
            f"file has {data}; download it again"
        )
    if position < size:
        raise BadInputError(
            f"{where}: {size - position} bytes follow the last tensor; the file is damaged"
        )
    return found


def _parse_entry(name: str, entry: Any, file: str, where: str, start: int) -> TensorEntry:
    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    if not isinstance(entry, dict):
        raise BadInputError(f"{where}: tensor {name}: its header entry is not an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise BadInputError(f"{where}: tensor {name}: unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(map(is_size, shape)):
        raise BadInputError(f"{where}: tensor {name}: shape {shape!r} is not a list of sizes")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(map(is_size, offsets))
        or offsets[0] > offsets[1]
    ):
        raise BadInputError(f"{where}: tensor {name}: bad data_offsets {offsets!r}")
    spec = TensorSpec(dtype, tuple(shape))
    if math.prod(shape) * DTYPE_BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise BadInputError(
            f"{where}: tensor {name}: {spec} does not fill its {offsets[1] - offsets[0]} bytes"
        )
    return TensorEntry(name, file, start + offsets[0], spec)


def build_header(tensors: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The leading bytes of a file that holds ``tensors`` in their order, and their offsets.

    Returns:
        the length prefix and the JSON, padded with spaces so that the data starts at a multiple
        of 8, and the absolute offset of each tensor.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, spec in tensors.items():
        end = position + spec.nbytes
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    offsets = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in tensors}
    return struct.pack("<Q", len(text)) + text, offsets
