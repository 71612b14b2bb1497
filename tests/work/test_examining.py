"""``doctor``: each thing that can be wrong is found, and nothing in what is sound."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKPOINTS, EXAMPLE
from safetensors.torch import load_file, save_file
from support.builders import (
    config_of,
    group_config,
    module,
    quantised,
    weight_args,
    write_checkpoint,
)
from support.cli import run

from ctconvert import api
from ctconvert.errors import BadInputError, UsageError

Q = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


def changed(
    to: Path,
    tensors: Callable[[Tensors], object] = lambda tensors: None,
    config: Callable[[dict[str, Any]], object] = lambda config: None,
    source: Path = EXAMPLE,
) -> Path:
    """A copy of a checkpoint, changed."""
    shutil.copytree(source, to)
    found = load_file(to / "model.safetensors")
    tensors(found)
    save_file(found, to / "model.safetensors", {"format": "pt"})
    text = json.loads((to / "config.json").read_text())
    config(text)
    (to / "config.json").write_text(json.dumps(text))
    return to


def findings(model: Path, **options: Any) -> list[tuple[str, str, str | None]]:
    found = api.doctor(model, **options)
    return [(one.severity, one.kind, one.module) for one in found.findings]


@pytest.mark.parametrize("target", [None, "triton", "cuda", "cuda-sm90"])
def test_a_sound_checkpoint(target: str | None) -> None:
    found = api.doctor(EXAMPLE, target=target, tensor_parallel=(1, 3))
    assert (found.modules, found.findings, found.errors) == (14, (), 0)


def test_a_target_that_matches_nothing(tmp_path: Path) -> None:
    def config(found: dict[str, Any]) -> None:
        (group,) = found["quantization_config"]["config_groups"].values()
        group["targets"] += ["re:.*no_such$", "model.layers.9.q_proj", "LlamaAttention"]

    found = api.doctor(changed(tmp_path / "model", config=config))
    assert [(one.severity, one.kind) for one in found.findings] == [("error", "unmatched")] * 2
    assert "re:.*no_such$" in found.findings[0].message


def dense(name: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        shape = [int(size) for size in tensors[f"{name}.weight_shape"]]
        for local in ("packed", "scale", "shape"):
            del tensors[f"{name}.weight_{local}"]
        tensors[f"{name}.weight"] = torch.ones(shape, dtype=torch.bfloat16)

    return edit


def test_a_part_of_a_fused_group_that_is_dense(tmp_path: Path) -> None:
    model = changed(tmp_path / "model", dense(Q))
    assert findings(model) == [
        ("error", "fused", "model.layers.0.self_attn.qkv_proj"),
        ("warning", "dense", Q),
    ]


def test_a_dense_module_alone_may_be_of_another_class(tmp_path: Path) -> None:
    model = changed(tmp_path / "model", dense("model.layers.0.self_attn.o_proj"))
    assert findings(model) == [("warning", "dense", "model.layers.0.self_attn.o_proj")]
    code, out, _ = run("doctor", model)
    assert code == 0 and "0 errors, 1 warning; the weights were read" in out


def test_parts_of_two_schemes(tmp_path: Path) -> None:
    two, eight = (group_config(weight_args(bits, 32)) for bits in (4, 8))
    two["targets"], eight["targets"] = ["re:.*gate_proj"], ["re:.*up_proj"]
    tensors = module("mlp.gate_proj", quantised(64, 96, two, 1))
    tensors |= module("mlp.up_proj", quantised(64, 96, eight, 2))
    model = write_checkpoint(tmp_path / "model", tensors, config_of(two, eight))
    assert findings(model) == [("error", "fused", "mlp.gate_up_proj")]


@pytest.mark.parametrize(
    ("value", "severity", "says"),
    [
        (0.0, "error", "2 of 5184 scales are 0"),
        (1e-40, "warning", "2 of 5184 scales are subnormal, which kernels may take for 0"),
    ],
)
def test_scales_out_of_range(tmp_path: Path, value: float, severity: str, says: str) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[f"{Q}.weight_scale"][3, 4:6] = value

    model = changed(tmp_path / "model", edit)
    found = [one for one in api.doctor(model).findings if one.kind == "scale"]
    assert [(one.severity, one.module, one.message) for one in found] == [(severity, Q, says)]
    assert findings(model, data=False) == []


def test_a_scale_that_is_no_number(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[f"{Q}.weight_scale"][3, 4] = float("inf")

    (one,) = api.doctor(changed(tmp_path / "model", edit)).findings
    assert (one.severity, one.kind, one.module) == ("error", "damaged", Q)
    assert "weight_scale[3, 4]" in one.message


def fp8(folder: Path, scale: float) -> Path:
    group = group_config(weight_args(8, None, type="float"), format="float-quantized")
    made = quantised(64, 128, group, 3)
    made["weight_scale"][5] = scale
    return write_checkpoint(folder, module("a.o_proj", made), config_of(group))


def test_a_scale_that_a_layout_cannot_hold(tmp_path: Path) -> None:
    """marlin-fp8 multiplies scales by 2**120."""
    sound, large = fp8(tmp_path / "sound", 0.5), fp8(tmp_path / "large", 300.0)
    assert findings(sound, target="cuda-sm80") == [] == findings(large)
    (one,) = api.doctor(large, target="cuda-sm80").findings
    assert (one.severity, one.kind, one.module) == ("error", "damaged", "a.o_proj")
    assert "times 2**120" in one.message


@pytest.mark.parametrize("symmetric", [True, False])
def test_channels_without_information(tmp_path: Path, symmetric: bool) -> None:
    group = group_config(weight_args(4, 32, symmetric=symmetric))
    made = quantised(64, 96, group, 1)
    packed = made["weight_packed"]
    packed[7] = 0x33333333
    if symmetric:
        packed[8:10] = -0x77777778  # 0x88888888: 0
    else:
        for word in range(packed.shape[1]):  # each group its own zero point, here of row 9
            zero = int(made["weight_zero_point"][9 // 8, word // 4]) >> 4 * (9 % 8) & 15
            code = int.from_bytes(bytes([zero * 17]) * 4, "little", signed=True)
            packed[9, word] = code
    model = write_checkpoint(tmp_path / "model", module("q", made), config_of(group))
    found = {one.message for one in api.doctor(model).findings}
    zero_text = (
        "2 of 64 output channels are zero" if symmetric else "1 of 64 output channels is zero"
    )
    assert found == {zero_text, "1 of 64 output channels is constant, of one code"}


def test_tensors_that_nobody_owns(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["model.layers.7.k_proj.input_scale"] = torch.ones(1)
        tensors[f"{Q}.weight_extra"] = torch.ones(2)

    found = findings(changed(tmp_path / "model", edit))
    assert ("error", "unowned", "model.layers.7.k_proj") in found
    assert ("error", "unowned", Q) in found


def test_splits() -> None:
    found = api.doctor(EXAMPLE, tensor_parallel=(1, 2), data=False).findings
    assert {one.split for one in found} == {2} and {one.kind for one in found} == {"split"}
    modules = [one.module for one in found if one.module]
    assert modules == [f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)]
    assert found[0].message == "9 attention heads are no multiple of it"


def test_a_cut_that_no_layout_takes(tmp_path: Path) -> None:
    """``triton-wna16`` packs eight rows to a word: a rank of 8 has them, one of 16 has four.

    A padded tensor cannot be cut when it is loaded.
    """
    group = group_config(weight_args(4, 32))
    made = module("mlp.up_proj", quantised(64, 96, group, 1))
    model = write_checkpoint(tmp_path / "model", made, config_of(group))
    assert findings(model, tensor_parallel=(1, 8, 16), data=False) == []
    found = api.doctor(model, target="triton", tensor_parallel=(1, 8, 16), data=False).findings
    assert [(one.module, one.split) for one in found] == [("mlp.up_proj", 16)]
    assert found[0].message.startswith("a rank's 4x96 would have to be padded to 8x96 for ")
    # marlin pads a rank's 32 rows, and triton-wna16, of the same target, takes them as they are
    assert findings(model, target="cuda", tensor_parallel=(2,)) == []
    found = api.doctor(model, target="cuda", tensor_parallel=(16,), data=False).findings
    assert [one.split for one in found] == [16]


def test_what_no_layout_takes_is_listed() -> None:
    model = CHECKPOINTS / "rand-w3a16-g128-sym"
    assert findings(model) == []
    found = findings(model, target="triton")
    assert [(severity, kind) for severity, kind, _ in found] == [("error", "unsupported")] * 2


def test_a_config_that_contradicts_the_tensors_is_a_finding(tmp_path: Path) -> None:
    model = changed(tmp_path / "model", lambda tensors: tensors.pop(f"{Q}.weight_scale"))
    assert ("error", "unreadable", Q) in findings(model)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        api.doctor(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="unknown target"):
        api.doctor(EXAMPLE, target="tpu")
    with pytest.raises(BadInputError, match="no quantization_config"):
        api.doctor(changed(tmp_path / "m", config=lambda c: c.pop("quantization_config")))


def test_the_command(tmp_path: Path) -> None:
    model = changed(tmp_path / "model", dense(Q))
    code, out, err = run("doctor", model, "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["error"]["kind"]) == (1, False, "Findings")
    assert found["error"]["module"] == "model.layers.0.self_attn.qkv_proj"
    assert [one["kind"] for one in found["findings"]] == ["fused", "dense"]
    assert err.count("\n") == 1
    code, out, err = run("doctor", EXAMPLE, "-t", "cuda", "--tensor-parallel", "1,3")
    assert code == 0 and "14 quantised modules, 0 errors, 0 warnings" in out
    assert run("doctor", EXAMPLE, "--tensor-parallel", "two").code == 2
    code, _, err = run("doctor", EXAMPLE, "--tensor-parallel", "2", "--no-data")
    assert code == 1 and ": at 2 ranks: 9 attention heads are no multiple of it (and " in err
