"""A source checkpoint in a store: config.json, the index and every header, nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from msgspec import Struct

from ctconvert.errors import BadInputError
from ctconvert.store.base import Store
from ctconvert.store.safetensors import Header, TensorEntry, read_header

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
MANIFEST = "ctconvert.json"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors$")
#: The largest config.json or index that is read; the largest of real models are a tenth of it.
_MAX_JSON = 200_000_000
#: Other tools' weights: never converted, never copied.
OTHER_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".tflite",
    ".ot",
    ".lock",
    ".incomplete",
)


class _Index(Struct):
    weight_map: dict[str, str]


class Checkpoint:
    """An open checkpoint.

    ``config`` is config.json and ``config_text`` its text, ``tensors`` every tensor by name in
    file and offset order, ``shards`` the files that hold them, ``metadata`` what their headers
    hold under ``__metadata__``, by file. Where there is an index it says what the checkpoint is
    made of; ``unlisted`` are the tensors in its shards that it does not list, as loaders ignore.

    Raises:
        BadInputError: a file is missing, damaged or contradicts another.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.config_text, self.config = _config(store)
        sizes = store.sizes()
        weight_map = None
        if INDEX in sizes:
            weight_map = _weight_map(store)
            self.shards = sorted(set(weight_map.values()))
        else:
            self.shards = _shards_without_index(store)
        self.tensors: dict[str, TensorEntry] = {}
        self.unlisted: list[str] = []
        self.metadata: dict[str, dict[str, str]] = {}
        for shard, header in zip(self.shards, _headers(store, self.shards), strict=True):
            if header.metadata:
                self.metadata[shard] = header.metadata
            for entry in header.tensors:
                self._add(entry, shard, weight_map)
        for name, shard in (weight_map or {}).items():
            if name not in self.tensors:
                raise BadInputError(
                    f"{store.path(INDEX)}: places tensor {name} in {shard}, which does not hold it",
                    file=store.path(INDEX),
                )

    def _add(self, entry: TensorEntry, shard: str, weight_map: dict[str, str] | None) -> None:
        where = self.store.path(shard)
        if weight_map is not None and weight_map.get(entry.name) != shard:
            listed = weight_map.get(entry.name)
            if listed is None:
                self.unlisted.append(entry.name)
                return
            raise BadInputError(
                f"{where}: holds tensor {entry.name}, which the index places in {listed}; the "
                "index and the shards do not belong together",
                file=where,
            )
        if entry.name in self.tensors:
            raise BadInputError(
                f"{where}: tensor {entry.name} is also in {self.tensors[entry.name].file}",
                file=where,
            )
        self.tensors[entry.name] = entry

    def check_unchanged(self) -> None:
        """Raises ConversionError where a file is no longer the one that was opened."""
        index = [INDEX] if INDEX in self.store.sizes() else []
        self.store.check_unchanged([CONFIG, *index, *self.shards])

    def side_files(self) -> list[str]:
        """Files to copy beside the weights: tokenizer, generation config, chat template, ..."""
        left_out = self.store.left_out()
        return [
            name
            for name in self.store.sizes()
            if not name.endswith(OTHER_WEIGHTS)
            and name not in (CONFIG, MANIFEST)
            and name not in left_out
            and not any(part.startswith(".") for part in name.split("/"))
        ]

    def values(self, entries: Iterable[TensorEntry]) -> dict[str, bytes]:
        """The bytes of few-element tensors by full name, neighbouring ones read together."""
        found: dict[str, bytes] = {}
        run: list[TensorEntry] = []

        def flush() -> None:
            if not run:
                return
            first = run[0].offset
            data = self.store.read(run[0].file, first, run[-1].end - first)
            for entry in run:
                found[entry.name] = data[entry.offset - first :][: entry.nbytes]

        for entry in sorted(entries, key=lambda item: (item.file, item.offset)):
            near = run and run[-1].file == entry.file and entry.offset - run[-1].offset < 1 << 16
            if not near or entry.offset - run[0].offset > 1 << 24:
                flush()
                run = []
            run.append(entry)
        flush()
        return found


