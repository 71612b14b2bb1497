"""vLLM on a GPU runs converted checkpoints as it runs their sources, or the dense weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file
from support.block_floats import nvfp4_group
from support.builders import (
    DYNAMIC_INT8,
    config_of,
    group_config,
    weight_args,
    write_checkpoint,
)

import ctconvert

pytest.importorskip("vllm", reason="vLLM is not installed (tests/integration/environment.sh)")

from integration.checkpoints import LLAMA, QWEN3_MOE, write_pair
from integration.engine import Answer, serve

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
#: Attention needs no library. A cache of a known size: to find one, vLLM measures the GPU's free
#: memory, which the engine before this one may be giving back meanwhile.
OPTIONS: dict[str, Any] = {
    "attention_config": {"backend": "TRITON_ATTN"},
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 1 << 28,
    "model_loader_extra_config": {"enable_weights_track": True},
}
#: The largest difference of a log-probability: rounding of sums, and with activations of 8 bits
#: what quantising them does; experts may be weighed otherwise after a rounding.
SUMS, EIGHT, ROUTED = 0.1, 0.7, 0.3
DYNAMIC_FP8 = DYNAMIC_INT8 | {"type": "float"}


class Case(NamedTuple):
    """A config group, the layout it is converted to, whose kernel must run it, and whether stock
    vLLM picks the same one on SM90, which then gives the same tokens."""

    group: dict[str, Any]
    layout: str
    by: str
    same: bool = False
    tolerance: float = SUMS


W4 = group_config(weight_args(4, 64))
FP8 = group_config(weight_args(8, None, kind="float"), format="float-quantized", inputs=DYNAMIC_FP8)
CASES = {
    "w4a16 marlin": Case(W4, "marlin", "vLLM's marlin_gemm"),
    "w4a16 machete": Case(W4, "machete", "vLLM's machete_mm", True),
    "w4a16 triton": Case(W4, "triton-wna16", "vLLM's triton_w4a16_gemm"),
    "w4a16 asym": Case(
        group_config(weight_args(4, 32, False)), "marlin", "vLLM's marlin_gemm", True
    ),
    "fp8 scaled-mm": Case(FP8, "scaled-mm", "vLLM's cutlass_scaled_mm", True, EIGHT),
    "fp8 marlin": Case(FP8, "marlin-fp8", "vLLM's marlin_gemm", False, EIGHT),
    "int8": Case(
        group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8),
        "scaled-mm",
        "vLLM's cutlass_scaled_mm",
        True,
        EIGHT,
    ),
    "mxfp4": Case(
        group_config(
            weight_args(4, 32, kind="float", scale_dtype="torch.uint8"),
            format="mxfp4-pack-quantized",
        ),
        "marlin-mxfp4",
        "vLLM's marlin_gemm",
        True,
    ),
}


def runs_by(model: torch.nn.Module) -> list[str]:
    """Whose kernels run the converted layers."""
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    found = {getattr(method, "by", None) for method in methods}
    found |= {getattr(getattr(method, "running", None), "by", None) for method in methods}
    return sorted(found - {None})


def compare(case: str, made: Answer, other: Answer, tolerance: float, same: bool) -> None:
    worst = (made.logprobs - other.logprobs).abs().max().item()
    agree = made.tokens == other.tokens
    print(f"{case}: log-probabilities {worst:.2g} apart, tokens {'equal' if agree else 'differ'}")
    assert worst < tolerance
    assert other.logprobs.std() > 2 * worst  # a wrong weight would be seen
    assert agree or not same


def convert(source: Path, out: Path, layout: str, **options: Any) -> Path:
    ctconvert.repack(source, out, target="cuda", layout={"*": layout}, device="cpu", **options)
    return out


@pytest.mark.parametrize("case", CASES)
def test_dense_models(case: str, tmp_path: Path) -> None:
    group, layout, by, same, tolerance = CASES[case]
    source, dense = write_pair(tmp_path, group)
    # Machete's padded rows are joined by the converter; for one rank either way is the same.
    out = convert(source, tmp_path / "out", layout, fuse=True)
    made, found = serve(out, runs_by, **OPTIONS)
    assert found == [[by]]
    stock, _ = serve(source, **OPTIONS)
    compare(f"{case} beside stock", made, stock, tolerance, same)
    compare(f"{case} beside dense", made, serve(dense, **OPTIONS)[0], tolerance, False)


def test_parts_that_vllm_joins(tmp_path: Path) -> None:
    source, _ = write_pair(tmp_path, W4)
    apart, _ = serve(convert(source, tmp_path / "apart", "marlin"), **OPTIONS)
    fused, _ = serve(convert(source, tmp_path / "fused", "marlin", fuse=True), **OPTIONS)
    assert apart.tokens == fused.tokens
    assert torch.equal(apart.logprobs, fused.logprobs)


def test_own_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = write_pair(tmp_path, W4)
    out = convert(source, tmp_path / "out", "marlin")
    theirs, _ = serve(out, **OPTIONS)
    monkeypatch.setenv("CTCONVERT_VLLM_KERNELS", "own")
    ours, found = serve(out, runs_by, **OPTIONS)
    assert found == [["ctconvert"]]
    compare("own kernels beside vLLM's", ours, theirs, SUMS, False)


def test_compiled_and_captured(tmp_path: Path) -> None:
    source, _ = write_pair(tmp_path, W4)
    out = convert(source, tmp_path / "out", "marlin")
    eager, _ = serve(out, **OPTIONS)
    made, _ = serve(out, **OPTIONS | {"enforce_eager": False})
    compare("captured beside eager", made, eager, SUMS, False)


#: What a dense weight [N, K] is stored as, by local name, and the dense weight that means.
Stored = tuple[dict[str, torch.Tensor], torch.Tensor]


def sparse24(weight: torch.Tensor) -> Stored:
    """The two largest of every four, as ``sparse-24-bitmask``, which no compressor writes now."""
    n, k = weight.shape
    order = weight.float().abs().reshape(n, k // 4, 4).argsort(-1, descending=True)
    mask = torch.zeros(order.shape, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    mask = mask.reshape(n, k)
    bits = mask.reshape(n, -1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
    stored = {
        "compressed": weight[mask].reshape(n, k // 2),
        "bitmask": bits.sum(-1).to(torch.uint8),
        "shape": torch.tensor([[n], [k]]),
    }
    return stored, weight * mask


def nvfp4(weight: torch.Tensor) -> Stored:
    """As the compressor makes it, with one factor for all: vLLM joins parts with equal ones."""
    group, divisor = nvfp4_group(False), torch.tensor([256.0])
    greatest = weight.float().abs().reshape(len(weight), -1, 16).amax(-1)
    scale = (greatest / 6 * divisor).clamp(min=2.0**-6).to(torch.float8_e4m3fn).float()
    scheme = QuantizationScheme.model_validate(group)
    codec = BaseCompressor.get_value_from_registry(group["format"])
    state = {"weight": weight.float(), "weight_scale": scale, "weight_global_scale": divisor}
    stored = codec.compress(state, scheme)
    return stored, codec.decompress(dict(stored), scheme)["weight"].detach().bfloat16()


def rewritten(
    folder: Path, change: Callable[[torch.Tensor], Stored], config: dict[str, Any]
) -> tuple[Path, Path]:
    """A checkpoint whose linear weights are stored otherwise, and the dense one it means."""
    _, dense = write_pair(folder, W4)
    kept: dict[str, torch.Tensor] = {}
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        kept[name] = stored[name] = tensor
        if name.endswith("_proj.weight"):
            made, kept[name] = change(stored.pop(name))
            prefix = name.removesuffix("weight")
            stored |= {f"{prefix}{local}": one.contiguous() for local, one in made.items()}
    source = write_checkpoint(folder / "stored", stored, config, **LLAMA)
    return source, write_checkpoint(folder / "kept", kept, None, **LLAMA)


def test_sparse24(tmp_path: Path) -> None:
    """Stock vLLM runs no 2:4 weights: the dense model stands for it."""
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": ["lm_head"]}
    config = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    source, dense = rewritten(tmp_path, sparse24, config)
    out = tmp_path / "out"
    ctconvert.repack(source, out, target="cuda", fuse=True, device="cpu")
    made, found = serve(out, runs_by, **OPTIONS)
    assert found == [["ctconvert"]]
    compare("2:4 beside dense", made, serve(dense, **OPTIONS)[0], SUMS, False)


def test_nvfp4(tmp_path: Path) -> None:
    source, dense = rewritten(tmp_path, nvfp4, config_of(nvfp4_group(False)))
    out = convert(source, tmp_path / "out", "marlin-nvfp4", fuse=True)
    made, found = serve(out, runs_by, **OPTIONS)
    assert found == [["vLLM's marlin_gemm"]]
    compare("nvfp4 beside stock", made, serve(source, **OPTIONS)[0], SUMS, True)
    compare("nvfp4 beside dense", made, serve(dense, **OPTIONS)[0], SUMS, False)


@pytest.mark.parametrize("fuse", [False, True], ids=["apart", "stacked"])
def test_experts(fuse: bool, tmp_path: Path) -> None:
    source, dense = write_pair(tmp_path, W4, QWEN3_MOE)
    out = convert(source, tmp_path / "out", "marlin", fuse=fuse)
    made, found = serve(out, runs_by, **OPTIONS)
    assert found == [["vLLM's fused_marlin_moe", "vLLM's marlin_gemm"]]
    stock, _ = serve(source, **OPTIONS)
    compare("experts beside stock", made, stock, ROUTED, False)
    compare("experts beside dense", made, serve(dense, **OPTIONS)[0], ROUTED, False)
