"""A config.json that is damaged, of another method, or contradicts the tensors."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.builders import STATIC_INT8, config_of, write_checkpoint
from support.damage import DOWN, GROUP, Damage, change_config, convert, fails, refused, small
from support.memory import store_of
from support.stores import MemoryStore

import ctconvert
from ctconvert.errors import CtconvertError
from ctconvert.planning.describe import describe
from ctconvert.planning.inspection import inspection
from ctconvert.planning.make import make_plan
from ctconvert.records import Options, to_json
from ctconvert.store.checkpoint import Checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sound checkpoint of one file; tests damage its config."""
    return write_checkpoint(tmp_path / "model", small(), config_of(GROUP))


def quantization(**fields: Any) -> Damage:
    return lambda model: change_config(
        model, lambda config: config["quantization_config"].update(fields)
    )


def in_group(**fields: Any) -> Damage:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"].update(fields)

    return lambda model: change_config(model, change)


def in_weights(**fields: Any) -> Damage:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(fields)

    return lambda model: change_config(model, change)


def half_config(model: Path) -> None:
    os.truncate(model / "config.json", (model / "config.json").stat().st_size // 2)


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def config_text(text: str) -> Damage:
    return lambda model: (model / "config.json").write_text(text)


def method(name: str) -> Damage:
    return lambda model: change_config(
        model, lambda config: config.update(quantization_config={"quant_method": name, "bits": 4})
    )


BAD = "re:model[.(layers"
ROTATED = {"config_groups": {"R1": {"type": "hadamard", "apply": [5]}}}

CONFIG_DAMAGE: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "half of it": (half_config, ("not valid JSON",)),
    "none": (no_config, ("no config.json",)),
    "empty": (config_text(""), ("not valid JSON",)),
    "a list": (config_text("[1, 2]"), ("not a JSON object",)),
    "not text": (
        lambda model: (model / "config.json").write_bytes(b"\xff\xfe{}"),
        ("not valid JSON",),
    ),
    "no quantization_config": (
        lambda model: change_config(model, lambda config: config.pop("quantization_config")),
        ("no quantization_config", "llm-compressor"),
    ),
    "quantization_config is a list": (
        lambda model: change_config(model, lambda config: config.update(quantization_config=[1])),
        ("quantization_config is not an object",),
    ),
    "no quant_method": (
        lambda model: change_config(
            model, lambda config: config.update(quantization_config={"bits": 4})
        ),
        ("quant_method",),
    ),
    "gptq": (method("gptq"), ("'gptq'", "vLLM", "GPTQModel")),
    "awq": (method("awq"), ("'awq'", "AutoAWQ converter")),
    "bitsandbytes": (method("bitsandbytes"), ("'bitsandbytes'", "transformers")),
    "fp8": (method("fp8"), ("'fp8'", "convert_checkpoint")),
    "modelopt": (method("modelopt"), ("'modelopt'", "ModelOpt")),
    "torchao": (method("torchao"), ("'torchao'", "load it with torchao")),
    "already converted": (method("ctconvert"), ("'ctconvert'", "ctconvert verify")),
    "a method nobody knows": (method("zipquant"), ("'zipquant'", "the tool that made it")),
    "no groups": (quantization(config_groups={}), ("config_groups",)),
    "groups are a list": (quantization(config_groups=[1]), ("config_groups",)),
    "a group is a number": (quantization(config_groups={"group_0": 5}), ("group_0",)),
    "unknown preset": (quantization(config_groups={"W9A9": ["Linear"]}), ("W9A9",)),
    "unknown format": (quantization(format="zip-quantized"), ("'zip-quantized'", "pack-quantized")),
    "unknown format of a group": (
        in_group(format="zip-quantized"),
        ("group_0.format", "'zip-quantized'", "pack-quantized"),
    ),
    "format is a list": (quantization(format=["pack-quantized"]), ("format",)),
    "format of a group is an object": (in_group(format={"a": 1}), ("group_0.format",)),
    "no format": (
        lambda model: (quantization(format=None)(model), in_group(format=None)(model)),
        ("format",),
    ),
    "unknown sparsity format": (
        quantization(sparsity_config={"format": "zip-sparse", "targets": ["Linear"]}),
        ("sparsity_config.format", "'zip-sparse'"),
    ),
    "unknown field in a group": (in_group(flavour=3), ("group_0.flavour",)),
    "unknown field in a scheme": (in_weights(flavour=3), ("group_0.weights.flavour",)),
    "bits are a word": (in_weights(num_bits="four"), ("group_0.weights.num_bits",)),
    "group size is a word": (in_weights(group_size="big"), ("group_0",)),
    "group size zero": (in_weights(group_size=0), ("group_0",)),
    "bad regular expression in targets": (in_group(targets=[BAD]), ("group_0.targets", BAD)),
    "bad regular expression in ignore": (quantization(ignore=[BAD]), ("ignore", BAD)),
    "targets are a number": (in_group(targets=7), ("group_0.targets",)),
    "ignore is a word": (quantization(ignore="lm_head"), ("ignore", "list of names")),
    "transforms are a word": (quantization(transform_config="hadamard"), ("transform_config",)),
    "a transform is a number": (quantization(transform_config=ROTATED), ("transform_config",)),
    "bits the format does not store": (in_weights(num_bits=16), (f"module {DOWN}", "int16")),
    "group size that does not divide K": (
        in_weights(group_size=40),
        (f"module {DOWN}", "40", "96", "does not divide"),
    ),
    "group size the scales contradict": (
        in_weights(group_size=16),
        (f"module {DOWN}", "weight_scale"),
    ),
    "act-order without weight_g_idx": (
        in_weights(actorder="group"),
        (f"module {DOWN}", "weight_g_idx"),
    ),
    "packed, but in ignore": (quantization(ignore=[DOWN]), (f"module {DOWN}", "contradict")),
    "packed, but ignored by a pattern": (
        quantization(ignore=[r"re:.*down_proj$"]),
        (f"module {DOWN}", "contradict"),
    ),
    "packed, but no target means it, and no group fits": (
        in_group(targets=["re:.*q_proj", "re:.*up_proj"], format="int-quantized"),
        (f"module {DOWN}", "contradict"),
    ),
    "packed, but the config says int-quantized": (
        in_group(format="int-quantized"),
        (f"module {DOWN}", "weight_packed"),
    ),
    "activation scales the config asks for": (
        in_group(input_activations=STATIC_INT8),
        (f"module {DOWN}", "input_scale is missing"),
    ),
}


