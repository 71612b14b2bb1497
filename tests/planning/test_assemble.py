"""Which modules are joined, which stay apart, and what is said about those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.builders import (
    LAYER,
    config_of,
    experts,
    group_config,
    layer,
    module,
    quantised,
    weight_args,
)
from support.memory import planned

from ctconvert.assembly import Concat, Pad, Part, Stack
from ctconvert.records import Plan

W4 = group_config(weight_args(4, 32))
#: The rows of a part, so that they all differ.
ROWS = {"q_proj": 192, "k_proj": 64, "v_proj": 128, "gate_proj": 96, "up_proj": 160}


def parts(parent: str, *leaves: str, group: dict[str, Any] = W4) -> dict[str, torch.Tensor]:
    found = {}
    for seed, leaf in enumerate(leaves):
        found |= module(f"{parent}.{leaf}", quantised(ROWS.get(leaf, 64), 96, group, seed))
    return found


def fused(tensors: dict[str, torch.Tensor], target: str = "triton", **config: Any) -> Plan:
    plan = planned(tensors, config_of(W4, **config), target, fuse=True)
    assert not plan.refusals
    return plan


def names(plan: Plan) -> set[str]:
    return {item.name for item in plan.modules}


def test_self_attention_and_mlp_are_joined_in_order() -> None:
    tensors = parts("m.self_attn", "v_proj", "k_proj", "q_proj", "o_proj")
    plan = fused(tensors | parts("m.mlp", "up_proj", "gate_proj", "down_proj"))
    assert names(plan) == {
        "m.self_attn.qkv_proj",
        "m.self_attn.o_proj",
        "m.mlp.gate_up_proj",
        "m.mlp.down_proj",
    }
    found = {item.name: item for item in plan.modules}
    joined = found["m.self_attn.qkv_proj"]
    assert [source.name for source in joined.sources] == [
        f"m.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")
    ]
    assert joined.recipe.assembly == Concat((Part(0), Part(1), Part(2)))
    assert joined.widths == (192, 64, 128)
    assert (joined.logical.n, joined.logical.k) == (384, 96)
    assert found["m.mlp.gate_up_proj"].widths == (96, 160)
    assert found["m.mlp.down_proj"].recipe.assembly == Part(0)
    assert not plan.notes


def test_nothing_is_joined_unless_asked() -> None:
    plan = planned(parts("m.self_attn", "q_proj", "k_proj", "v_proj"), config_of(W4), "triton")
    assert len(plan.modules) == 3 and not plan.notes


@pytest.mark.parametrize("target", ["triton", "cuda", "xpu"])
def test_widths_do_not_depend_on_padding(target: str) -> None:
    tensors = layer(W4)
    tensors.pop("model.layers.0.self_attn.q_proj.bias")
    plan = fused(tensors, target)
    (item,) = (item for item in plan.modules if item.name.endswith("qkv_proj"))
    assert item.widths == tuple(n for _, n, _ in LAYER[:3])
    assert item.logical.n == sum(item.widths)
    assert (item.recipe.weight.n > item.logical.n) == isinstance(item.recipe.assembly, Pad)


@pytest.mark.parametrize(
    "parent",
    [
        "language_model.model.layers.3.cross_attn",  # Mllama
        "model.decoder.layers.0.encoder_attn",  # BART, Whisper
        "decoder.block.0.layer.1.EncDecAttention",  # T5
        "model.layers.0.crossattention",  # BLIP
        "model.connector.perceiver_resampler.layers.0.self_attn",  # Idefics2
    ],
)
def test_cross_attention_stays_apart(parent: str) -> None:
    """Its queries read another input than its keys and values."""
    tensors = parts(parent, "q_proj", "k_proj", "v_proj")
    beside = "model.decoder.layers.0.self_attn"
    plan = fused(tensors | parts(beside, "q_proj", "k_proj", "v_proj"))
    assert names(plan) == {
        *(f"{parent}.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")),
        f"{beside}.qkv_proj",
    }
    (note,) = plan.notes
    assert note.startswith(f"{parent}.qkv_proj is not fused: ") and "cross-attention" in note


@pytest.mark.parametrize(
    "parent",
    ["model.layers.0.self_attn", "model.encoder.layers.0.self_attn", "encoder.layers.1.attn"],
)
def test_self_attention_is_no_cross_attention(parent: str) -> None:
    """An encoder's own attention neither."""
    plan = fused(parts(parent, "q_proj", "k_proj", "v_proj"))
    assert names(plan) == {f"{parent}.qkv_proj"} and not plan.notes


