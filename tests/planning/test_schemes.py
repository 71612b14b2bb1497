"""The tensors say whether a module is quantised, the config says how."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.builders import (
    DYNAMIC_INT8,
    config_of,
    experts,
    group_config,
    module,
    quantised,
    weight_args,
)
from support.memory import described, planned

from ctconvert.errors import BadInputError, UsageError
from ctconvert.formats.quantization.names import other_names
from ctconvert.planning.make import refuse

W4 = group_config(weight_args(4, 32))
W2 = group_config(weight_args(2, 32))
ASYM = group_config(weight_args(4, 32, symmetric=False))
Tensors = dict[str, torch.Tensor]
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def dense(*names: str) -> Tensors:
    return {f"{name}.weight": torch.randn(64, 96).bfloat16() for name in names}


def packed(name: str, group: dict[str, Any] = W4, seed: int = 1) -> Tensors:
    return module(name, quantised(64, 96, group, seed))


def bits(tensors: Tensors, config: dict[str, Any]) -> dict[str, int]:
    """Bits of every module that is read."""
    found = described(tensors, config).modules
    return {name: item.source.weight.bits for name, item in found.items() if item.source}


def notes(tensors: Tensors, config: dict[str, Any]) -> str:
    return "\n".join(described(tensors, config).oddities)


@pytest.mark.parametrize("target", ["Linear", "re:.*_proj"])
def test_dense_weights_that_a_class_or_a_pattern_means_are_copied_and_told(target: str) -> None:
    group = W4 | {"targets": [target]}
    tensors = packed(UP) | dense(*(f"model.visual.{index}.out_proj" for index in range(5)))
    plan = planned(tensors, config_of(group), "triton")
    assert len(plan.copies) == 5 and not plan.refusals
    (note,) = plan.notes
    assert note.startswith("5 modules (model.visual.0.out_proj, ") and "copied" in note


def test_a_dense_weight_that_is_named_is_a_fault() -> None:
    tensors = packed(UP) | dense(DOWN)
    config = config_of(W4, group_config(weight_args(4, 32), [DOWN]))
    with pytest.raises(BadInputError, match=rf"module {DOWN}: .*this very name.*ignore"):
        refuse(planned(tensors, config, "triton"))
    plan = planned(tensors, config, "triton", keep_unsupported=True)
    assert [refusal.module for refusal in plan.kept] == [DOWN]
    assert f"{DOWN}.weight" in {copy.name for copy in plan.copies}


def test_a_dense_weight_that_is_named_under_another_prefix_is_told() -> None:
    stored = "model.language_model.layers.0.mlp.down_proj"
    config = config_of(W4, group_config(weight_args(4, 32), [DOWN]))
    tensors = packed(UP) | packed(DOWN) | dense(stored)
    assert "another prefix" not in notes(tensors, config)  # the name is another module's
    del tensors[f"{DOWN}.weight_packed"], tensors[f"{DOWN}.weight_scale"]
    del tensors[f"{DOWN}.weight_shape"]
    assert f"1 module ({stored}) that the config names, under another" in notes(tensors, config)


def test_an_embedding_that_the_config_means_as_linear_is_told() -> None:
    name = "model.embed_tokens"
    assert f"{name} is an embedding by its name" in notes(packed(name), config_of(W4))
    both = config_of(W4 | {"targets": ["Linear", "Embedding"]})
    assert notes(packed(name), both) == ""


def test_a_group_that_finds_nothing_quantised_is_an_error() -> None:
    group = group_config(weight_args(8, 32), ["re:.*down_proj"])
    with pytest.raises(BadInputError, match=rf"group_1 means 1 module \({DOWN}\), and not one"):
        described(packed(UP) | dense(DOWN), config_of(W4, group))


def test_a_group_that_means_nothing_is_none() -> None:
    unused = group_config(weight_args(8, 32), ["re:.*vision.*"])
    assert bits(packed(UP), config_of(W4, unused)) == {UP: 4}


@pytest.mark.parametrize(
    ("stored", "listed"),
    [
        ("model.language_model.layers.0.mlp.up_proj", UP),
        (UP, "model.language_model.layers.0.mlp.up_proj"),
        ("language_model.model.layers.0.mlp.up_proj", UP),
        ("model.visual.blocks.0.mlp.up_proj", "visual.blocks.0.mlp.up_proj"),
        ("language_model.model.layers.0.mlp.up_proj", r"re:model\.layers\.0\.mlp\..*"),
        (UP, r"re:language_model\.model\.layers\..*"),
    ],
)
def test_a_wrappers_prefix_is_no_difference(stored: str, listed: str) -> None:
    eight = group_config(weight_args(8, 32), ["re:nothing"])
    four = W4 | {"targets": [listed]}
    config = config_of(eight, four)
    assert bits(packed(stored), config) == {stored: 4}
    assert "matched under another prefix" in notes(packed(stored), config)


def test_prefixes_that_leave_a_choice() -> None:
    """Two groups have other names of the module: the one that fits, or none where both do."""
    stored = "wrapped.model.layers.0.mlp.up_proj"
    one, other = W4 | {"targets": [UP]}, W4 | {"targets": ["layers.0.mlp.up_proj"]}
    assert bits(packed(stored), config_of(W2 | {"targets": [UP]}, other)) == {stored: 4}
    active = other | {"input_activations": DYNAMIC_INT8}
    found = described(packed(stored), config_of(one, active)).modules[stored]
    assert found.fault and "group_0, group_1" in found.reason


def test_a_vision_tower_is_no_language_model() -> None:
    assert UP not in other_names("model.visual.layers.0.mlp.up_proj")
    assert UP in other_names("model.language_model.layers.0.mlp.up_proj")


def test_the_only_group_that_fits_is_it() -> None:
    groups = [W4 | {"targets": ["re:nothing"]}, W2 | {"targets": ["re:no"]}]
    assert bits(packed(UP), config_of(*groups)) == {UP: 4}
    assert "only config group that fits (group_0)" in notes(packed(UP), config_of(*groups))
    groups.append(groups[0] | {"input_activations": DYNAMIC_INT8})
    found = described(packed(UP), config_of(*groups)).modules[UP]
    assert found.fault and "more than one config group fits them: group_0, group_2" in found.reason


def test_groups_of_one_target_are_told_apart_by_the_tensors() -> None:
    tensors = packed(UP, W2) | packed(DOWN, W4)
    for config in (config_of(W2, W4), config_of(W4, W2)):
        assert bits(tensors, config) == {UP: 2, DOWN: 4}


def test_groups_of_one_target_that_both_fit_are_named() -> None:
    config = config_of(W4, W4 | {"input_activations": DYNAMIC_INT8})
    found = described(packed(UP), config).modules[UP]
    assert found.fault
    for text in ("group_0", "group_1", "more than one of them fits"):
        assert text in found.reason
    with pytest.raises(BadInputError, match=f"module {UP}"):
        refuse(planned(packed(UP), config, "triton"))


def test_groups_of_one_target_of_which_none_fits_are_named() -> None:
    eight, two = group_config(weight_args(8, 32)), W2
    found = described(packed(UP), config_of(eight, two)).modules[UP]
    assert found.fault and "group_1" in found.reason and "none of them fits" in found.reason


def test_groups_that_say_the_same_are_one() -> None:
    assert bits(packed(UP), config_of(W4, W4)) == {UP: 4}


def test_a_nearer_target_goes_before_a_class() -> None:
    """A name before a pattern, a pattern before a class, where more than one fits."""
    active = W4 | {"input_activations": DYNAMIC_INT8, "targets": [r"re:.*up_proj"]}
    source = described(packed(UP), config_of(W4, active)).modules[UP].source
    assert source is not None and source.weight.input_type == "I8"


def test_all_faults_are_counted_and_can_be_kept() -> None:
    tensors = packed(UP) | packed(DOWN)
    for name in (UP, DOWN):
        tensors[f"{name}.weight_scale"] = torch.rand(64, 4)
    tensors |= packed("model.layers.1.mlp.up_proj")
    config = config_of(W4)
    with pytest.raises(BadInputError, match=rf"module {DOWN}: .*\(and 1 other module too: {UP}\)"):
        refuse(planned(tensors, config, "triton"))
    plan = planned(tensors, config, "triton", keep_unsupported=True)
    assert len(plan.kept) == 2 and len(plan.modules) == 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int32])
def test_zero_points_of_a_symmetric_scheme(dtype: torch.dtype) -> None:
    made = quantised(64, 96, W4, 1) | {"weight_zero_point": torch.zeros(64, 3).to(dtype)}
    source = described(module(UP, made), config_of(W4)).modules[UP].source
    assert source is not None and source.zeros == ("weight_zero_point",)


def test_packed_zero_points_contradict_a_symmetric_scheme() -> None:
    found = described(packed(UP, ASYM), config_of(W4)).modules[UP]
    assert found.fault and "of a symmetric scheme" in found.reason


def test_only_the_kv_cache_is_quantised() -> None:
    cache = weight_args(8, kind="float", strategy="tensor")
    for groups in ([], [group_config(None, ["LlamaAttention"], inputs=DYNAMIC_INT8)]):
        config = config_of(*groups, kv_cache_scheme=cache)
        with pytest.raises(BadInputError, match=r"only the KV cache is quantised.*nothing to"):
            described(dense(UP), config)


def as_parameters(tensors: Tensors, name: str) -> Tensors:
    """A module's 3-D tensors as the parameters of its parent."""
    return {
        f"{name}_{local.removeprefix('weight_')}": tensors[f"{name}.{local}"]
        for local in ("weight_packed", "weight_scale", "weight_zero_point")
        if f"{name}.{local}" in tensors
    }


