"""Proving converted checkpoints by running them."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support.block_floats import (
    FP8,
    STATIC_FP8,
    fp8_group,
    mxfp8,
    mxfp8_group,
    nvfp4,
    nvfp4_group,
)
from support.builders import (
    DYNAMIC_INT8,
    config_of,
    expert_modules,
    experts,
    group_config,
    quantised,
    sparse24,
    weight_args,
    write_checkpoint,
)
from support.cli import run
from support.conversion import converted, converted_module, put_kernel
from support.schemes import FRESH, REAL

import ctconvert
from ctconvert.errors import VerificationError
from ctconvert.output import Output
from ctconvert.progress import Silent
from ctconvert.runtime import KernelExperts, benchmark, kernels, load, loading, proof
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
    return verify_kernels(Output.open(out), device, Silent()).runs


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


#: Layouts that no target prefers: the module they are tried with, and its config group.
BY_NAME: dict[str, tuple[Any, dict[str, Any]]] = {
    "humming int4": (quantised, group_config(weight_args(4, 64, False))),
    "humming int8": (quantised, group_config(weight_args(8, None))),
    "humming-nvfp4": (nvfp4, nvfp4_group()),
    "marlin-nvfp4": (nvfp4, nvfp4_group()),
    "marlin-nvfp4-f16": (nvfp4, nvfp4_group()),
    "marlin-fp8": (quantised, fp8_group(inputs=FP8)),
    "marlin-fp8 tensor": (quantised, fp8_group("tensor", inputs=STATIC_FP8)),
    "marlin-fp8 block": (quantised, fp8_group("block", block_structure=[128, 128])),
    "marlin-fp8-f16": (quantised, fp8_group("block", block_structure=[128, 128])),
    "marlin-mxfp8": (mxfp8, mxfp8_group()),
    "machete int4": (quantised, group_config(weight_args(4, 64, False))),
    "machete int8": (quantised, group_config(weight_args(8, None))),
    "w4a8-fp8": (quantised, group_config(weight_args(4, 128), inputs=FP8)),
    "cpu-w4a16": (quantised, group_config(weight_args(4, 64, False))),
    "cpu-w4a8": (quantised, group_config(weight_args(4, 64, False), inputs=DYNAMIC_INT8)),
    "cpu-w4a8 channel": (quantised, group_config(weight_args(4, None))),
    "cpu-int8": (
        quantised,
        group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8),
    ),
}
PLAIN = {"machete", "w4a8-fp8", "cpu-w4a16", "cpu-w4a8", "cpu-int8"}


def by_name(case: str, folder: Path, n: int = 200, k: int = 320) -> Path:
    """A module of N x K, which most layouts pad, in the layout that the case begins with."""
    make, group = BY_NAME[case]
    layout = case.split()[0]
    k = 384 if "128" in str(group["weights"]) else k
    made = make(n, k, group, 1) if make is quantised else make(n, k, 1)
    made["bias"] = torch.randn(n).bfloat16()
    layouts = {"model.down_proj": layout}
    return converted_module(made, config_of(group), "cuda", folder, layout=layouts)


@pytest.mark.parametrize("case", BY_NAME)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_layouts_by_name_agree_with_the_reference(case: str, device: str, tmp_path: Path) -> None:
    (found,) = prove(by_name(case, tmp_path), device)
    assert found.layout == case.split()[0]
    assert found.plain == (found.layout in PLAIN)
    assert 0 < found.worst_error <= found.tolerance


def test_a_layout_without_a_kernel_is_no_pass(tmp_path: Path) -> None:
    """What can be is proved, and the verb fails all the same."""
    group = nvfp4_group()
    tensors = {
        f"model.{name}.{local}": value
        for name in ("up_proj", "down_proj")
        for local, value in nvfp4(128, 64).items()
    }
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    out = tmp_path / "out"
    layouts = {"*.up_proj": "nvfp4-cutlass", "*.down_proj": "marlin-nvfp4"}
    ctconvert.repack(source, out, target="cuda", device="cpu", layout=layouts)
    proved = verify_kernels(Output.open(out), "cpu", Silent())
    assert proved.missing == {"nvfp4-cutlass": 1}
    assert [(run.layout, run.modules) for run in proved.runs] == [("marlin-nvfp4", 1)]
    code, shown, err = run("verify", out, "--kernels", "--device", "cpu")
    assert code == 1
    assert "ok, 1 marlin-nvfp4 kernels" in shown and "ok, 1 nvfp4-cutlass" not in shown
    assert err.splitlines()[-1].startswith(f"error: {out}: 1 of nvfp4-cutlass modules were not run")
    code, shown, _ = run("verify", out, "--kernels", "--device", "cpu", "--json")
    found = json.loads(shown)
    assert code == 1 and found["ok"] is False and found["without_kernel"] == {"nvfp4-cutlass": 1}
    assert run("verify", out, "--against", source).code == 0


def test_a_plain_path_is_called_one(tmp_path: Path) -> None:
    out = by_name("cpu-w4a16", tmp_path)
    _, shown, _ = run("verify", out, "--kernels", "--device", "cpu")
    assert "ok, 1 cpu-w4a16 modules in plain torch, for want of the kernel, within" in shown
    _, shown, _ = run("bench", out, "--device", "cpu", "--m", "1")
    assert "note: cpu-w4a16 is a path in plain torch here" in shown


#: Configs of 3-D experts that the cuda target gives a layout with a grouped kernel.
EXPERTS = {
    "marlin": group_config(weight_args(4, 32, False), ["re:.*experts.*"]),
    "marlin-mxfp4": group_config(
        weight_args(4, 32, kind="float"), ["re:.*experts.*"], "mxfp4-pack-quantized"
    ),
}


@pytest.mark.parametrize("layout", EXPERTS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_stacked_experts_run_together_and_one_by_one(
    layout: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    source = write_checkpoint(
        tmp_path / "in", experts(name, 40, 96, EXPERTS[layout], 4), config_of(EXPERTS[layout])
    )
    out = tmp_path / "out"
    ctconvert.repack(source, out, target="cuda", device="cpu")
    loaded = load(out, device)
    assert list(loaded) == [*(f"{name}.{index}" for index in range(4)), name]
    stack = loaded[name]
    assert isinstance(stack, KernelExperts) and stack.experts == 4
    counts = {run.layout: run.modules for run in prove(out, device)}
    assert counts == {layout: 4, f"{layout} grouped": 1}
    measured = benchmark.bench(out, device, (1, 8)).rows if device == "cuda" else []
    assert {row.layout for row in measured} <= {layout, f"{layout} grouped"}

    right = kernels.get(layout).grouped(stack.binding.spec)
    assert right is not None

    def mixed(bound: Any, held: Any, *args: Any) -> torch.Tensor:
        """Every expert's rows meet another's weight."""
        return right(bound, {local: one.roll(1, 0) for local, one in held.items()}, *args)

    put_kernel(monkeypatch, layout, grouped=lambda spec: mixed)
    with pytest.raises(VerificationError, match=f"the {layout} grouped kernel is off by"):
        prove(out, device)


def expert_by_expert(case: str) -> dict[str, torch.Tensor]:
    """Three experts' gate, up and down; their size is one that layouts pad, where that can be."""
    make, group = BY_NAME[case]
    size = {"marlin-fp8-f16": 256, "marlin-mxfp8": 96}.get(case, 80)
    if make is quantised:
        return expert_modules("model.mlp", group, (size, 128))
    tensors = {}
    for number in range(9):
        expert, leaf = divmod(number, 3)
        made = make(*((128, size) if leaf == 2 else (size, 128)), number)
        for local in ("weight_global_scale", "input_global_scale"):
            if local in made:  # one for gate and up, another for every expert
                made[local] = torch.full((1,), 500.0 + expert)
        name = f"model.mlp.experts.{expert}.{('w1', 'w3', 'w2')[leaf]}"
        tensors |= {f"{name}.{local}": value for local, value in made.items()}
    return tensors


@pytest.mark.parametrize(
    "case", ["marlin-nvfp4", "marlin-fp8", "marlin-fp8-f16", "marlin-mxfp8", "humming int8"]
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_experts_stacked_by_fuse_run_together(case: str, device: str, tmp_path: Path) -> None:
    layout = case.split()[0]
    config = config_of(BY_NAME[case][1])
    source = write_checkpoint(tmp_path / "in", expert_by_expert(case), config)
    out = tmp_path / "out"
    ctconvert.repack(source, out, target="cuda", device="cpu", fuse=True, layout={"*": layout})
    found = {run.layout: run for run in prove(out, device)}
    assert {name: run.modules for name, run in found.items()} == {
        layout: 6,
        f"{layout} grouped": 2,
    }


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
