"""vLLM's compiled ops on a GPU, each on weights that this package made, against the reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.block_floats import mxfp8, mxfp8_group, nvfp4, nvfp4_group
from support.builders import (
    DYNAMIC_INT8,
    STATIC_INT8,
    config_of,
    group_config,
    module,
    quantised,
    weight_args,
    write_checkpoint,
)

import ctconvert
from ctconvert import layouts
from ctconvert.assembly import padded
from ctconvert.runtime import kernels
from ctconvert.runtime.loading import Loader
from ctconvert.transforms.dense import dense_weight

pytest.importorskip("vllm", reason="vLLM is not installed (tests/integration/environment.sh)")

from vllm import _custom_ops  # noqa: F401 (loads the ops)

from ctconvert.integrations.vllm import engine
from ctconvert.integrations.vllm.running import Running

pytestmark = pytest.mark.gpu
NAME, N, K = "model.layers.0.mlp.down_proj", 320, 512
ROWS = (1, 17, 300)
DYNAMIC_FP8 = DYNAMIC_INT8 | {"type": "float"}
STATIC_FP8 = STATIC_INT8 | {"type": "float"}
FLOAT8 = weight_args(8, None, kind="float")


def int8(**inputs: Any) -> dict[str, Any]:
    given = DYNAMIC_INT8 | inputs
    return group_config(weight_args(8, None), format="int-quantized", inputs=given)


def fp8(inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    given = None if inputs is None else dict(inputs)
    return group_config(FLOAT8, format="float-quantized", inputs=given)


#: A result and its bias rounded to bfloat16 one after the other.
BF16 = 3e-2
#: A layout, a config group, the op it must run on, and the largest error of a result over the
#: norm of what is summed: the op's own rounding of 16-bit weights, or of FP8 sums.
CASES: dict[str, tuple[str, dict[str, Any], str, float]] = {
    "marlin int4": ("marlin", group_config(weight_args(4, 64)), "marlin_gemm", BF16),
    "marlin int4 g128": ("marlin", group_config(weight_args(4, 128)), "marlin_gemm", BF16),
    "marlin int4 channel": ("marlin", group_config(weight_args(4, None)), "marlin_gemm", BF16),
    "marlin int4 asym": ("marlin", group_config(weight_args(4, 32, False)), "marlin_gemm", BF16),
    "marlin int8": ("marlin", group_config(weight_args(8, 128)), "marlin_gemm", BF16),
    "marlin mxfp4": (
        "marlin-mxfp4",
        group_config(
            weight_args(4, 32, kind="float", scale_dtype="torch.uint8"),
            format="mxfp4-pack-quantized",
        ),
        "marlin_gemm",
        BF16,
    ),
    "marlin nvfp4": ("marlin-nvfp4", nvfp4_group(False), "marlin_gemm", BF16),
    "marlin mxfp8": ("marlin-mxfp8", mxfp8_group(), "marlin_gemm", BF16),
    "marlin fp8": ("marlin-fp8", fp8(None), "marlin_gemm", BF16),
    "machete int4": ("machete", group_config(weight_args(4, 64)), "machete_mm", BF16),
    "machete int4 channel": ("machete", group_config(weight_args(4, None)), "machete_mm", BF16),
    "machete int4 asym": ("machete", group_config(weight_args(4, 128, False)), "machete_mm", 4e-2),
    "machete int8": ("machete", group_config(weight_args(8, 128)), "machete_mm", BF16),
    "triton int4": ("triton-wna16", group_config(weight_args(4, 64)), "triton_w4a16_gemm", BF16),
    "triton int4 asym": (
        "triton-wna16",
        group_config(weight_args(4, 32, False)),
        "triton_w4a16_gemm",
        BF16,
    ),
    "int8 dynamic": ("scaled-mm", int8(), "cutlass_scaled_mm", 3e-2),
    "int8 dynamic asym": ("scaled-mm", int8(symmetric=False), "cutlass_scaled_mm_azp", BF16),
    "int8 static": (
        "scaled-mm",
        int8(dynamic=False, strategy="tensor"),
        "cutlass_scaled_mm",
        BF16,
    ),
    "fp8 dynamic": ("scaled-mm", fp8(DYNAMIC_FP8), "cutlass_scaled_mm", 3e-2),
    "fp8 static": ("scaled-mm", fp8(STATIC_FP8), "cutlass_scaled_mm", 3e-2),
    "w4a8 fp8": (
        "w4a8-fp8",
        group_config(weight_args(4, 128), inputs=DYNAMIC_FP8),
        "cutlass_w4a8_mm",
        0.2,
    ),
}


def converted(folder: Path, layout: str, group: dict[str, Any]) -> Path:
    """A checkpoint of one module, in a layout."""
    others = {"nvfp4-pack-quantized": nvfp4(N, K, 7, False), "mxfp8-quantized": mxfp8(N, K, 7)}
    made = others.get(group["format"]) or quantised(N, K, group, 7)
    tensors = module(NAME, made)
    source = write_checkpoint(folder / "source", tensors, config_of(group))
    out = folder / "out"
    ctconvert.repack(source, out, target="cuda-sm90", layout={"*": layout}, device="cpu")
    return out


def asymmetric(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] as INT8 with a scale and a zero point a token, float64."""
    wide = x.float()
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    scale = (high - low) / wide.new_tensor(255.0)
    zero = (-128 - low / scale).round()
    codes = ((wide / scale).round() + zero).clamp(-128, 127)
    return (codes - zero).double() * scale.double()


