"""Where output tensors lie: shards filled in order, every tensor aligned."""

from __future__ import annotations

import json

import pytest
from support.builders import config_of, group_config, layer, weight_args
from support.memory import planned

from ctconvert.errors import BadInputError
from ctconvert.planning.place import index_of, place
from ctconvert.specs import DTYPE_BITS, TensorSpec
from ctconvert.store.safetensors import TensorEntry

BYTES = TensorSpec("U8", (100,))


def names(groups: list[dict[str, TensorSpec]], limit: int) -> list[tuple[str, ...]]:
    return [shard.tensors for shard in place(groups, limit, {}, {})[0]]


def test_one_shard_has_the_plain_name() -> None:
    shards, placed = place([{"a": BYTES}, {"b": BYTES}], 200, {}, {})
    assert [shard.name for shard in shards] == ["model.safetensors"]
    assert placed["b"].offset - placed["a"].offset == 100
    assert shards[0].size == placed["b"].end


def test_shards_are_filled_in_order() -> None:
    groups = [{"a": BYTES}, {"b": BYTES}, {"c": BYTES}]
    assert names(groups, 299) == [("a", "b"), ("c",)]
    assert names(groups, 300) == [("a", "b", "c")]
    shards, placed = place(groups, 100, {}, {})
    assert [shard.name for shard in shards] == [
        f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)
    ]
    assert placed["c"].file == shards[2].name


def test_a_module_is_never_split() -> None:
    groups = [{"a": BYTES}, {"m.x": BYTES, "m.y": BYTES}, {"b": BYTES}]
    assert names(groups, 150) == [("a",), ("m.x", "m.y"), ("b",)]


def test_every_tensor_is_aligned() -> None:
    group = {
        "u8": TensorSpec("U8", (3,)),
        "f32": TensorSpec("F32", (3,)),
        "i64": TensorSpec("I64", (1,)),
        "bf16": TensorSpec("BF16", (1,)),
    }
    (shard,), placed = place([group], 1000, {}, {})
    assert shard.tensors == ("i64", "f32", "bf16", "u8")
    for entry in placed.values():
        assert entry.offset % (DTYPE_BITS[entry.spec.dtype] // 8) == 0


def test_a_name_twice_is_an_error() -> None:
    with pytest.raises(BadInputError, match="named a; the source already holds"):
        place([{"a": BYTES}, {"a": BYTES}], 1000, {}, {})


def test_headers_and_index_agree_with_the_places() -> None:
    group = group_config(weight_args(4, 32))
    plan = planned(layer(group), config_of(group), "cuda", fuse=True, max_shard_size=60_000)
    assert len(plan.shards) > 2
    for shard in plan.shards:
        header = plan.header(shard)
        found = json.loads(header[8:])
        assert found.pop("__metadata__") == {"format": "pt"}
        assert tuple(found) == shard.tensors
        for name, entry in found.items():
            assert plan.entries[name].file == shard.name
            assert plan.entries[name].offset == len(header) + entry["data_offsets"][0]
            assert plan.entries[name].end == len(header) + entry["data_offsets"][1]
        assert shard.size == max(plan.entries[name].end for name in shard.tensors)
    index = index_of(plan.shards, plan.entries)
    assert index["weight_map"] == {name: entry.file for name, entry in plan.entries.items()}
    assert index["metadata"]["total_size"] == sum(e.nbytes for e in plan.entries.values())


def test_metadata_is_kept_and_aliases_go_where_their_tensor_lies() -> None:
    metadata = {
        "a.safetensors": {"format": "pt", "producer": "x", "lm_head.weight": "a"},
        "b.safetensors": {"format": "pt", "other": "b", "gone": "c", "producer": "y"},
    }
    source = {
        name: TensorEntry(name, f"{file}.safetensors", 0, BYTES)
        for name, file in (("a", "a"), ("b", "b"), ("c", "b"))
    }
    shards, _ = place([{"a": BYTES}, {"b": BYTES}], 100, metadata, source)
    assert [shard.metadata for shard in shards] == [
        {"producer": "x", "lm_head.weight": "a"},
        {"producer": "y", "other": "b"},
    ]
    (whole,), _ = place([{"a": BYTES}, {"b": BYTES}], 1000, metadata, source)
    assert whole.metadata == {"producer": "x", "lm_head.weight": "a", "other": "b"}
    (made,), _ = place([{"a.qweight": BYTES}], 100, metadata, source)
    assert made.metadata == {"producer": "x"}