@pytest.mark.parametrize("group", [W4, ASYM])
def test_experts_that_are_parameters_of_one_module(group: dict[str, Any]) -> None:
    name = "model.layers.0.experts.gate_up_proj"
    tensors = as_parameters(experts(name, 64, 96, group), name)
    source = described(tensors, config_of(group)).modules[name].source
    assert source is not None and source.experts == 3
    assert (source.weight.n, source.weight.k) == (64, 96)
    plan = planned(tensors, config_of(group), "cuda")
    assert plan.entries[f"{name}.qweight"].spec.shape[0] == 3 and not plan.copies


def test_float_experts_with_scales_beside_them_are_named() -> None:
    name = "model.layers.0.experts.down_proj"
    tensors = packed(UP) | {name: torch.randn(3, 64, 96), f"{name}_scale": torch.rand(3, 64, 3)}
    plan = planned(tensors, config_of(W4), "triton")
    assert [refusal.module for refusal in plan.refusals] == [name]
    assert "save_compressed=True" in plan.refusals[0].reason
    kept = planned(tensors, config_of(W4), "triton", keep_unsupported=True)
    assert {name, f"{name}_scale"} == {copy.name for copy in kept.copies}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("scale", ["_scale", "_weight_scale"])
def test_quantised_experts_that_no_format_names_so_are_faults(
    dtype: torch.dtype, scale: str
) -> None:
    name = "model.layers.0.experts.gate_up_proj"
    stored = {name: torch.ones(3, 64, 96).to(dtype), f"{name}{scale}": torch.rand(3, 64, 1)}
    plan = planned(packed(UP) | stored, config_of(W4), "triton")
    assert [(refusal.module, refusal.fault) for refusal in plan.refusals] == [(name, True)]
    assert "no compressed-tensors format names" in plan.refusals[0].reason
    kept = planned(packed(UP) | stored, config_of(W4), "triton", keep_unsupported=True)
    assert stored.keys() == {copy.name for copy in kept.copies}