@pytest.mark.parametrize("case", CONFIG_DAMAGE)
def test_damaged_config(model: Path, case: str) -> None:
    damage, says = CONFIG_DAMAGE[case]
    damage(model)
    if says[0].startswith("module"):
        name = says[0].removeprefix("module ")
        if case == "activation scales the config asks for":  # it is incomplete
            refused(model, says=says, keep_unsupported=True)
            fails(ctconvert.inspect, model, says=says)
            return
        refused(model, says=(*says, "keep_unsupported=True"))
        (found,) = (item for item in ctconvert.inspect(model).modules if item.name == name)
        assert all(text in (found.unsupported or "") for text in says[1:])
        return
    refused(model, says=(str(model), *says))
    fails(ctconvert.inspect, model, says=says)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside a JSON value."""
    if at:
        yield at
    inside = enumerate(value) if isinstance(value, list) else ()
    for key, inner in value.items() if isinstance(value, dict) else inside:
        yield from places(inner, (*at, key))


def test_no_value_in_the_config_ends_in_a_traceback() -> None:
    """Every place of a config in turn holds what does not belong there: one line, or success."""
    transform = {"type": "hadamard", "apply": [{"targets": ["Foo"]}]}
    config = config_of(
        GROUP,
        sparsity_config={"format": "dense", "targets": [], "ignore": []},
        transform_config={"config_groups": {"R": transform}},
        kv_cache_scheme=None,
    )
    sound = store_of(small(), config, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    base = json.loads(sound.files["config.json"])
    values = [None, 5, -1, 1e30, "x", "\ud800", "re:(", [], [5], [["x"]], {}, {"format": 5}, True]
    tried = converted = 0
    for at in places(base):
        for wrong in values:
            config = copy.deepcopy(base)
            inner = config
            for key in at[:-1]:
                inner = inner[key]
            inner[at[-1]] = wrong
            store = MemoryStore(sound.files | {"config.json": json.dumps(config).encode()})
            tried += 1
            try:
                description = describe(Checkpoint(store))
                plan = make_plan(description, Options(target="triton", keep_unsupported=True))
                to_json(inspection(description, plan))
                converted += 1
            except CtconvertError as error:
                assert error.exit_code == 2 and "\n" not in str(error)
    assert tried > 300 and 50 < converted < tried - 50


def test_a_config_with_lone_surrogates_converts(model: Path, tmp_path: Path) -> None:
    """JSON can spell what UTF-8 cannot; it is carried over all the same."""
    change_config(model, lambda config: config.update(note="\ud800", eos="</s>\u2581é"))
    convert(model, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["note"] == "\ud800" and made["eos"] == "</s>\u2581é"
    ctconvert.verify(tmp_path / "out", against=model)


@pytest.mark.parametrize(
    ("architectures", "shown"),
    [
        (5, ["5"]),
        ("Llama", ["Llama"]),
        ([5, None], ["5", "None"]),
        (["\ud800"], ["\\ud800"]),
        (None, []),
    ],
)
def test_inspect_with_odd_architectures(model: Path, architectures: Any, shown: list[str]) -> None:
    change_config(model, lambda config: config.update(architectures=architectures))
    found = ctconvert.inspect(model)
    assert found.architectures == shown
    assert json.loads(to_json(found))["architectures"] == shown
