"""Which experts are stacked, how, and what is said about those that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.builders import (
    STATIC_INT8,
    config_of,
    expert_modules,
    group_config,
    module,
    quantised,
    weight_args,
)
from support.memory import planned

from ctconvert.assembly import Concat, Pad, Part, Stack
from ctconvert.records import Convert, Plan

W4 = group_config(weight_args(4, 32))
BLOCK = "model.layers.3.mlp"
STACKS = {f"{BLOCK}.experts.w13", f"{BLOCK}.experts.w2"}
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"

Tensors = dict[str, torch.Tensor]


def plan_of(tensors: Tensors, target: str = "cuda", **more: Any) -> Plan:
    config = more.pop("config", config_of(W4))
    plan = planned(tensors, config, target, fuse=True, **more)
    assert not plan.refusals
    return plan


def by_name(plan: Plan) -> dict[str, Convert]:
    return {item.name: item for item in plan.modules}


def name(number: int, leaf: str, local: str = "") -> str:
    return f"{BLOCK}.experts.{number}.{leaf}" + (f".{local}" if local else "")


def test_gate_comes_before_up_and_each_is_padded_by_itself() -> None:
    plan = plan_of(expert_modules(BLOCK, W4, (96, 256), 5))
    found = by_name(plan)
    assert found.keys() == STACKS and not plan.notes
    up, down = found[f"{BLOCK}.experts.w13"], found[f"{BLOCK}.experts.w2"]
    assert [source.name for source in up.sources[:4]] == [
        name(0, GATE),
        name(0, UP),
        name(1, GATE),
        name(1, UP),
    ]
    assert [source.name for source in down.sources] == [name(e, DOWN) for e in range(5)]
    assert up.recipe.assembly == Stack(
        tuple(
            Concat((Pad(Part(2 * e), 128, 256), Pad(Part(2 * e + 1), 128, 256))) for e in range(5)
        )
    )
    assert down.recipe.assembly == Stack(tuple(Pad(Part(e), 256, 128) for e in range(5)))
    assert up.widths == (128, 128) and down.widths == (256,)
    assert (down.logical.n, down.logical.k) == (256, 96)
    assert {entry.name: entry.spec.shape for item in (up, down) for entry in item.made} == {
        f"{BLOCK}.experts.w13_qweight": (5, 16, 512),
        f"{BLOCK}.experts.w13_scales": (5, 8, 256),
        f"{BLOCK}.experts.w2_qweight": (5, 8, 512),
        f"{BLOCK}.experts.w2_scales": (5, 4, 256),
    }


@pytest.mark.parametrize(
    ("size", "hidden", "group", "padded"),
    [
        (96, 256, 32, 128),
        (160, 256, 32, 192),  # to 64, not to 128
        (128, 256, 128, 128),
        (64, 256, None, 64),
        (72, 256, None, 128),
        (128, 192, 64, 128),
        (64, 192, 64, 128),  # H is no multiple of 128, so K = I must be one
        (64, 104, None, 64),  # H is padded, too
    ],
)
def test_the_size_between_is_padded_as_the_engine_pads_it(
    size: int, hidden: int, group: int | None, padded: int
) -> None:
    """vLLM: a multiple of lcm(64, G) where H is one of 128."""
    scheme = group_config(weight_args(4, group))
    plan = plan_of(expert_modules(BLOCK, scheme, (size, hidden)), config=config_of(scheme))
    found = by_name(plan)
    up, down = (found[f"{BLOCK}.experts.{leaf}"].recipe.weight for leaf in ("w13", "w2"))
    assert (up.n, down.k) == (2 * padded, padded)
    assert hidden % 64 or (up.k, down.n) == (hidden, hidden)


def test_other_names_and_no_gate() -> None:
    plan = plan_of(expert_modules(BLOCK, W4, (128, 256), names=("w1", "w3", "w2")), "triton")
    assert by_name(plan).keys() == STACKS
    up = by_name(plan)[f"{BLOCK}.experts.w13"]
    assert [source.name.rpartition(".")[2] for source in up.sources[:2]] == ["w1", "w3"]
    plan = plan_of(expert_modules(BLOCK, W4, (96, 256), names=(UP, DOWN)))
    assert by_name(plan).keys() == STACKS and not plan.notes
    up = by_name(plan)[f"{BLOCK}.experts.w13"]
    assert up.widths == (96,) and up.recipe.weight.n == 128


def test_nothing_is_stacked_unless_asked() -> None:
    plan = planned(expert_modules(BLOCK, W4, (128, 256)), config_of(W4), "cuda")
    assert len(plan.modules) == 9 and not plan.notes


def test_biases_are_stacked() -> None:
    tensors = expert_modules(BLOCK, W4, (128, 256), 3)
    for number in range(3):
        tensors[name(number, GATE, "bias")] = torch.randn(128)
        tensors[name(number, UP, "bias")] = torch.randn(128)
        tensors[name(number, DOWN, "bias")] = torch.randn(256)
    found = by_name(plan_of(tensors))
    shapes = {
        entry.name: entry.spec.shape for item in found.values() for entry in item.beside.values()
    }
    assert shapes == {
        f"{BLOCK}.experts.w13_bias": (3, 256),
        f"{BLOCK}.experts.w2_bias": (3, 256),
    }


def apart(tensors: Tensors, reason: str, target: str = "cuda", **more: Any) -> None:
    """Every expert stays as it is, and one note says why."""
    plan = plan_of(tensors, target, **more)
    experts = {item.rpartition(".")[0] for item in tensors if item.endswith("weight_scale")}
    assert by_name(plan).keys() == experts
    assert plan.notes == (f"{BLOCK}.experts are not stacked: {reason}",)


def test_a_missing_number() -> None:
    tensors = expert_modules(BLOCK, W4, (128, 256), 4)
    tensors = {key: tensor for key, tensor in tensors.items() if ".experts.2." not in key}
    apart(tensors, f"{name(2, GATE)} is missing")


@pytest.mark.parametrize("leaf", [GATE, UP, DOWN])
def test_a_missing_projection(leaf: str) -> None:
    tensors = expert_modules(BLOCK, W4, (128, 256), 3)
    tensors = {key: tensor for key, tensor in tensors.items() if name(1, leaf) not in key}
    apart(tensors, f"{name(1, leaf)} is missing")


@pytest.mark.parametrize("leaf", [GATE, DOWN])
def test_a_projection_that_is_not_quantised(leaf: str) -> None:
    """The gate of no expert is, so it does not look as if there were none."""
    tensors = expert_modules(BLOCK, W4, (128, 256), 2)
    dense = [name(number, leaf) for number in range(2)]
    tensors = {key: t for key, t in tensors.items() if key.rpartition(".")[0] not in dense}
    tensors |= {f"{each}.weight": torch.randn(128, 256) for each in dense}
    apart(tensors, f"{dense[0]} is not quantised", config=config_of(W4, ignore=dense))


@pytest.mark.parametrize("number", [0, 3])
def test_an_expert_that_is_not_quantised(number: int) -> None:
    """The last one, too: without it the others would look like all there are."""
    tensors = expert_modules(BLOCK, W4, (128, 256), 4)
    tensors = {key: t for key, t in tensors.items() if f".experts.{number}." not in key}
    dense = [name(number, leaf) for leaf in (GATE, UP, DOWN)]
    tensors |= {f"{each}.weight": torch.randn(128, 256) for each in dense}
    apart(tensors, f"{dense[0]} is not quantised", config=config_of(W4, ignore=dense))


@pytest.mark.parametrize(
    ("number", "leaf", "first"), [(1, UP, (1, UP)), (2, DOWN, (0, DOWN)), (0, DOWN, (0, GATE))]
)
def test_mixed_schemes(number: int, leaf: str, first: tuple[int, str]) -> None:
    other = group_config(weight_args(8, 32), [f"re:.*experts\\.{number}\\.{leaf}"])
    tensors = expert_modules(BLOCK, W4, (128, 256), 3)
    shape = (256, 128) if leaf == DOWN else (128, 256)
    tensors |= module(name(number, leaf), quantised(*shape, other, 7))
    plan = plan_of(tensors, "triton", config=config_of(other, W4))
    assert len(plan.modules) == 9
    (note,) = plan.notes
    assert "differ in bits" in note and name(number, leaf) in note


def test_shapes_that_do_not_fit() -> None:
    tensors = expert_modules(BLOCK, W4, (128, 256), 2)
    tensors |= module(name(0, DOWN), quantised(256, 160, W4, 5))
    apart(tensors, f"{name(0, GATE)} and {name(0, DOWN)} do not fit each other in shape")


def test_act_order() -> None:
    tensors = expert_modules(BLOCK, W4, (128, 256), 2, (UP, DOWN))
    for number in range(2):
        tensors[name(number, UP, "weight_g_idx")] = torch.arange(256, dtype=torch.int32) % 8
        tensors[name(number, DOWN, "weight_g_idx")] = torch.arange(128, dtype=torch.int32) % 4
    config = config_of(group_config(weight_args(4, 32, actorder="group")))
    apart(tensors, f"{name(0, UP)} has an act-order of its own", config=config)


def test_static_scales_of_gate_and_up() -> None:
    """Those of one expert have to be equal, those of several not."""
    group = group_config(weight_args(4, 32), inputs=STATIC_INT8)
    tensors = expert_modules(BLOCK, group, (128, 256), 2)
    config = config_of(group)
    both = f"{name(0, GATE)} and {name(0, UP)}"
    apart(tensors, f"{both} have different input_scale values", "triton", config=config)
    for number in range(2):
        same = tensors[name(number, GATE, "input_scale")].clone()
        tensors[name(number, UP, "input_scale")] = same
    found = by_name(plan_of(tensors, "triton", config=config))
    assert found.keys() == STACKS
    (scale,) = (e for e in found[f"{BLOCK}.experts.w13"].outputs if "input_scale" in e.name)
    assert scale.name == f"{BLOCK}.experts.w13_input_scale" and scale.spec.shape == (2,)


def test_biases_that_would_be_padded() -> None:
    tensors = expert_modules(BLOCK, W4, (96, 256), 2)
    tensors |= {name(e, leaf, "bias"): torch.randn(96) for e in range(2) for leaf in (GATE, UP)}
    apart(tensors, "their biases would have to be padded to 128 for marlin")


def test_a_bias_of_one_expert_alone() -> None:
    tensors = expert_modules(BLOCK, W4, (128, 256), 2)
    tensors[name(1, DOWN, "bias")] = torch.randn(256)
    both = f"{name(0, DOWN)} and {name(1, DOWN)}"
    apart(tensors, f"{both} differ in the tensors beside the weight")


def test_both_or_neither() -> None:
    """w13 has a layout, and the one that was asked for takes no w2 of these groups."""
    tensors = expert_modules(BLOCK, W4, (128, 256), 2)
    plan = plan_of(tensors, overrides=(("*.w2", "machete"),))
    assert not any("w13" in item.name for item in plan.modules)
    (note,) = plan.notes
    assert note.startswith(f"{BLOCK}.experts are not stacked: {BLOCK}.experts.w2: machete: ")


def test_layouts_asked_for_the_parts() -> None:
    tensors = expert_modules(BLOCK, W4, (128, 256), 2)
    overrides = (("*.experts.*_proj", "triton-wna16"),)
    found = by_name(plan_of(tensors, overrides=overrides))
    assert {item.recipe.layout for item in found.values()} == {"triton-wna16"}
    assert found.keys() == STACKS
    reason = f"{BLOCK}.experts.w13: --layout asks for different layouts of its parts"
    apart(tensors, reason, overrides=(("*.1.gate_proj", "triton-wna16"),))


def test_two_layouts() -> None:
    overrides = (("*.w2", "triton-wna16"),)
    reason = f"{BLOCK}.experts.w13 would be marlin and {BLOCK}.experts.w2 triton-wna16"
    apart(expert_modules(BLOCK, W4, (128, 256), 2), reason, overrides=overrides)


def test_two_sets_of_names() -> None:
    tensors = expert_modules(BLOCK, W4, (128, 256), 2)
    tensors |= expert_modules(BLOCK, W4, (128, 256), 1, ("w1", "w3", "w2"))
    plan = plan_of(tensors)
    assert len(plan.modules) == 9 and "named in two ways" in plan.notes[0]