def test_fp8_parameters_that_are_no_weight_of_a_module_are_faults() -> None:
    name = "vision.attn.in_proj_weight"
    stored = {name: torch.ones(64, 96).to(torch.float8_e4m3fn)}
    plan = planned(packed(UP) | stored, config_of(W4), "triton")
    assert [(refusal.module, refusal.fault) for refusal in plan.refusals] == [(name, True)]


def test_activation_scales_of_experts_that_are_parameters_are_theirs() -> None:
    name = "model.layers.0.experts.gate_up_proj"
    tensors = packed(UP) | as_parameters(experts(name, 64, 96, W4), name)
    tensors[f"{name}_input_scale"] = torch.ones(3)
    found = described(tensors, config_of(W4)).modules[name]
    assert "holds input_scale, which its scheme" in found.reason


@pytest.mark.parametrize("local", ["weight_zero_point", "weight_g_idx", "weight_shape"])
def test_a_float_weight_with_a_quantisation_tensor_beside_it_is_a_fault(local: str) -> None:
    tensors = packed(UP) | dense(DOWN) | {f"{DOWN}.{local}": torch.zeros(96, dtype=torch.int32)}
    plan = planned(tensors, config_of(W4), "triton")
    assert [(refusal.module, refusal.fault) for refusal in plan.refusals] == [(DOWN, True)]


