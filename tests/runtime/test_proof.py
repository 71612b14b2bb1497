"""Proving converted checkpoints by running them."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import config_of, group_config, quantised, sparse24, weight_args
from support.cli import run
from support.conversion import converted, converted_module, put_kernel
from support.schemes import FRESH, REAL

from ctconvert.errors import VerificationError
from ctconvert.output import Output
from ctconvert.progress import Silent
from ctconvert.runtime import kernels, load, loading, proof
from ctconvert.runtime.proof import KernelRun, verify_kernels

#: One real checkpoint a layout; the slow ones of them are left to the GPU.
ONE_EACH = (
    ("smol-w4a16-g32-asym", "triton", "triton-wna16"),
    ("smol-w4a16-g32-asym", "cuda", "marlin"),
    ("smol-mxfp4a16", "cuda", "marlin-mxfp4"),
    ("old071-smol-sparse24-fp8-dynamic-channel", "cuda", "cutlass-sparse24"),
    ("old071-smol-sparse24-bf16", "cuda", "cutlass-sparse24"),
    ("smol-w4a8-int8dyn-g32-packed", "xpu", "xpu-w4a8"),
    ("smol-w4a8o8-pack-static", "xpu", "xpu-w4a16"),
    ("smol-w4-embed-head-g64", "triton", "gather"),
)


def prove(out: Path, device: str = "cpu") -> tuple[KernelRun, ...]:
    return verify_kernels(Output.open(out), device, Silent())


@pytest.mark.parametrize(("name", "target", "layout"), ONE_EACH)
def test_kernels_agree_with_the_reference(
    name: str, target: str, layout: str, tmp_path: Path
) -> None:
    out = converted(name, target, tmp_path)
    found = {run.layout: run for run in prove(out)}[layout]
    assert found.modules > 0
    assert found.worst_error <= found.tolerance == kernels.get(layout).tolerance
    assert found.module and found.case


@pytest.mark.parametrize(
    "name", [name for name, (_, layouts) in FRESH.items() if layouts.get("triton") == {"scaled-mm"}]
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_w8a8_kernels_agree_with_the_reference(name: str, device: str, tmp_path: Path) -> None:
    group, _ = FRESH[name]
    made = quantised(192, 256, group, 1)
    (found,) = prove(converted_module(made, config_of(group), "triton", tmp_path), device)
    assert found.layout == "scaled-mm"


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("fuse", [False, True])
def test_kernels_agree_with_the_reference_on_the_gpu(
    name: str, fuse: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if "sparse24" in name:
        request.getfixturevalue("cutlass")
    for target, layouts in REAL[name].items():
        if all(layout in {kernel.layout for kernel in kernels.KERNELS} for layout in layouts):
            out = converted(name, target, tmp_path / target, fuse=fuse)
            assert {run.layout for run in prove(out, "cuda")} == layouts


def test_a_wrong_kernel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = converted("smol-w4a16-g32-asym", "triton", tmp_path)
    right = kernels.get("triton-wna16").run

    def wrong(*args: Any) -> torch.Tensor:
        y = right(*args)
        y[..., 7] = 0  # one column of many
        return y

    put_kernel(monkeypatch, "triton-wna16", wrong)
    with pytest.raises(VerificationError, match=r"triton-wna16 kernel is off by"):
        prove(out)
    code, _, err = run("verify", out, "--kernels", "--device", "cpu")
    assert code == 1
    assert "off by" in err


@pytest.mark.parametrize("wrong", [1.0, float("nan")])
def test_a_wrong_output_quantisation_is_found(
    wrong: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right sums, but the quantised result a step off, or no number."""
    out = converted("smol-w8a8o8-static-sym", "triton", tmp_path)
    prove(out)
    right = kernels.get("triton-wna16").run

    def off(binding: Any, tensors: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
        y = right(binding, tensors, x, bias)
        if "output_scale" in tensors:
            y[..., 0] += wrong * tensors["output_scale"].to(y.dtype)
            y[0] += wrong * tensors["output_scale"].to(y.dtype)
        return y

    put_kernel(monkeypatch, "triton-wna16", off)
    with pytest.raises(VerificationError, match=r"triton-wna16 kernel is off by"):
        prove(out)


def test_one_token_of_one_sequence_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A binding may go wrong only on the shape [1, 1, K] that a model decodes with."""
    out = converted("smol-w4a16-g64-sym", "triton", tmp_path)
    right = kernels.get("triton-wna16").run

    def wrong(binding: Any, tensors: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
        return right(binding, tensors, x, bias) * (2 if x.shape[:-1] == (1, 1) else 1)

    put_kernel(monkeypatch, "triton-wna16", wrong)
    with pytest.raises(VerificationError, match=r"off by .* \(random M=1\)"):
        prove(out)


@pytest.mark.parametrize("axis", [0, 1])
def test_one_wrong_row_or_column_of_many_is_seen(axis: int) -> None:
    """Nothing to see in the norm of the whole: 1 of 30000 columns."""
    torch.manual_seed(0)
    expected = torch.randn(64, 30000).double()
    made = expected.bfloat16().double()
    assert 1e-4 < proof._error(made, expected, expected) < 1e-2
    made.select(1 - axis, 17).zero_()
    assert (made - expected).norm() / expected.norm() < 0.2
    assert proof._error(made, expected, expected) > 0.9


def test_what_is_too_large_for_the_result_is_not_an_error(tmp_path: Path) -> None:
    """float16 results past 65504 are infinite, as they should be."""
    group = group_config(weight_args(4, 64))
    made = quantised(64, 2048, group, 1, scale_dtype=torch.float16)
    made["weight_scale"] = torch.full_like(made["weight_scale"], 0.5)
    for target in ("triton", "cuda"):
        prove(converted_module(made, config_of(group), target, tmp_path / target))


@pytest.mark.parametrize("kind", ["int4", "mxfp4", "fp8", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_bias_of_any_dtype(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    group = {
        "int4": group_config(weight_args(4, 64)),
        "mxfp4": group_config(weight_args(4, 32, kind="float"), format="mxfp4-pack-quantized"),
        "fp8": group_config(weight_args(8, None, kind="float"), format="float-quantized"),
        "2:4": {"weights": None},
    }[kind]
    config = config_of(group) if kind != "2:4" else {"quant_method": "compressed-tensors"}
    if kind == "2:4":
        config["sparsity_config"] = {
            "format": "sparse-24-bitmask",
            "targets": ["Linear"],
            "ignore": ["lm_head"],
        }
        made = sparse24(192, 256, group, 1, torch.bfloat16)
    else:
        made = quantised(192, 256, group, 1)
    made["bias"] = torch.randn(192).to(dtype)
    out = converted_module(made, config, "cuda", tmp_path)
    prove(out)
    module = load(out, "cpu")["model.down_proj"]
    x = torch.zeros(1, 1, 256, dtype=torch.bfloat16)
    assert torch.equal(module(x)[0, 0], made["bias"].bfloat16())


def test_kernels_are_verified_one_module_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many modules there are, only the last one is held while the next is read."""
    out = converted("smol-w4a16-g64-sym", "triton", tmp_path)
    alive: list[weakref.ref[Any]] = []
    most = 0
    right = loading.Loader.modules

    def watched(self: loading.Loader, name: str) -> loading.Modules:
        nonlocal most
        most = max(most, sum(one() is not None for one in alive))
        made = right(self, name)
        alive.extend(map(weakref.ref, made.values()))
        return made

    monkeypatch.setattr(loading.Loader, "modules", watched)
    prove(out)
    assert len(alive) >= 3
    assert most <= 1
