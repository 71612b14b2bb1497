"""What a checkpoint's headers and config say about each module; contradictions are errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support.builders import (
    DYNAMIC_INT8,
    STATIC_INT8,
    config_of,
    experts,
    group_config,
    layer,
    module,
    quantised,
    weight_args,
)
from support.memory import CPU, described, planned, store_of
from support.paths import EXAMPLE
from support.schemes import fp8
from support.stores import MemoryStore, WatchedStore

import ctconvert
from ctconvert import codec
from ctconvert.errors import BadInputError, UsageError
from ctconvert.layouts import TARGETS
from ctconvert.planning.describe import describe
from ctconvert.planning.inspection import InspectedModule, Inspection, StoredTensor
from ctconvert.planning.make import make_plan, refuse
from ctconvert.records import Options
from ctconvert.store.checkpoint import Checkpoint

W4 = group_config(weight_args(4, 32))
Tensors = dict[str, torch.Tensor]


def why(tensors: Tensors, config: dict[str, Any], name: str) -> str:
    """Why nothing can take a module; empty where it can be read."""
    return described(tensors, config).modules[name].reason


def test_inspection_is_a_record() -> None:
    found = ctconvert.inspect(EXAMPLE, target="triton")
    assert isinstance(found, Inspection) and found.target == "triton"
    assert len(found.modules) == 14 and found.unquantised_tensors == 6
    first = found.modules[0]
    assert isinstance(first, InspectedModule)
    assert (first.format, first.scheme, first.layout) == ("pack-quantized", "wna16", "triton-wna16")
    assert (first.name, first.shape) == ("model.layers.0.mlp.down_proj", (576, 1536))
    assert first.tensors["weight_packed"] == StoredTensor("I32", (576, 192), "model.safetensors")
    assert first.refused is None and first.experts is None
    assert ctconvert.inspect(EXAMPLE).modules[0].layout is None


def test_inspection_says_what_a_target_refuses() -> None:
    three = group_config(weight_args(3, 32))
    tensors = module("m.up_proj", quantised(64, 96, three, 1))
    description = described(tensors, config_of(three))
    plan = make_plan(description, Options(target="triton", keep_unsupported=True))
    from ctconvert.planning.inspection import inspection

    (found,) = inspection(description, plan).modules
    assert found.layout is None and "3-bit" in (found.refused or "")


def test_planning_reads_headers_and_a_few_elements() -> None:
    tensors = layer(W4)
    files = store_of(tensors, config_of(W4))
    store = WatchedStore(files)
    make_plan(describe(Checkpoint(store)), Options(target="cuda"))
    header = 8 + int.from_bytes(files.files["model.safetensors"][:8], "little")
    shapes = sum(16 for name in tensors if name.endswith("weight_shape"))
    read = sum(length for name, _, length in store.reads if name == "model.safetensors")
    assert read == header + shapes  # the shapes are neighbours here


def test_the_plan_does_not_depend_on_weight_data() -> None:
    store = store_of(layer(W4), config_of(W4))
    checkpoint = Checkpoint(store)
    plan = make_plan(describe(checkpoint), Options(target="cuda"))
    data = bytearray(store.files["model.safetensors"])
    for entry in checkpoint.tensors.values():
        if not entry.name.endswith("weight_shape"):
            data[entry.offset : entry.end] = b"\xff" * entry.nbytes
    other = MemoryStore(store.files | {"model.safetensors": bytes(data)})
    again = make_plan(describe(Checkpoint(other)), Options(target="cuda"))
    assert again == plan and again.digest() == plan.digest()
    assert [again.header(shard) for shard in again.shards] == [
        plan.header(shard) for shard in plan.shards
    ]


def test_dense_weights_of_other_classes_are_copied() -> None:
    other = {
        "model.layers.0.mixer.conv1d.weight": torch.randn(64, 1, 4),
        "model.layers.0.mlp.gate.weight": torch.randn(8, 256),
        "model.layers.0.attn.relative_attention_bias.weight": torch.randn(32, 8),
        "model.pos_embed.weight": torch.randn(16, 256),
    }
    plan = planned(layer(W4) | other, config_of(W4), "triton")
    assert other.keys() <= {copy.name for copy in plan.copies}


UNREAD = {
    "marlin-24": (weight_args(4, 128), "marlin-24"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_formats_without_a_layout_are_recognised_and_refused(name: str) -> None:
    weights, word = UNREAD[name]
    group = group_config(weights, format=name)
    tensors = {
        "a.down_proj.weight_packed": torch.zeros(64, 16, dtype=torch.uint8),
        "a.down_proj.weight_scale": torch.ones(64, 2),
    }
    assert word in why(tensors, config_of(group), "a.down_proj")
    for target in TARGETS:
        plan = planned(tensors, config_of(group), target)
        assert [refusal.module for refusal in plan.refusals] == ["a.down_proj"]
        assert word in plan.refusals[0].reason
        kept = planned(tensors, config_of(group), target, keep_unsupported=True)
        assert not kept.refusals and not kept.modules
        assert {copy.name for copy in kept.copies} == tensors.keys()
        assert word in kept.kept[0].reason
        ours = json.loads(kept.config)["quantization_config"]
        assert ours["unconverted"] == ["a.down_proj"]


def rotation(*targets: str) -> dict[str, Any]:
    apply = [{"targets": list(targets), "location": "input", "ignore": []}]
    return {"config_groups": {"u": {"type": "hadamard", "apply": apply}}}


def test_a_rotated_module_is_refused() -> None:
    tensors = {}
    for leaf in ("o_proj", "q_proj"):
        tensors |= module(f"a.{leaf}", quantised(64, 96, W4, 1))
    config = config_of(W4, transform_config=rotation("re:.*o_proj"))
    assert "transform_config" in why(tensors, config, "a.o_proj")
    assert why(tensors, config, "a.q_proj") == ""


@pytest.mark.parametrize("target", ["re:.*self_attn$", "LlamaAttention", "re:.*lm_head"])
def test_rotations_beyond_quantised_modules_refuse_everything(target: str) -> None:
    name = "m.layers.0.self_attn.q_proj"
    tensors = module(name, quantised(64, 96, W4, 1)) | {"lm_head.weight": torch.randn(32, 64)}
    config = config_of(W4, transform_config=rotation(target))
    assert "transform_config" in why(tensors, config, name)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "lm_head"])
def test_a_linear_is_never_made_a_table(name: str) -> None:
    group = group_config(weight_args(4, 32), ["Embedding", "re:.*q_proj"])
    found = described(module(name, quantised(64, 96, group, 1)), config_of(group, ignore=[]))
    source = found.modules[name].source
    assert source is not None and not source.weight.embedding


def test_packed_codes_of_another_convention_are_an_error() -> None:
    tensors = module("m.down_proj", quantised(64, 96, W4, 1))
    tensors["m.experts.gate_up_proj_blocks"] = torch.zeros(3, 64, 12, dtype=torch.uint8)
    plan = planned(tensors, config_of(W4), "triton")
    with pytest.raises(BadInputError, match=r"gate_up_proj_blocks, U8 .*looks like packed"):
        refuse(plan)
    plan = planned(tensors, config_of(W4), "triton", keep_unsupported=True)
    assert "m.experts.gate_up_proj_blocks" in [copy.name for copy in plan.copies]
    assert len(plan.modules) == 1


def test_empty_weights_are_bad_input() -> None:
    group = group_config(weight_args(4, None), format="int-quantized", inputs=DYNAMIC_INT8)
    made = {"weight": torch.zeros(64, 0, dtype=torch.int8), "weight_scale": torch.ones(64, 1)}
    assert "no elements" in why(module("a.down_proj", made), config_of(group), "a.down_proj")


def test_metadata_of_many_elements_is_refused() -> None:
    group = group_config(weight_args(4, 32), inputs=STATIC_INT8)
    tensors = module("m.down_proj", quantised(64, 96, group, 1))
    tensors["m.down_proj.input_scale"] = torch.ones(40)
    assert "input_scale is F32 [40]" in why(tensors, config_of(group), "m.down_proj")


@pytest.mark.parametrize("wrong", [False, True])
def test_every_expert_may_have_a_shape(wrong: bool) -> None:
    tensors = experts("m.experts.down_proj", 64, 96, W4, count=8)
    tensors["m.experts.down_proj.weight_shape"] = torch.tensor([[64, 96]] * 8)
    tensors["m.experts.down_proj.weight_shape"][3, 1] += 32 * wrong
    reason = why(tensors, config_of(W4), "m.experts.down_proj")
    assert ("differ in shape" in reason) is wrong
    assert wrong or not reason


def test_experts_are_described_one_by_one() -> None:
    tensors = experts("m.experts.down_proj", 64, 96, W4)
    source = described(tensors, config_of(W4)).modules["m.experts.down_proj"].source
    assert source is not None and source.experts == 3
    assert (source.weight.n, source.weight.k) == (64, 96)
    second = source.entries(1)["weight_packed"]
    assert second.spec.shape == (64, 12)
    assert second.offset - source.tensors["weight_packed"].offset == second.nbytes


@pytest.mark.parametrize(("value", "message"), [(0.75, "whole number"), (1.0, "no zero point")])
def test_fp8_zero_points_that_are_none(value: float, message: str) -> None:
    group = group_config(
        weight_args(8, None, kind="float"), format="float-quantized", inputs=fp8(False)
    )
    made = quantised(64, 96, group, 1) | {"input_zero_point": torch.tensor([value])}
    assert message in why(module("a.down_proj", made), config_of(group), "a.down_proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
def test_activation_scales_that_are_none(value: float) -> None:
    group = group_config(weight_args(4, 32), inputs=STATIC_INT8)
    made = quantised(96, 64, group, 1) | {"input_scale": torch.tensor([value]).bfloat16()}
    assert "input_scale" in why(module("a.up_proj", made), config_of(group), "a.up_proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activation_zero_points_that_are_none(value: float) -> None:
    group = group_config(weight_args(4, 32), inputs=STATIC_INT8 | {"symmetric": False})
    made = quantised(96, 64, group, 1) | {"input_zero_point": torch.tensor([value])}
    assert "input_zero_point" in why(module("a.up_proj", made), config_of(group), "a.up_proj")


def test_a_scale_of_zero_was_never_calibrated() -> None:
    group = group_config(weight_args(4, 32), inputs=STATIC_INT8, outputs=STATIC_INT8)
    made = quantised(64, 96, group, 1) | {"output_scale": torch.zeros(1).bfloat16()}
    plan = planned(module("a.down_proj", made), config_of(group), "triton")
    names = {entry.name for entry in plan.modules[0].outputs}
    assert "a.down_proj.input_scale" in names and "a.down_proj.output_scale" not in names
    assert plan.notes == ("a.down_proj.output_scale is 0, never calibrated, and is dropped",)


def test_tied_embeddings_are_noted() -> None:
    tensors = module("a.down_proj", quantised(64, 96, W4, 1))
    assert not described(tensors, config_of(W4)).oddities
    found = described(tensors, config_of(W4), tie_word_embeddings=True).oddities
    assert found == ["tied embeddings: there is no lm_head tensor, and none is made"]


def test_a_config_inside_text_config() -> None:
    text = {"hidden_size": 96, "quantization_config": config_of(W4)}
    description = described(module("m.down_proj", quantised(64, 96, W4, 1)), None, text_config=text)
    config = json.loads(make_plan(description, Options(target="triton")).config)
    ours = config["text_config"]["quantization_config"]
    assert ours["quant_method"] == "ctconvert"
    assert ours["source"] == text["quantization_config"]
    assert config["text_config"]["hidden_size"] == 96 and "quantization_config" not in config


DAMAGED_DATA: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a code beyond 4 bits": (
        {"format": "int-quantized"},
        {"weight": ((70, 41), 9)},
        r"weight\[70, 41\] is 9, .*4-bit",
    ),
    "a code far beyond 4 bits": (
        {"format": "int-quantized"},
        {"weight": ((70, 41), -128)},
        r"weight\[70, 41\] is -128, .*4-bit",
    ),
    "a zero point beyond 4 bits": (
        {"format": "int-quantized"},
        {"weight_zero_point": ((70, 1), 8)},
        r"weight_zero_point\[70, 1\] is 8, .*4-bit",
    ),
    "a zero point below": (
        {"format": "int-quantized"},
        {"weight_zero_point": ((70, 1), -9)},
        r"weight_zero_point\[70, 1\] is -9, .*4-bit",
    ),
    "a NaN scale": ({}, {"weight_scale": ((70, 1), float("nan"))}, r"weight_scale\[70, 1\] is nan"),
    "an infinite scale": (
        {},
        {"weight_scale": ((3, 0), float("-inf"))},
        r"weight_scale\[3, 0\] is -inf",
    ),
}


@pytest.mark.parametrize("case", DAMAGED_DATA)
def test_damaged_data_is_found_when_it_is_read(case: str) -> None:
    fields, changes, message = DAMAGED_DATA[case]
    group = group_config(weight_args(4, 32, symmetric=False), **fields)
    made = quantised(96, 64, group, 1)
    for local, (at, value) in changes.items():
        made[local][at] = value
    tensors = module("m.up_proj", made)
    source = described(tensors, config_of(group)).modules["m.up_proj"].source
    assert source is not None
    with pytest.raises(BadInputError, match=rf"module m\.up_proj: .*{message}"):
        codec.source_weight(source, None, lambda entry: tensors[entry.name], CPU)


def test_a_name_that_two_output_tensors_would_have() -> None:
    tensors = module("m.gate_proj", quantised(64, 96, W4, 1))
    tensors |= module("m.up_proj", quantised(64, 96, W4, 2))
    tensors |= {"m.gate_up_proj.scales": torch.zeros(3)}
    with pytest.raises(BadInputError, match=r"m\.gate_up_proj\.scales; the source already holds"):
        planned(tensors, config_of(W4), "triton", fuse=True)
    assert len(planned(tensors, config_of(W4), "triton").modules) == 2


def test_no_target_is_no_plan() -> None:
    with pytest.raises(UsageError, match="'tpu'"):
        ctconvert.inspect(EXAMPLE, target="tpu")
