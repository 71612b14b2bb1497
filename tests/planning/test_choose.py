"""Which layout a module gets, by target or by the user's own choice, and why it gets none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.block_floats import FP8 as FP8_INPUTS
from support.block_floats import fp8_group, mxfp8, mxfp8_group, nvfp4, nvfp4_group
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
from support.memory import described, planned
from support.paths import EXAMPLE

import ctconvert
from ctconvert.errors import UsageError
from ctconvert.layouts import TARGETS
from ctconvert.planning.make import make_plan
from ctconvert.records import Options

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
        ({"target": "tpu"}, "'tpu'.*triton, cuda, .*xpu"),
        ({"target": "cuda", "layout": {"*": "none"}}, r"\*=none.*triton-wna16"),
        ({"target": "cuda", "layout": {"re:(": "marlin"}}, r"re:\("),
        ({"target": "cuda", "dtype": "float32"}, "dtype 'float32'.*bfloat16 or float16"),
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


ASYMMETRIC = group_config(
    weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8 | {"symmetric": False}
)


def test_asymmetric_dynamic_activations() -> None:
    """One layout has what their kernel needs; the CPU's kernel would ignore their zero points."""
    made = quantised(64, 96, ASYMMETRIC, 1)
    for target in ("triton", "cuda", "cuda-sm80", "cuda-sm90", "cuda-sm100", "rocm", "xpu"):
        assert refusals(made, config_of(ASYMMETRIC), target) == []
    (reason,) = refusals(made, config_of(ASYMMETRIC), "cpu")
    assert "asymmetric activations" in reason


def test_static_asymmetric_activations_that_were_never_calibrated() -> None:
    inputs = STATIC_INT8 | {"symmetric": False}
    group = group_config(weight_args(8, None), format="int-quantized", inputs=inputs)
    made = quantised(64, 96, group, 1)
    made["input_zero_point"] = torch.tensor([3], dtype=torch.int8)
    assert refusals(made, config_of(group), "cuda") == []
    made["input_scale"] = torch.zeros(1)
    (reason,) = refusals(made, config_of(group), "cuda")
    assert "int8 asym static tensor in, whose zero points" in reason


@pytest.mark.parametrize("target", TARGETS)
def test_a_sparse_embedding_table_is_no_matmul(target: str) -> None:
    config = {
        "quant_method": "compressed-tensors",
        "sparsity_config": SPARSITY | {"targets": ["Embedding"]},
    }
    made = sparse24(64, 128, {"weights": None}, 1)
    assert len(refusals(made, config, target, "model.embed_tokens")) == 1
    assert refusals(made, config | {"sparsity_config": SPARSITY}, "cuda") == []


FP8 = fp8_group(inputs=FP8_INPUTS)
FP8_A16 = fp8_group()


def chosen(group: dict[str, Any], made: dict[str, torch.Tensor], target: str) -> str:
    """The layout of a module, or why there is none."""
    plan = planned(module("a.down_proj", made), config_of(group), target)
    return plan.modules[0].recipe.layout if plan.modules else plan.refusals[0].reason


@pytest.mark.parametrize(
    ("target", "quantised_activations", "bits16"),
    [
        ("cuda", "scaled-mm", "scaled-mm"),
        ("cuda-sm80", "marlin-fp8", "marlin-fp8"),
        ("cuda-sm90", "scaled-mm", "marlin-fp8"),
        ("cuda-sm100", "scaled-mm", "marlin-fp8"),
        ("rocm", "scaled-mm", "scaled-mm"),
        ("xpu", "scaled-mm", "scaled-mm"),
    ],
)
def test_fp8_by_machine(target: str, quantised_activations: str, bits16: str) -> None:
    assert chosen(FP8, quantised(64, 96, FP8, 1), target) == quantised_activations
    assert chosen(FP8_A16, quantised(64, 96, FP8_A16, 1), target) == bits16


@pytest.mark.parametrize("target", ["cuda", "cuda-sm80", "cuda-sm90", "cuda-sm100"])
def test_fp8_in_other_blocks_has_a_layout(target: str) -> None:
    inputs = FP8_INPUTS | {"strategy": "group", "group_size": 128}
    group = fp8_group("block", inputs, block_structure=[64, 32])
    assert chosen(group, quantised(96, 80, group, 1), target) == "marlin-fp8"
    group = fp8_group("block", inputs, block_structure=[64, 48])
    assert "scale blocks of 64 x 48" in chosen(group, quantised(96, 80, group, 1), target)


@pytest.mark.parametrize(
    ("target", "w4a4", "w4a16"),
    [
        ("cuda", "marlin-nvfp4", "marlin-nvfp4"),
        ("cuda-sm90", "humming-nvfp4", "humming-nvfp4"),
        ("cuda-sm100", "nvfp4-cutlass", "marlin-nvfp4"),
    ],
)
def test_nvfp4_by_machine(target: str, w4a4: str, w4a16: str) -> None:
    assert chosen(nvfp4_group(), nvfp4(64, 96), target) == w4a4
    assert chosen(nvfp4_group(False), nvfp4(64, 96, inputs=False), target) == w4a16