def test_a_module_of_which_little_is_left_is_a_fault() -> None:
    tensors = packed(UP) | {f"{DOWN}.weight_shape": torch.tensor([64, 96])}
    plan = planned(tensors, config_of(W4), "triton")
    assert [(refusal.module, refusal.fault) for refusal in plan.refusals] == [(DOWN, True)]


@pytest.mark.parametrize("location", ["weight_input", "weight_output", "input", "q_attn", None])
def test_rotations_of_weights_are_in_them(location: str | None) -> None:
    apply = [{"targets": ["Linear"], "location": location, "ignore": []}]
    transforms = {"config_groups": {"R1": {"type": "hadamard", "apply": apply}}}
    found = described(packed(UP), config_of(W4, transform_config=transforms)).modules[UP]
    online = location not in ("weight_input", "weight_output")
    assert bool(found.reason) is online
    if online:
        assert "R1" in found.reason and str(location or "no location") in found.reason


def test_patterns_choose_what_is_converted() -> None:
    tensors = packed(UP) | packed(DOWN) | packed("model.layers.1.mlp.up_proj")
    some = planned(tensors, config_of(W4), "triton", include=("*.up_proj",), exclude=("*.1.*",))
    assert [item.name for item in some.modules] == [UP]
    assert {item.module: item.reason for item in some.kept} == {
        DOWN: "no --include means it",
        "model.layers.1.mlp.up_proj": "--exclude *.1.* means it",
    }
    assert len(some.copies) == 6 and not some.refusals
    for options in ({"include": ("*.q_proj",)}, {"exclude": ("re:.*q_proj",)}):
        with pytest.raises(UsageError, match="no quantised module has such a name"):
            planned(tensors, config_of(W4), "triton", **options)
    with pytest.raises(UsageError, match="leave no quantised module"):
        planned(tensors, config_of(W4), "triton", exclude=("*",))


def test_what_is_left_out_is_not_joined_and_may_be_faulty() -> None:
    gate = "model.layers.0.mlp.gate_proj"
    tensors = packed(UP) | packed(gate) | packed(DOWN)
    tensors[f"{DOWN}.weight_scale"] = torch.rand(64, 4)
    plan = planned(
        tensors, config_of(W4), "triton", fuse=True, exclude=("*gate_proj", "*down_proj")
    )
    assert [item.name for item in plan.modules] == [UP]
    refuse(plan)
