"""FP8 embedding tables: converted, looked up, refused where their scales are no channel's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.block_floats import fp8_group, mxfp8, mxfp8_group
from support.builders import config_of, module, quantised, write_checkpoint
from support.memory import planned
from support.reference import load_tensors
from support.roundtrip import convert_and_back

import ctconvert
from ctconvert.layouts import TARGETS
from ctconvert.runtime import load

NAME = "model.embed_tokens"


def table(group: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return module(NAME, quantised(40, 96, group, 1, dtype))


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_table_is_looked_up(strategy: str, dtype: torch.dtype, tmp_path: Path) -> None:
    group = fp8_group(strategy) | {"targets": ["Embedding"]}
    tensors = table(group, dtype)
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    report = convert_and_back(source, tmp_path, "cuda")
    assert report.layouts == {"gather": 1}
    made = load_tensors(tmp_path / "cuda-out")
    weight, scale = tensors[f"{NAME}.weight"], tensors[f"{NAME}.weight_scale"]
    assert torch.equal(made[f"{NAME}.weight"].view(torch.uint8), weight.view(torch.uint8))
    assert made[f"{NAME}.weight_scale"].shape == (40, 1)
    ids = torch.tensor([[3, 39, 0], [3, 17, 21]])
    found = load(tmp_path / "cuda-out", device="cpu")[NAME](ids)
    wide = scale.float().reshape(-1, 1).expand(40, 1)
    want = torch.stack([torch.stack([weight[i].float() * wide[i] for i in row]) for row in ids])
    assert found.dtype == dtype and torch.equal(found, want.to(dtype))
    with pytest.raises(IndexError, match="0 to 39"):
        load(tmp_path / "cuda-out", device="cpu")[NAME](torch.tensor([40]))
    proof = ctconvert.verify(tmp_path / "cuda-out", kernels=True, device="cpu")
    assert proof.kernels["gather"].modules == 1


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_takes_it(target: str) -> None:
    group = fp8_group() | {"targets": ["Embedding"]}
    plan = planned(table(group, torch.bfloat16), config_of(group), target)
    assert plan.layouts() == {"gather": 1}


@pytest.mark.parametrize("kind", ["block", "mxfp8", "dynamic"])
def test_other_tables_are_refused_by_name(kind: str) -> None:
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
    group = {
        "block": fp8_group("block", block_structure=[8, 32]),
        "mxfp8": mxfp8_group(),
        "dynamic": fp8_group(inputs=inputs | {"strategy": "token"}),
    }[kind] | {"targets": ["Embedding"]}
    tensors = module(NAME, mxfp8(40, 96)) if kind == "mxfp8" else table(group, torch.bfloat16)
    (refusal,) = planned(tensors, config_of(group), "cuda").refusals
    reasons = {"block": "scale strategy block of FP8", "mxfp8": "fp8 g32", "dynamic": "a look-up"}
    assert reasons[kind] in refusal.reason