def _headers(store: Store, shards: Sequence[str]) -> Iterator[Header]:
    if store.at_once == 1:
        yield from (read_header(store, shard) for shard in shards)
        return
    with ThreadPoolExecutor(store.at_once) as pool:
        yield from pool.map(lambda shard: read_header(store, shard), shards)


def _read_json(store: Store, name: str) -> bytes:
    if name not in store.sizes():
        reason = store.left_out().get(name)
        raise BadInputError(
            f"{store.where}: "
            + (f"{name} is {reason}" if reason else f"no {name}; name a checkpoint's directory")
        )
    if store.sizes()[name] > _MAX_JSON:
        raise BadInputError(
            f"{store.path(name)}: {store.sizes()[name]} bytes is too large for a {name}",
            file=store.path(name),
        )
    return store.read(name)


def _config(store: Store) -> tuple[str, dict[str, Any]]:
    data = _read_json(store, CONFIG)
    try:
        text = data.decode()
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInputError(
            f"{store.path(CONFIG)}: not valid JSON ({error})", file=store.path(CONFIG)
        ) from None
    if not isinstance(value, dict):
        raise BadInputError(f"{store.path(CONFIG)}: not a JSON object", file=store.path(CONFIG))
    return text, value


def _weight_map(store: Store) -> dict[str, str]:
    where = store.path(INDEX)
    data = _read_json(store, INDEX)
    try:
        weight_map = msgspec.json.decode(data, type=_Index).weight_map
    except msgspec.ValidationError:
        raise BadInputError(f"{where}: {_wrong_index(data)}", file=where) from None
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{where}: not valid JSON ({error})", file=where) from None
    if not weight_map:
        raise BadInputError(f"{where}: no weight_map", file=where)
    sizes = store.sizes()
    for file, name in {file: name for name, file in reversed(weight_map.items())}.items():
        if not file.endswith(".safetensors"):
            raise BadInputError(
                f"{where}: tensor {name}: {file!r} is no safetensors file", file=where
            )
        if file.startswith("/") or "\\" in file or ".." in file.split("/"):
            raise BadInputError(
                f"{where}: tensor {name}: {file!r} is outside the checkpoint's directory",
                file=where,
            )
        if file not in sizes:
            reason = store.left_out().get(file, "not there; the download is incomplete")
            raise BadInputError(f"{where}: names {file}, which is {reason}", file=where)
    return weight_map


def _wrong_index(data: bytes) -> str:
    """What is wrong with an index that has no map of names to names."""
    try:
        index = msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:
        return f"not valid JSON ({error})"
    if not isinstance(index, dict):
        return "not a JSON object"
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        return "no weight_map"
    name = next(name for name, file in weight_map.items() if not isinstance(file, str))
    return f"tensor {name}: {weight_map[name]!r} is no file name"


def _shards_without_index(store: Store) -> list[str]:
    sizes = store.sizes()
    if "model.safetensors" in sizes:
        return ["model.safetensors"]
    found = sorted(n for n in sizes if n.endswith(".safetensors") and "/" not in n)
    if not found:
        raise BadInputError(f"{store.where}: no safetensors files")
    numbered = [match for match in map(_SHARD.match, found) if match]
    if len(found) == 1 and not numbered:
        return found
    if len({(match[1], match[3]) for match in numbered}) != 1 or len(numbered) != len(found):
        raise BadInputError(
            f"{store.where}: {len(found)} safetensors files ({', '.join(found[:3])}, ...) and no "
            f"{INDEX} to say which belong together"
        )
    have = {int(match[2]) for match in numbered}
    total = int(numbered[0][3])
    missing = next((index for index in range(1, total + 1) if index not in have), None)
    if missing is not None:
        name = f"{numbered[0][1]}-{missing:05}-of-{total:05}.safetensors"
        raise BadInputError(f"{store.where}: shard {name} is missing; the download is incomplete")
    return found
