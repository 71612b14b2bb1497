"""A config.json is somebody else's file: whatever it holds, one line names the field."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import config_of, group_config, weight_args
from support.paths import CHECKPOINTS, ROOT

from ctconvert.errors import BadInputError
from ctconvert.formats.quantization import QuantizationSettings

NAMES = ("lm_head", "model.layers.0.self_attn.q_proj", "model.embed_tokens", "", "a\nb")


def deep(levels: int) -> Any:
    found: Any = []
    for level in range(levels):
        found = [found] if level % 2 else {"a": found}
    return found


HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -5, 10**9, 2**63, 10**4999, -(10**4999)),
    *(0.0, 1e30, float("nan"), float("inf"), 1.5, 32.0),
    *("", "x", "4", "\ud800", "a\nb\x00", "x" * 20_000, "re:(", "re:(a|aa)+$", "GROUP"),
    *(
        [],
        {},
        ["Linear"],
        [1],
        [None],
        {"a": 1},
        [[["x"]]],
        {"\ud800": 1},
        deep(1000),
        [deep(1000)],
    ),
)


def judge(config: dict[str, Any]) -> str | None:
    """The one line that refuses it, or None."""
    try:
        found = QuantizationSettings.parse(config, "config.json")
        for name in NAMES:
            found.schemes_of(name, "Linear")
            found.schemes_of_quantised(name)
            found.schemes_of_groups(name)
            found.rotation_of(name, "Linear")
        found.rotation_elsewhere(NAMES[:2], NAMES)
    except BadInputError as error:
        text = str(error)
        assert text.isprintable(), text
        assert len(text) < 1000
        return text
    return None


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*path, index))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    made = copy.copy(value)
    made[path[0]] = changed(value[path[0]], path[1:], new)
    return made


def read(path: Any) -> dict[str, Any]:
    return json.loads(path.read_text())["quantization_config"]


REAL = [
    *map(read, sorted((ROOT / "tests" / "formats" / "configs").glob("*.json"))),
    read(CHECKPOINTS / "old071-smol-sparse24-fp8-dynamic-channel" / "config.json"),
    read(CHECKPOINTS / "smol-w4a8o8-pack-static" / "config.json"),
    config_of(group_config(weight_args(8, kind="float", strategy="block", block_structure=[8, 8]))),
    {"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}, "ignore": []},
]
PLACES = [(config, place) for config in REAL for place in places(config)]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.data())
def test_only_bad_input_comes_out(data: st.DataObject) -> None:
    config, first = data.draw(st.sampled_from(PLACES))
    made = changed(config, first, data.draw(st.sampled_from(HOSTILE)))
    if isinstance(made, dict) and made:
        key = data.draw(st.sampled_from([*made, "config_groups", "new"]))
        if data.draw(st.booleans()):
            made = {**made, key: data.draw(st.sampled_from(HOSTILE))}
    judge({"quantization_config": made})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("config_groups", "group_0", "weights", "num_bits"), 10**9),
        (("config_groups", "group_0", "weights", "num_bits"), True),
        (("config_groups", "group_0", "weights", "num_bits"), None),
        (("config_groups", "group_0", "weights", "num_bits"), 10**4999),
        (("config_groups", "group_0", "weights", "group_size"), -5),
        (("config_groups", "group_0", "weights", "group_size"), 1e30),
        (("config_groups", "group_0", "weights", "group_size"), float("nan")),
        (("config_groups", "group_0", "weights", "group_size"), "x"),
        (("config_groups", "group_0", "weights", "group_size"), False),
        (("config_groups", "group_0", "weights", "group_size"), deep(1000)),
        (("config_groups", "group_0", "weights", "type"), "\ud800"),
        (("config_groups", "group_0", "weights", "symmetric"), []),
        (("config_groups", "group_0", "weights", "actorder"), 5),
        (("config_groups", "group_0", "weights", "zp_dtype"), "torch.load"),
        (("config_groups", "group_0", "weights", "observer_kwargs"), deep(1000)),
        (("config_groups", "group_0", "weights"), [1]),
        (("config_groups", "group_0", "targets"), "Linear"),
        (("config_groups", "group_0", "targets"), ["re:("]),
        (("config_groups", "group_0", "targets"), [5]),
        (("config_groups", "group_0", "format"), "zip"),
        (("config_groups", "group_0", "format"), {}),
        (("config_groups", "group_0"), 5),
        (("config_groups",), "x"),
        (("format",), 10**4999),
        (("format",), deep(1000)),
        (("version",), 5),
        (("ignore",), "lm_head"),
        (("ignore",), ["re:(a|aa)+$", "re:["]),
        (("ignore",), ["\ud800"]),
        (("sparsity_config",), [1]),
        (("transform_config",), "x"),
        (("transform_config", "config_groups"), [1]),
        (("transform_config", "config_groups", "R1"), 5),
        (("transform_config", "config_groups", "R1", "apply"), {"a": 1}),
    ],
    ids=lambda item: ".".join(item) if isinstance(item, tuple) else type(item).__name__,
)
def test_the_field_is_named(path: tuple[str, ...], value: Any) -> None:
    config = read(ROOT / "tests" / "formats" / "configs" / "spinquant-r1r2-offline.json")
    said = judge({"quantization_config": changed(config, path, value)})
    assert said is not None
    assert f"quantization_config.{'.'.join(path)}" in said


def test_a_name_that_is_no_text_is_printed() -> None:
    said = judge({"quantization_config": config_of() | {"config_groups": {"a\n\ud800": {}}}})
    assert said is not None
    assert said.isprintable()
