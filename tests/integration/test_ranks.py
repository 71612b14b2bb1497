"""Checkpoints that are cut for ranks: vLLM's ranks load their own, and answer as one whole does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import group_config, weight_args

import ctconvert
from ctconvert.errors import UsageError

pytest.importorskip("vllm", reason="vLLM is not installed (tests/integration/environment.sh)")

from integration.checkpoints import LLAMA, QWEN3_MOE, write_pair
from integration.engine import serve

#: Largest differences of a log-probability: of sums, and of experts, where these weigh otherwise.
SUMS, ROUTED = 0.1, 0.3
ONE_HEAD = LLAMA | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "apart": (LLAMA, "cpu", {}),
    "fused": (LLAMA, "cuda-sm80", {"fuse": True}),
    "one head of keys": (ONE_HEAD, "triton", {"fuse": True}),
    "vocabulary": (LLAMA, "triton", {}),
    "experts": (QWEN3_MOE, "triton", {}),
    "stacked": (QWEN3_MOE, "cuda-sm80", {"fuse": True}),
    "whole experts": (QWEN3_MOE, "triton", {"expert_parallel": True}),
    "whole experts, stacked": (QWEN3_MOE, "triton", {"expert_parallel": True, "fuse": True}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, Path]]:
    """What two ranks say of each case's checkpoint, and the dense checkpoint beside it."""
    asked, references = [], []
    for case, (config, target, options) in CASES.items():
        folder = tmp_path_factory.mktemp("case")
        vocabulary = case == "vocabulary"
        group = group_config(weight_args(4, 32), ["Linear", "Embedding"] if vocabulary else None)
        source, reference = write_pair(
            folder, group, config | {"intermediate_size": 512}, vocabulary=vocabulary
        )
        out = folder / "out"
        ctconvert.repack(source, out, target=target, device="cpu", tensor_parallel=2, **options)
        more: dict[str, Any] = {"model_loader_extra_config": {"enable_weights_track": True}}
        if options.get("expert_parallel"):
            more |= {"enable_expert_parallel": True}
        asked.append((str(out), more))
        references.append(reference)
    script = Path(__file__).parent / "parallel.py"
    command = [sys.executable, script, json.dumps(asked)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[[")]
    answers = [torch.tensor(logprobs) for _, logprobs in lines]
    return dict(zip(CASES, zip(answers, references, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str, made: dict[str, tuple[torch.Tensor, Path]]) -> None:
    logprobs, reference = made[case]
    dense, _ = serve(reference)
    worst = (logprobs - dense.logprobs).abs().max().item()
    print(f"{case}: {worst:.4f} from the dense model's")
    assert worst < (ROUTED if CASES[case][0] is QWEN3_MOE else SUMS)
    assert dense.logprobs.std() > 5 * worst


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    source, _ = write_pair(tmp_path, group_config(weight_args(4, 32)))
    out = tmp_path / "out"
    ctconvert.repack(source, out, target="triton", device="cpu", tensor_parallel=2)
    with pytest.raises(UsageError, match="cut for 2 ranks, and vLLM has 1: use --tensor-parallel"):
        serve(out)
