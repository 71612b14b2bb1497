"""Which layout a module gets, by target or by the user's own choice, and why it gets none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.builders import (
    DYNAMIC_INT8,
    STATIC_INT8,
    config_of,
    group_config,
    module,
    quantised,
    sparse24,
    weight_args,
)
from support.memory import planned
from support.paths import EXAMPLE

import ctconvert
from ctconvert.errors import UsageError
from ctconvert.layouts import TARGETS

W4 = group_config(weight_args(4, 32))
INT8 = group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8)
SPARSITY = {"format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": ["lm_head"]}


def refusals(
    made: dict[str, torch.Tensor], config: dict[str, Any], target: str, name: str = "a.down_proj"
) -> list[str]:
    """Why a target takes no module of a checkpoint; nothing where it takes it."""
    plan = planned(module(name, made), config, target)
    assert len(plan.modules) + len(plan.refusals) == 1
    return [refusal.reason for refusal in plan.refusals]


def test_a_layout_can_be_chosen_by_name() -> None:
    plan = ctconvert.plan(EXAMPLE, target="cuda", layout={"*.q_proj": "triton-wna16"})
    chosen = {item.name: item.recipe.layout for item in plan.modules}
    assert chosen["model.layers.0.self_attn.q_proj"] == "triton-wna16"
    assert chosen["model.layers.0.self_attn.k_proj"] == "marlin"
    assert plan.layouts() == {"marlin": 12, "triton-wna16": 2}


def test_a_fused_module_is_chosen_by_its_own_name() -> None:
    plan = ctconvert.plan(EXAMPLE, target="cuda", fuse=True, layout={"re:.*qkv": "triton-wna16"})
    assert plan.layouts() == {"triton-wna16": 2, "marlin": 6}


def test_an_override_for_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"\*\.w1=triton-wna16"):
        ctconvert.plan(EXAMPLE, target="cuda", layout={"*.w1": "triton-wna16"})


def test_a_chosen_layout_that_does_not_take_it_says_why() -> None:
    plan = ctconvert.plan(EXAMPLE, target="cuda", layout={"*.q_proj": "scaled-mm"})
    assert len(plan.refusals) == 2
    assert all(item.reason.startswith("scaled-mm: ") for item in plan.refusals)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target": "tpu"}, "'tpu'.*triton, cuda, xpu"),
        ({"target": "cuda", "layout": {"*": "none"}}, r"\*=none.*triton-wna16"),
        ({"target": "cuda", "layout": {"re:(": "marlin"}}, r"re:\("),
        ({"target": "cuda", "max_shard_size": 0}, "max_shard_size 0"),
        ({"target": "cuda", "max_shard_size": 1 << 63}, "max_shard_size"),
    ],
)
def test_what_does_not_exist_cannot_be_asked_for(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ctconvert.plan(EXAMPLE, **options)


def test_a_sum_that_could_leave_int32_is_refused() -> None:
    assert refusals(quantised(16, 65536, INT8, 1), config_of(INT8), "triton") == []
    (reason,) = refusals(quantised(16, 65552, INT8, 1), config_of(INT8), "triton")
    assert "K = 65552: an int32 sum" in reason


@pytest.mark.parametrize(("n", "k", "kind"), [(60, 128, ""), (64, 72, ""), (64, 80, "int8")])
def test_a_sparse_module_that_the_kernel_cannot_read_is_refused(n: int, k: int, kind: str) -> None:
    config: dict[str, Any] = {"quant_method": "compressed-tensors", "sparsity_config": SPARSITY}
    made = sparse24(n, k, INT8 if kind else {"weights": None}, 1)
    (reason,) = refusals(made, config | (config_of(INT8) if kind else {}), "cuda")
    assert f"{n}x{k}: the kernel copies 16 bytes" in reason


def test_a_sparse_modules_zero_point_is_not_ignored() -> None:
    group = group_config(weight_args(8, None), format="int-quantized", inputs=STATIC_INT8)
    made = sparse24(64, 128, group, 1)
    made["input_zero_point"] = torch.tensor([7], dtype=torch.int8)
    (reason,) = refusals(made, config_of(group, sparsity_config=SPARSITY), "cuda")
    assert "input_zero_point is 7" in reason


@pytest.mark.parametrize("target", TARGETS)
def test_activation_zero_points_are_not_ignored(target: str) -> None:
    group = group_config(weight_args(4, 32), inputs=STATIC_INT8, outputs=STATIC_INT8)
    for value in (0, 3):
        made = quantised(64, 96, group, 1)
        made["input_zero_point"] = torch.tensor([value], dtype=torch.int8)
        found = refusals(made, config_of(group), target)
        assert len(found) == bool(value)
        assert all("input_zero_point is 3" in reason for reason in found)


def test_asymmetric_dynamic_activations_are_refused() -> None:
    inputs = DYNAMIC_INT8 | {"symmetric": False}
    group = group_config(weight_args(8, None), format="int-quantized", inputs=inputs)
    (reason,) = refusals(quantised(64, 96, group, 1), config_of(group), "cuda")
    assert "asymmetric dynamic" in reason


@pytest.mark.parametrize("target", TARGETS)
def test_a_sparse_embedding_table_is_no_matmul(target: str) -> None:
    config = {
        "quant_method": "compressed-tensors",
        "sparsity_config": SPARSITY | {"targets": ["Embedding"]},
    }
    made = sparse24(64, 128, {"weights": None}, 1)
    assert len(refusals(made, config, target, "model.embed_tokens")) == 1
    assert refusals(made, config | {"sparsity_config": SPARSITY}, "cuda") == []