@pytest.mark.parametrize("case", CASES)
def test_an_op_computes_what_the_layout_means(case: str, tmp_path: Path) -> None:
    layout, group, op, tolerance = CASES[case]
    out = converted(tmp_path, layout, group)
    with Loader(out, "cpu") as loader:
        bound = loader.bindings[NAME]
    stored = load_file(out / "model.safetensors")
    host = {name.removeprefix(f"{NAME}."): tensor for name, tensor in stored.items()}
    running = Running(NAME, bound, torch.bfloat16)
    if running.engine is None:
        pytest.skip(f"this build of vLLM, or this GPU, has no {op}")
    assert running.by == f"vLLM's {op}"
    kernel = running.kernel or kernels.find(layout)
    found = layouts.get(layout)
    assert found is not None and kernel is not None
    read = host | {name: torch.zeros_like(host[name]) for name in kernel.lost}
    plain = found.decode(read, padded(bound.spec, *bound.padded))
    weight = dense_weight(plain)[:N, :K].double()
    tensors = {name: tensor.cuda() for name, tensor in host.items()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    running.prepare(tensors)
    for rows in ROWS:
        torch.manual_seed(rows)
        x = torch.randn(rows, K).bfloat16()
        bias = torch.randn(N).bfloat16()
        poison = torch.full((rows, N), float("nan"), dtype=torch.bfloat16, device="cuda")
        del poison  # the op's own result may get this memory
        made = running(tensors, x.cuda(), bias.cuda()).cpu().double()
        if "azp_adj" in host:  # our own kernel takes such activations as symmetric
            taken = asymmetric(x)
        else:
            taken = kernel.activations(bound.spec, host, x)
        expected = taken @ weight.t() + bias.double()
        near = (taken.square() @ weight.square().t()).sqrt() + bias.double().abs()
        worst = ((made - expected).abs() / near).max().item()
        print(f"{case} M={rows}: {worst:.2e}")
        assert worst <= tolerance
    for name, tensor in tensors.items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name


def test_own_and_engines_kernels_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = converted(tmp_path, "marlin", group_config(weight_args(4, 64)))
    with Loader(out, "cpu") as loader:
        bound = loader.bindings[NAME]
    stored = load_file(out / "model.safetensors", device="cuda")
    tensors = {name.removeprefix(f"{NAME}."): tensor for name, tensor in stored.items()}
    theirs = Running(NAME, bound, torch.bfloat16)
    if theirs.engine is None:
        pytest.skip("this build of vLLM, or this GPU, has no marlin_gemm")
    theirs.prepare(tensors)
    monkeypatch.setenv(engine.KERNELS, "own")
    ours = Running(NAME, bound, torch.bfloat16)
    ours.prepare(tensors)
    assert ours.by == "ctconvert"
    x = torch.randn(17, K, dtype=torch.bfloat16, device="cuda")
    one, two = theirs(tensors, x, None), ours(tensors, x, None)
    assert (one - two).float().abs().max() <= 2e-2 * two.float().abs().max()
