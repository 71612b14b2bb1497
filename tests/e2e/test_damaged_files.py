"""Files and sets of files that are damaged or do not belong together: refused, nothing changed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.builders import config_of, write_checkpoint
from support.damage import (
    GROUP,
    INDEX,
    ONE,
    PLAIN,
    Damage,
    convert,
    fails,
    in_order,
    read_raw,
    refused,
    small,
    write_raw,
)
from support.models import tree

import ctconvert
from ctconvert.store.safetensors import MAX_HEADER


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sound checkpoint of one file; tests damage it."""
    return write_checkpoint(tmp_path / "model", small(), config_of(GROUP))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A sound checkpoint of three files and an index."""
    return write_checkpoint(tmp_path / "model", small(), config_of(GROUP), shards=3)


def test_the_undamaged_checkpoints_convert(model: Path, tmp_path: Path) -> None:
    """Otherwise every refusal below might have another cause."""
    before = tree(model)
    assert convert(model, tmp_path / "out").modules == 3
    ctconvert.verify(tmp_path / "out", against=model)
    assert tree(model) == before


def test_the_undamaged_sharded_checkpoint_converts(sharded: Path, tmp_path: Path) -> None:
    assert convert(sharded, tmp_path / "out").modules == 3
    ctconvert.verify(tmp_path / "out", against=sharded)


def cut_data(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_header(path: Path) -> None:
    os.truncate(path, 100)


def cut_prefix(path: Path) -> None:
    os.truncate(path, 5)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def longest_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", MAX_HEADER) + path.read_bytes()[8:])


def header_not_json(path: Path) -> None:
    header, data = read_raw(path)
    write_raw(path, json.dumps(header).encode()[:-1] + b"!", data)


def header_not_text(path: Path) -> None:
    write_raw(path, b"\xff\xfe" * 40, read_raw(path)[1])


def header_a_list(path: Path) -> None:
    write_raw(path, b"[1, 2, 3]", read_raw(path)[1])


def header_too_deep(path: Path) -> None:
    write_raw(path, b'{"a":' * 100_000, read_raw(path)[1])


def name_twice(path: Path) -> None:
    header, data = read_raw(path)
    text = json.dumps(header)
    write_raw(path, (text[:-1] + f', "{PLAIN}": {json.dumps(header[PLAIN])}}}').encode(), data)


def overlap(path: Path) -> None:
    header, data = read_raw(path)
    first, second = in_order(header)[:2]
    shift = header[first]["data_offsets"][0] - header[second]["data_offsets"][0]
    header[second]["data_offsets"] = [end + shift for end in header[second]["data_offsets"]]
    write_raw(path, header, data)


def beyond_the_end(path: Path) -> None:
    header, data = read_raw(path)
    last = in_order(header)[-1]
    header[last]["data_offsets"] = [end + 4096 for end in header[last]["data_offsets"]]
    write_raw(path, header, data)


def far_beyond_the_end(path: Path) -> None:
    header, data = read_raw(path)
    header["extra"] = {"dtype": "U8", "shape": [1 << 50], "data_offsets": [len(data), 1 << 50]}
    header["extra"]["data_offsets"][1] += len(data)
    write_raw(path, header, data)


def gap(path: Path) -> None:
    header, data = read_raw(path)
    last = in_order(header)[-1]
    start, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [start + 8, end + 8]
    write_raw(path, header, data[:start] + bytes(8) + data[start:])


def bytes_after(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(8))


def spec_case(**fields: Any) -> Damage:
    def change(path: Path) -> None:
        header, data = read_raw(path)
        header[PLAIN] |= fields
        write_raw(path, header, data)

    return change


def offsets_backwards(path: Path) -> None:
    header, data = read_raw(path)
    header[PLAIN]["data_offsets"].reverse()
    write_raw(path, header, data)


def entry_a_number(path: Path) -> None:
    header, data = read_raw(path)
    header[PLAIN] = 5
    write_raw(path, header, data)


FILE_DAMAGE: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "last byte missing": (cut_data, ("truncated",)),
    "half of it missing": (cut_half, ("truncated",)),
    "cut inside the header": (cut_header, ("truncated",)),
    "cut inside the length": (cut_prefix, ("too short",)),
    "empty": (empty, ("too short",)),
    "header length 2^40": (huge_header, (str(1 << 40),)),
    "header length as long as allowed": (longest_header, ("truncated",)),
    "header is not JSON": (header_not_json, ("not valid JSON",)),
    "header is not text": (header_not_text, ("not valid JSON",)),
    "header is a list": (header_a_list, ("not a JSON object",)),
    "header is nested too deep": (header_too_deep, ("not valid JSON",)),
    "a name occurs twice": (name_twice, ("twice",)),
    "overlapping offsets": (overlap, ("overlaps", "tensor")),
    "offsets out of range": (beyond_the_end, ("tensor", "gap")),
    "offsets far out of range": (far_beyond_the_end, ("truncated",)),
    "gap": (gap, ("gap", "tensor")),
    "bytes after the last tensor": (bytes_after, ("8 bytes follow",)),
    "offsets backwards": (offsets_backwards, (PLAIN, "data_offsets")),
    "negative size": (spec_case(shape=[-24, -64]), (PLAIN, "shape")),
    "shape does not fit": (spec_case(shape=[24, 63]), (PLAIN, "does not fill")),
    "shape is a number": (spec_case(shape=7), (PLAIN, "shape")),
    "unknown dtype": (spec_case(dtype="Q7"), (PLAIN, "Q7")),
    "dtype is a list": (spec_case(dtype=["F32"]), (PLAIN, "dtype")),
    "one offset": (spec_case(data_offsets=[0]), (PLAIN, "data_offsets")),
    "entry is a number": (entry_a_number, (PLAIN,)),
}


@pytest.mark.parametrize("case", FILE_DAMAGE)
def test_damaged_file(model: Path, case: str) -> None:
    damage, says = FILE_DAMAGE[case]
    damage(model / ONE)
    refused(model, says=(str(model / ONE), *says))
    fails(ctconvert.inspect, model, says=says)
    fails(ctconvert.plan, model, says=says, target="triton")


@pytest.mark.parametrize("case", ["half of it missing", "header length 2^40", "empty"])
def test_damaged_shard_of_several(sharded: Path, case: str) -> None:
    damage, says = FILE_DAMAGE[case]
    name = "model-00002-of-00003.safetensors"
    damage(sharded / name)
    refused(sharded, says=(name, *says))


def change_index(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((model / INDEX).read_text())
    change(index["weight_map"])
    (model / INDEX).write_text(json.dumps(index))


def place(name: str, file: Any) -> Damage:
    return lambda model: change_index(model, lambda weight_map: weight_map.update({name: file}))


def no_index(model: Path) -> None:
    (model / INDEX).unlink()


def no_index_no_shard(model: Path) -> None:
    no_index(model)
    (model / "model-00002-of-00003.safetensors").unlink()


def no_index_odd_shard(model: Path) -> None:
    no_index(model)
    (model / "model-00003-of-00003.safetensors").rename(model / "adapter.safetensors")


def no_weights(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()


def shard_lost(model: Path) -> None:
    (model / "model-00002-of-00003.safetensors").unlink()


def shard_dangling(model: Path) -> None:
    shard_lost(model)
    (model / "model-00002-of-00003.safetensors").symlink_to("blobs/none")


def listed_not_held(model: Path) -> None:
    first = "model-00001-of-00003.safetensors"
    place("model.norm.weight", first)(model)


def held_elsewhere(model: Path) -> None:
    change_index(
        model,
        lambda weight_map: weight_map.update(
            {PLAIN: next(file for file in weight_map.values() if file != weight_map[PLAIN])}
        ),
    )


def in_two_shards(model: Path) -> None:
    no_index(model)
    path = model / "model-00001-of-00003.safetensors"
    save_file(load_file(path) | {PLAIN: torch.zeros(2)}, path)
    path = model / "model-00002-of-00003.safetensors"
    save_file(load_file(path) | {PLAIN: torch.zeros(2)}, path)


def index_text(text: str) -> Damage:
    return lambda model: (model / INDEX).write_text(text)


SET_DAMAGE: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "a shard is missing": (shard_lost, (INDEX, "model-00002-of-00003.safetensors")),
    "a shard is a dangling link": (shard_dangling, ("model-00002-of-00003.safetensors",)),
    "a shard is missing, no index": (
        no_index_no_shard,
        ("model-00002-of-00003.safetensors is missing",),
    ),
    "files of two kinds, no index": (no_index_odd_shard, ("adapter.safetensors", INDEX)),
    "no weights": (no_weights, ("no safetensors files",)),
    "index names a missing file": (
        place(PLAIN, "model-00009-of-00003.safetensors"),
        (INDEX, "model-00009-of-00003.safetensors"),
    ),
    "index leaves the directory": (place(PLAIN, "../x.safetensors"), (INDEX, PLAIN, "outside")),
    "index leaves it in the middle": (
        place(PLAIN, "a/../../x.safetensors"),
        (INDEX, PLAIN, "outside"),
    ),
    "index has an absolute path": (place(PLAIN, "/tmp/x.safetensors"), (INDEX, PLAIN, "outside")),
    "index names another kind of file": (place(PLAIN, "config.json"), (INDEX, PLAIN)),
    "index names a number": (place(PLAIN, 3), (INDEX, PLAIN)),
    "index lists what no shard holds": (listed_not_held, (INDEX, "model.norm.weight")),
    "index places a tensor in another shard": (held_elsewhere, (PLAIN, "places in")),
    "a tensor is in two shards": (in_two_shards, (PLAIN, "is also in")),
    "half an index": (index_text('{"weight_map": {"a": "mod'), (INDEX, "not valid JSON")),
    "index without a map": (index_text("{}"), (INDEX, "weight_map")),
    "index is a list": (index_text("[]"), (INDEX, "not a JSON object")),
}


@pytest.mark.parametrize("case", SET_DAMAGE)
def test_damaged_set_of_files(sharded: Path, case: str) -> None:
    (sharded.parent / "x.safetensors").write_bytes(
        (sharded / ONE.replace(".", "-00001-of-00003.")).read_bytes()
    )
    damage, says = SET_DAMAGE[case]
    damage(sharded)
    refused(sharded, says=says)


def test_the_index_is_the_authority(tmp_path: Path) -> None:
    """What a shard holds and the index does not list is left out, as loaders do, and told."""
    model = write_checkpoint(tmp_path / "model", small(), config_of(GROUP), shards=2)
    change_index(model, lambda weight_map: weight_map.pop(PLAIN))
    convert(model, tmp_path / "out")
    made = ctconvert.plan(model, target="triton")
    assert f"1 tensors that the index does not list are left out ({PLAIN})" in made.notes
    assert PLAIN not in made.entries
    ctconvert.verify(tmp_path / "out", against=model)