@pytest.mark.parametrize(
    ("target", "w8a8", "w8a16"),
    [
        ("cuda", "marlin-mxfp8", "marlin-mxfp8"),
        ("cuda-sm90", "marlin-mxfp8", "marlin-mxfp8"),
        ("cuda-sm100", "mxfp8-swizzled", "marlin-mxfp8"),
    ],
)
def test_mxfp8_by_machine(target: str, w8a8: str, w8a16: str) -> None:
    for inputs, layout in ((True, w8a8), (False, w8a16)):
        assert chosen(mxfp8_group(inputs), mxfp8(64, 96), target) == layout


@pytest.mark.parametrize(
    ("target", "w4a4", "w4a16"),
    [
        ("triton", "marlin-mxfp4", "marlin-mxfp4"),
        ("cuda-sm90", "marlin-mxfp4", "marlin-mxfp4"),
        ("cuda-sm100", "mxfp4-swizzled", "marlin-mxfp4"),
    ],
)
def test_mxfp4_by_machine(target: str, w4a4: str, w4a16: str) -> None:
    args = weight_args(4, 32, kind="float")
    for inputs, layout in ((args | {"dynamic": True}, w4a4), (None, w4a16)):
        group = group_config(args, format="mxfp4-pack-quantized", inputs=inputs)
        assert chosen(group, quantised(64, 96, group, 1), target) == layout


def test_int4_on_a_cpu_keeps_its_activations() -> None:
    for inputs, layout in ((None, "cpu-w4a16"), (DYNAMIC_INT8, "cpu-w4a8")):
        group = group_config(weight_args(4, 32), inputs=inputs)
        assert chosen(group, quantised(64, 96, group, 1), "cpu") == layout


def test_a_refusal_names_the_layouts_of_other_targets() -> None:
    group = group_config(
        weight_args(4, 128), format="int-quantized", inputs=DYNAMIC_INT8 | {"type": "float"}
    )
    reason = chosen(group, quantised(64, 256, group, 1), "cuda")
    assert "fp8 dynamic token" in reason
    assert reason.endswith("layouts of other targets that take it: w4a8-fp8")


@pytest.mark.parametrize(
    ("config", "option", "dtype", "noted"),
    [
        ({"dtype": "float16"}, None, "float16", False),
        ({"torch_dtype": "torch.float16"}, None, "float16", False),
        ({"text_config": {"dtype": "float16"}}, None, "float16", False),
        ({"dtype": None, "text_config": {"torch_dtype": "bfloat16"}}, None, "bfloat16", False),
        ({"thinker_config": {"text_config": {"dtype": "float16"}}}, None, "float16", False),
        ({"dtype": "bfloat16"}, "float16", "float16", False),
        ({"dtype": "float32"}, "float16", "float16", False),
        ({}, None, "bfloat16", True),
        ({}, "bfloat16", "bfloat16", False),
        ({"dtype": "float32"}, None, None, False),
        ({"dtype": ["bfloat16"]}, None, None, False),
    ],
)
def test_the_dtype_of_the_activations(
    config: dict[str, Any], option: Any, dtype: str | None, noted: bool
) -> None:
    tensors = module("a.down_proj", nvfp4(64, 96)) | module("b.down_proj", quantised(64, 96, W4, 1))
    groups = [nvfp4_group() | {"targets": ["re:a.*"]}, W4 | {"targets": ["re:b.*"]}]
    found = described(tensors, config_of(*groups), **config)
    plan = make_plan(found, Options(target="cuda", dtype=option))
    assert plan.options.dtype == dtype
    layouts = {item.name: item.recipe.layout for item in plan.modules}
    suffix = {"bfloat16": "", "float16": "-f16", None: None}[dtype]
    if suffix is None:
        assert layouts == {"b.down_proj": "marlin"}
        (refusal,) = plan.refusals
        assert f"config.json says {config['dtype']} (--dtype chooses one)" in refusal.reason
    else:
        assert layouts == {"a.down_proj": f"marlin-nvfp4{suffix}", "b.down_proj": "marlin"}
    assert any("--dtype" in note for note in plan.notes) == noted
    named = Options(target="cuda", dtype=option, overrides=(("*", "marlin-nvfp4-f16"),))
    assert [item.recipe.layout for item in make_plan(found, named).modules] == ["marlin-nvfp4-f16"]


def test_a_refusal_names_no_layout_of_the_target_itself() -> None:
    """Not those that it prefers for other activations."""
    group = group_config(weight_args(4, 32))
    made = quantised(64, 96, group, 1, torch.float32)
    reason = chosen(group, made, "cpu")
    assert reason.startswith("cpu-w4a16: F32 scales")
    assert reason.split("that take it: ")[1].split(", ") == ["triton-wna16", "xpu-w4a16"]


def test_no_note_where_nothing_depends_on_the_dtype() -> None:
    plan = planned(module("a.down_proj", quantised(64, 96, W4, 1)), config_of(W4), "cuda")
    assert plan.options.dtype == "bfloat16" and plan.notes == ()
