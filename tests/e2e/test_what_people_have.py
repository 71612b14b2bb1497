"""Checkpoints as their producers really leave them: converted exactly, and given back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.builders import (
    DYNAMIC_INT8,
    config_of,
    experts,
    group_config,
    module,
    quantised,
    weight_args,
    write_checkpoint,
)
from support.roundtrip import check_restored, convert_and_back
from support.schemes import fp8

import ctconvert
from ctconvert.errors import BadInputError

W4 = group_config(weight_args(4, 32))
W8 = group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8)
F8 = group_config(
    weight_args(8, kind="float", strategy="tensor"), format="float-quantized", inputs=fp8(True)
)
UP = "model.layers.0.mlp.up_proj"
EXPERTS = "model.layers.0.mlp.experts.down_proj"

ZEROS: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
    "packed": (W4, torch.zeros(64, 3, dtype=torch.int8)),
    "channel-wise": (W8, torch.zeros(64, 1, dtype=torch.int8)),
    "flat": (W8, torch.zeros(64, dtype=torch.int8)),
    "FP8": (F8, torch.zeros(1).to(torch.float8_e4m3fn)),
    "no dimension": (F8, torch.zeros((), dtype=torch.int8)),
}


@pytest.mark.parametrize("case", ZEROS)
def test_zero_points_of_a_symmetric_scheme(tmp_path: Path, case: str) -> None:
    group, zeros = ZEROS[case]
    made = quantised(64, 96, group, 1) | {"weight_zero_point": zeros}
    source = write_checkpoint(tmp_path / "in", module(UP, made), config_of(group))
    for target in ("triton", "cuda"):
        convert_and_back(source, tmp_path, target)


def test_zero_points_of_a_symmetric_scheme_that_are_not_zero(tmp_path: Path) -> None:
    zeros = torch.zeros(64, 3, dtype=torch.int8)
    zeros[63, 2] = 1
    made = quantised(64, 96, W4, 1) | {"weight_zero_point": zeros}
    source = write_checkpoint(tmp_path / "in", module(UP, made), config_of(W4))
    with pytest.raises(BadInputError, match=rf"module {UP}: weight_zero_point is not 0 everywhere"):
        ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    assert not (tmp_path / "out").exists()


def test_zero_points_that_became_other_than_zero_are_another_source(tmp_path: Path) -> None:
    made = quantised(64, 96, W4, 1) | {"weight_zero_point": torch.zeros(64, 3, dtype=torch.int8)}
    source = write_checkpoint(tmp_path / "in", module(UP, made), config_of(W4))
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    made["weight_zero_point"][5, 1] = -1
    save_file(module(UP, made), source / "model.safetensors")
    with pytest.raises(BadInputError, match="not 0 everywhere"):
        ctconvert.verify(tmp_path / "out", against=source)


@pytest.mark.parametrize("shape", [(1,), ()])
def test_experts_that_share_a_scale(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = experts(EXPERTS, 64, 96, F8)
    tensors[f"{EXPERTS}.weight_scale"] = torch.full(shape, 0.5).bfloat16()
    source = write_checkpoint(tmp_path / "in", tensors, config_of(F8))
    convert_and_back(source, tmp_path, "triton")
    made = load_file(tmp_path / "triton-out" / "model.safetensors")
    assert made[f"{EXPERTS}.weight_scale"].shape[0] == 3


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("target", ["triton", "cuda"])
def test_experts_that_are_parameters_of_one_module(
    tmp_path: Path, target: str, symmetric: bool
) -> None:
    group = group_config(weight_args(4, 32, symmetric=symmetric))
    tensors = {}
    for leaf, (n, k) in {"gate_up_proj": (128, 96), "down_proj": (96, 64)}.items():
        name = f"model.layers.0.experts.{leaf}"
        for key, tensor in experts(name, n, k, group).items():
            ending = key.removeprefix(f"{name}.weight_")
            if ending != "shape":
                tensors[f"{name}_{ending}"] = tensor
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    report = convert_and_back(source, tmp_path, target)
    assert report.modules == 2
    # the same as of the same experts in modules of their own
    usual: dict[str, torch.Tensor] = {}
    for leaf, (n, k) in {"gate_up_proj": (128, 96), "down_proj": (96, 64)}.items():
        usual |= experts(f"model.layers.0.experts.{leaf}", n, k, group)
    write_checkpoint(tmp_path / "usual", usual, config_of(group))
    ctconvert.repack(tmp_path / "usual", tmp_path / "other", target=target, device="cpu")
    made = load_file(tmp_path / f"{target}-out" / "model.safetensors")
    want = load_file(tmp_path / "other" / "model.safetensors")
    assert made.keys() == want.keys()
    assert all(torch.equal(made[name], want[name]) for name in want)


def metadata_of(folder: Path) -> dict[str, dict[str, str]]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found[path.name] = file.metadata()
    return found


def test_metadata_survives_with_its_aliases(tmp_path: Path) -> None:
    tensors = module(UP, quantised(64, 96, W4, 1))
    tensors["model.embed_tokens.weight"] = torch.randn(32, 96).bfloat16()
    source = write_checkpoint(tmp_path / "in", tensors, config_of(W4))
    metadata = {
        "format": "pt",
        "producer": 'llm-compressor "1"\n\u00e9',
        "lm_head.weight": "model.embed_tokens.weight",
        "twin.weight": f"{UP}.weight_packed",
    }
    save_file(tensors, source / "model.safetensors", metadata=metadata)
    convert_and_back(source, tmp_path, "triton")
    assert metadata_of(tmp_path / "triton-back") == {"model.safetensors": metadata}
    ours = {key: value for key, value in metadata.items() if key != "twin.weight"}
    assert metadata_of(tmp_path / "triton-out") == {"model.safetensors": ours}
    ctconvert.restore(tmp_path / "triton-out", tmp_path / "cut", max_shard_size=1000, device="cpu")
    check_restored(source, tmp_path / "cut")
    for name, found in metadata_of(tmp_path / "cut").items():
        with safe_open(tmp_path / "cut" / name, "pt") as file:
            names = set(file.keys())
        assert found["producer"] == metadata["producer"]
        assert ("lm_head.weight" in found) == ("model.embed_tokens.weight" in names)
        assert ("twin.weight" in found) == (f"{UP}.weight_packed" in names)


def test_every_copy_of_the_config_is_replaced(tmp_path: Path) -> None:
    tensors = module(UP, quantised(64, 96, W4, 1))
    source = write_checkpoint(tmp_path / "in", tensors, config_of(W4))
    config = json.loads((source / "config.json").read_text())
    config["text_config"] = {
        "hidden_size": 96,
        "quantization_config": config["quantization_config"],
        "compression_config": config["quantization_config"] | {"version": "0.9"},
    }
    of_thinker = {"quantization_config": config["quantization_config"]}
    config["thinker_config"] = {"text_config": of_thinker}
    config["vision_config"] = {"quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(config, indent=3))
    report = convert_and_back(source, tmp_path, "triton")
    made = json.loads((tmp_path / "triton-out" / "config.json").read_text())
    ours = made["quantization_config"]
    assert ours["quant_method"] == "ctconvert"
    assert made["text_config"]["quantization_config"] == ours
    assert made["text_config"]["compression_config"] == ours
    assert made["text_config"]["hidden_size"] == 96
    assert made["thinker_config"]["text_config"]["quantization_config"] == ours
    assert made["vision_config"] == config["vision_config"]
    assert any("text_config.compression_config holds another" in note for note in report.notes)