@pytest.mark.parametrize(
    ("parent", "leaves"),
    [
        ("m.self_attn", ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),  # MLA
        ("m.self_attn", ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
        ("m.mlp", ("up_proj", "down_proj")),  # an MLP without a gate
        ("m.self_attn", ("k_proj", "v_proj")),
    ],
)
def test_parts_that_do_not_exist_need_no_note(parent: str, leaves: tuple[str, ...]) -> None:
    plan = fused(parts(parent, *leaves))
    assert names(plan) == {f"{parent}.{leaf}" for leaf in leaves} and not plan.notes


def test_a_part_that_is_not_quantised_is_told() -> None:
    tensors = parts("m.self_attn", "q_proj", "v_proj")
    tensors["m.self_attn.k_proj.weight"] = torch.randn(64, 96)
    plan = fused(tensors, ignore=["m.self_attn.k_proj"])
    assert names(plan) == {"m.self_attn.q_proj", "m.self_attn.v_proj"}
    assert [copy.name for copy in plan.copies] == ["m.self_attn.k_proj.weight"]
    assert plan.notes == ("m.self_attn.qkv_proj is not fused: m.self_attn.k_proj is not quantised",)


def test_parts_of_different_schemes_stay_apart() -> None:
    other = group_config(weight_args(8, 32), ["re:.*v_proj"])
    tensors = parts("m.self_attn", "q_proj", "k_proj")
    tensors |= parts("m.self_attn", "v_proj", group=other)
    plan = planned(tensors, config_of(other, W4), "triton", fuse=True)
    assert len(plan.modules) == 3
    assert plan.notes == ("m.self_attn.qkv_proj is not fused: its parts differ in bits (4, 4, 8)",)


def test_parts_with_different_static_scales_stay_apart() -> None:
    from support.builders import STATIC_INT8

    group = group_config(weight_args(4, 32), inputs=STATIC_INT8)
    tensors = parts("m.mlp", "gate_proj", "up_proj", group=group)
    plan = planned(tensors, config_of(group), "triton", fuse=True)
    assert plan.notes == (
        "m.mlp.gate_up_proj is not fused: its parts have different input_scale values",
    )
    tensors["m.mlp.up_proj.input_scale"] = tensors["m.mlp.gate_proj.input_scale"].clone()
    plan = planned(tensors, config_of(group), "triton", fuse=True)
    assert names(plan) == {"m.mlp.gate_up_proj"} and not plan.notes


def test_a_bias_of_one_part_alone_keeps_them_apart() -> None:
    tensors = parts("m.mlp", "gate_proj", "up_proj")
    tensors["m.mlp.up_proj.bias"] = torch.randn(160)
    plan = fused(tensors)
    assert len(plan.modules) == 2 and "differ in the tensors beside" in plan.notes[0]


@pytest.mark.parametrize(("target", "padded"), [("triton", False), ("cuda", True)])
def test_stacked_experts_are_joined_one_by_one(target: str, padded: bool) -> None:
    tensors = {}
    for leaf in ("gate_proj", "up_proj"):
        tensors |= experts(f"m.mlp.experts.{leaf}", 40, 96, W4)
    (item,) = fused(tensors, target).modules
    assert item.experts == 3 and item.widths == (40, 40)
    each = [Concat((Part(0, expert), Part(1, expert))) for expert in range(3)]
    weight = item.recipe.weight
    units = tuple(Pad(unit, weight.n, weight.k) if padded else unit for unit in each)
    assert item.recipe.assembly == Stack(units)
    assert all(entry.spec.shape[0] == 3 for entry in item.outputs)


def test_stacked_experts_with_biases_stay_apart() -> None:
    tensors = {}
    for leaf in ("gate_proj", "up_proj"):
        tensors |= experts(f"m.mlp.experts.{leaf}", 64, 96, W4)
        tensors[f"m.mlp.experts.{leaf}.bias"] = torch.randn(3, 64)
    plan = fused(tensors)
    assert len(plan.modules) == 2
    assert any("not fused" in note and "bias" in note for note in plan.notes)


def test_nvfp4_parts_are_joined_under_one_global_scale_alone() -> None:
    from support.block_floats import nvfp4, nvfp4_group

    made = {leaf: nvfp4(64, 96, seed) for seed, leaf in enumerate(("q_proj", "k_proj", "v_proj"))}
    for one in made.values():
        for local in ("weight_global_scale", "input_global_scale"):
            one[local] = made["q_proj"][local].clone()
    overrides = (("*", "marlin-nvfp4"),)

    def plan() -> Plan:
        tensors = {}
        for leaf, one in made.items():
            tensors |= module(f"m.self_attn.{leaf}", one)
        config = config_of(nvfp4_group())
        options = {"overrides": overrides, "dtype": "bfloat16"}
        return planned(tensors, config, "cuda", fuse=True, **options)

    assert names(plan()) == {"m.self_attn.qkv_proj"}
    made["v_proj"]["weight_global_scale"] *= 2
    apart = plan()
    assert len(apart.modules) == 3
    assert apart.notes == (
        "m.self_attn.qkv_proj is not fused: its parts have different weight_global_scale values",
    )
