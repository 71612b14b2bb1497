"""vLLM's CPU build runs converted checkpoints: as it runs the source, or the dense weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import DYNAMIC_INT8, group_config, weight_args

import ctconvert

pytest.importorskip("vllm", reason="vLLM is not installed (tests/integration/environment.sh)")

from integration.checkpoints import LLAMA, QWEN3_MOE, write_pair
from integration.engine import Answer, serve

#: Config groups, with the op of vLLM's that runs the source where there is one on any CPU.
SCHEMES: dict[str, tuple[dict[str, Any], str | None]] = {
    "w4a16": (group_config(weight_args(4, 64)), "cpu_gemm_wna16"),
    "w4a16 asym": (group_config(weight_args(4, 32, False)), "cpu_gemm_wna16"),
    "w4a8": (group_config(weight_args(4, 64), inputs=DYNAMIC_INT8), "int4_scaled_mm_cpu"),
    "w8a8": (
        group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8),
        "onednn_scaled_mm",
    ),
    "w8a16": (group_config(weight_args(8, 128)), None),
}
#: The largest difference of a log-probability from the dense model's, whose weights are the same
#: numbers: rounding of sums, and with activations of 8 bits what quantising them does.
TOLERANCE = {"w4a8": 0.6, "w8a8": 0.6}
SUMS = 0.1
#: The same of experts, which a rounding may weigh otherwise.
ROUTED = 0.3


@pytest.fixture(scope="module", params=SCHEMES)
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Answer]:
    """A scheme, its checkpoint, and the answer of the dense model."""
    source, dense = write_pair(tmp_path_factory.mktemp("pair"), SCHEMES[request.param][0])
    return request.param, source, serve(dense)[0]


def pointers(model: torch.nn.Module) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters()}


@pytest.mark.parametrize("target", ["cpu", "triton"])
@pytest.mark.parametrize("fuse", [False, True], ids=["apart", "fused"])
def test_dense_models(
    pair: tuple[str, Path, Answer], target: str, fuse: bool, tmp_path: Path
) -> None:
    scheme, source, dense = pair
    if scheme == "w8a16" and target == "cpu":
        pytest.skip("the target has no 8-bit weight-only layout")
    if fuse and scheme not in ("w4a16", "w8a8"):
        pytest.skip("tried with other schemes")
    ctconvert.repack(source, tmp_path / "out", target=target, fuse=fuse, device="cpu")
    answer, _ = serve(tmp_path / "out", model_loader_extra_config={"enable_weights_track": True})
    worst = (answer.logprobs - dense.logprobs).abs().max().item()
    print(f"{scheme} for {target}: {worst:.4f} from the dense model's")
    assert worst < TOLERANCE.get(scheme, SUMS)
    assert dense.logprobs.std() > 5 * worst  # a wrong weight would be seen
    op = SCHEMES[scheme][1]
    if op is None or target != "cpu" or not hasattr(torch.ops._C, op):
        return
    stock, _ = serve(source)
    apart = (answer.logprobs - stock.logprobs).abs().max().item()
    print(f"{scheme} for {target}: {apart:.2g} from stock vLLM's")
    if scheme == "w8a8" and not torch.cpu._is_amx_tile_supported():
        # Stock has another kernel here, whose sums saturate where the CPU has no VNNI.
        assert apart < SUMS or not torch.cpu._is_vnni_supported()
        return
    assert answer.tokens == stock.tokens
    assert apart < 1e-6


#: Config groups of experts, and the layouts' targets they are converted for.
EXPERTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "w4a16": (group_config(weight_args(4, 64)), ("cpu", "triton", "cuda-sm80")),
    "w8a8": (SCHEMES["w8a8"][0], ("cpu", "triton")),
}


@pytest.mark.parametrize("scheme", EXPERTS)
def test_experts(scheme: str, tmp_path: Path) -> None:
    group, targets = EXPERTS[scheme]
    source, reference = write_pair(tmp_path, group, QWEN3_MOE)
    dense, _ = serve(reference)
    for target in targets:
        for fuse in (False, True):
            out = tmp_path / f"{target}-{fuse}"
            ctconvert.repack(source, out, target=target, fuse=fuse, device="cpu")
            answer, _ = serve(out, model_loader_extra_config={"enable_weights_track": True})
            worst = (answer.logprobs - dense.logprobs).abs().max().item()
            print(f"{scheme} experts for {target}, fused {fuse}: {worst:.4f}")
            assert worst < TOLERANCE.get(scheme, ROUTED)


@pytest.mark.parametrize(
    "config, target, fuse",
    [(LLAMA, "cpu", False), (LLAMA, "cuda-sm80", True), (QWEN3_MOE, "triton", True)],
    ids=["llama-cpu", "llama-marlin-fused", "experts-triton-fused"],
)
def test_two_ranks(config: dict[str, Any], target: str, fuse: bool, tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32))
    source, _ = write_pair(tmp_path, group, config | {"intermediate_size": 512})
    ctconvert.repack(source, tmp_path / "out", target=target, fuse=fuse, device="cpu")
    alone, _ = serve(tmp_path / "out")
    script = Path(__file__).parent / "parallel.py"
    run = subprocess.run(
        [sys.executable, script, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("[["))
    logprobs = torch.tensor(json.loads(line)[1])
    worst = (logprobs - alone.logprobs).abs().max().item()
    print(f"two ranks for {target}: {worst:.4f} from one")
    assert worst < (SUMS if config is LLAMA else ROUTED)
    assert alone.logprobs.std() > 5 * worst


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_quantised_vocabularies(tied: bool, tmp_path: Path) -> None:
    group = group_config(weight_args(4, 64), targets=["Linear", "Embedding"])
    source, reference = write_pair(
        tmp_path, group, LLAMA | {"tie_word_embeddings": tied}, vocabulary=True
    )
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    dense, _ = serve(reference)
    answer, _ = serve(tmp_path / "out", model_loader_extra_config={"enable_weights_track": True})
    worst = (answer.logprobs - dense.logprobs).abs().max().item()
    assert worst < SUMS
    assert dense.logprobs.std() > 5 * worst
