"""Experts stacked: the tensors of an engine, and the way back to the source's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.block_floats import FP8, fp8_group, mxfp8, mxfp8_group, nvfp4, nvfp4_group
from support.builders import (
    DYNAMIC_INT8,
    STATIC_INT8,
    config_of,
    expert_modules,
    group_config,
    module,
    quantised,
    sparse24,
    weight_args,
    write_checkpoint,
)
from support.cli import run
from support.naive import GOLDEN, codes_of, marlin_scales, marlin_tiles, padded, words_of
from support.reference import load_tensors
from support.roundtrip import check_restored, convert_and_back

import ctconvert
from ctconvert import layouts
from ctconvert.errors import BadInputError
from ctconvert.records import Manifest
from ctconvert.runtime import load
from ctconvert.store.local import LocalStore

Tensors = dict[str, torch.Tensor]
BLOCK = "model.layers.0.mlp.experts"
LEAVES = ("gate_proj", "up_proj", "down_proj")
#: Three experts; the size between the projections is no multiple of a tile.
EXPERTS, SIZE, HIDDEN = 3, 96, 256


# --- what the engine's own code makes ------------------------------------------------------------


@pytest.mark.parametrize("case", ["b4.N128.G-1", "b4.N96.G32", "b8.N64.G64"])
def test_the_tensors_are_the_engines_own(case: str, tmp_path: Path) -> None:
    """vLLM's preparation of fused experts for its Marlin kernel, on a GPU."""
    prefix = f"moe_marlin.{case}."
    golden = {
        name.removeprefix(prefix): tensor
        for name, tensor in load_file(GOLDEN / "marlin_moe.safetensors").items()
        if name.startswith(prefix)
    }
    bits, group = int(case[1]), int(case.partition("G")[2])
    tensors: Tensors = {}
    for number in range(len(golden["w1"])):
        for leaf, name in zip(LEAVES, "132", strict=True):
            codes = golden[f"w{name}"][number]
            made = {
                "weight_packed": words_of(codes.numpy(), bits),
                "weight_scale": golden[f"s{name}"][number].contiguous(),
                "weight_shape": torch.tensor(codes.shape),
            }
            tensors |= module(f"{BLOCK}.{number}.{leaf}", made)
    config = config_of(group_config(weight_args(bits, group if group > 0 else None)))
    write_checkpoint(tmp_path / "model", tensors, config)
    ctconvert.repack(tmp_path / "model", tmp_path / "out", target="cuda", fuse=True, device="cpu")
    made = load_tensors(tmp_path / "out")
    for ours, theirs in (("qweight", "w"), ("scales", "s")):
        for stack in ("13", "2"):
            found = made[f"{BLOCK}.w{stack}_{ours}"]
            assert torch.equal(found, golden[f"out_{theirs}{stack}"]), (stack, ours)


# --- a reference of this test's own --------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, None), (8, 32)])
@pytest.mark.parametrize("gated", [True, False])
def test_marlin_is_the_naive_stack(
    bits: int, group: int | None, gated: bool, tmp_path: Path
) -> None:
    scheme = group_config(weight_args(bits, group))
    leaves = LEAVES if gated else LEAVES[1:]
    tensors = expert_modules("model.layers.0.mlp", scheme, (SIZE, HIDDEN), 5, leaves)
    write_checkpoint(tmp_path / "model", tensors, config_of(scheme), 2)
    convert_and_back(tmp_path / "model", tmp_path, "cuda", fuse=True)
    made = load_tensors(tmp_path / "cuda-out")
    assert made.keys() == {
        f"{BLOCK}.{stack}_{local}" for stack in ("w13", "w2") for local in ("qweight", "scales")
    }
    size = 128  # 96 in tiles

    def codes(number: int, leaf: str) -> np.ndarray:
        return codes_of(tensors[f"{BLOCK}.{number}.{leaf}.weight_packed"], bits)

    def scales(number: int, leaf: str, n: int, columns: int) -> torch.Tensor:
        scale = tensors[f"{BLOCK}.{number}.{leaf}.weight_scale"]
        rows = torch.zeros(n, columns, dtype=scale.dtype)
        rows[: scale.shape[0], : scale.shape[1]] = scale
        return rows

    for number in range(5):
        ups = leaves[:-1]
        wide = np.concatenate([padded(codes(number, leaf), size, HIDDEN) for leaf in ups])
        assert torch.equal(made[f"{BLOCK}.w13_qweight"][number], marlin_tiles(wide, bits))
        groups = HIDDEN // group if group else 1
        rows = torch.cat([scales(number, leaf, size, groups) for leaf in ups])
        assert torch.equal(made[f"{BLOCK}.w13_scales"][number], marlin_scales(rows))
        tall = padded(codes(number, leaves[-1]), HIDDEN, size)
        assert torch.equal(made[f"{BLOCK}.w2_qweight"][number], marlin_tiles(tall, bits))
        rows = scales(number, leaves[-1], HIDDEN, size // group if group else 1)
        assert torch.equal(made[f"{BLOCK}.w2_scales"][number], marlin_scales(rows))


# --- every scheme in every layout ----------------------------------------------------------------

SCHEMES: dict[str, dict[str, Any]] = {
    "int4 group": group_config(weight_args(4, 32)),
    "int4 group 128": group_config(weight_args(4, 128)),
    "int4 group asym": group_config(weight_args(4, 32, False)),
    "int4 channel asym": group_config(weight_args(4, None, False)),
    "int8 group": group_config(weight_args(8, 32)),
    "w4a8": group_config(weight_args(4, 32), inputs=DYNAMIC_INT8),
    "w8a8 channel": group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8),
    "w8a8 tensor, static": group_config(
        weight_args(8, strategy="tensor"), format="int-quantized", inputs=STATIC_INT8
    ),
    "fp8 channel": fp8_group("channel", FP8),
    "fp8 tensor": fp8_group("tensor", FP8),
    "fp8 block": fp8_group(
        "block", FP8 | {"strategy": "group", "group_size": 128}, block_structure=[128, 128]
    ),
    "mxfp4": group_config(weight_args(4, 32, kind="float"), format="mxfp4-pack-quantized"),
    "mxfp8": mxfp8_group(),
    "nvfp4": nvfp4_group(),
    "nvfp4 weights": nvfp4_group(False),
    "2:4 fp8": group_config(
        weight_args(8, None, kind="float"), format="sparse-24-bitmask", inputs=FP8
    ),
}
#: Those whose groups or blocks want a size of their own.
SIZES = {"int4 group 128": 128, "fp8 block": 128}


def made(scheme: str, n: int, k: int, seed: int) -> Tensors:
    group = SCHEMES[scheme]
    if scheme.startswith("nvfp4"):
        return nvfp4(n, k, seed, inputs=scheme == "nvfp4", greatest=2.0 ** (seed % 9))
    if scheme == "mxfp8":
        return mxfp8(n, k, seed)
    if scheme.startswith("2:4"):
        return sparse24(n, k, group, seed)
    return quantised(n, k, group, seed)


def write(folder: Path, scheme: str, biases: bool = False) -> Path:
    """Three experts of a scheme; static scales of gate and up are one."""
    size = SIZES.get(scheme, SIZE)
    tensors: Tensors = {"model.norm.weight": torch.ones(HIDDEN)}
    for number in range(EXPERTS):
        for place, leaf in enumerate(LEAVES):
            shape = (HIDDEN, size) if leaf == "down_proj" else (size, HIDDEN)
            tensors |= module(f"{BLOCK}.{number}.{leaf}", made(scheme, *shape, 3 * number + place))
            if biases:
                tensors[f"{BLOCK}.{number}.{leaf}.bias"] = torch.randn(shape[0])
        for local in ("input_scale", "input_global_scale", "weight_global_scale"):
            if (same := tensors.get(f"{BLOCK}.{number}.gate_proj.{local}")) is not None:
                tensors[f"{BLOCK}.{number}.up_proj.{local}"] = same.clone()
    group = SCHEMES[scheme]
    config = config_of(group)
    if scheme.startswith("2:4"):
        config = config_of(group | {"format": "float-quantized"}) | {
            "sparsity_config": {
                "format": "sparse-24-bitmask",
                "targets": ["Linear"],
                "ignore": [],
                "sparsity_structure": "2:4",
            }
        }
    return write_checkpoint(folder, tensors, config, 2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_in_every_layout(scheme: str, tmp_path: Path) -> None:
    """Stacked, compared with the source, restored; or apart, with the reason, and restored too."""
    source = write(tmp_path / "model", scheme)
    stacked = []
    for layout in layouts.LAYOUTS:
        options: dict[str, Any] = {"fuse": True, "layout": {"*": layout.name}}
        plan = ctconvert.plan(source, target="cuda", keep_unsupported=True, **options)
        if plan.kept:
            continue
        report = convert_and_back(source, tmp_path / layout.name, "cuda", **options)
        if report.modules == 2:
            stacked.append(layout.name)
            assert not report.notes
            names = load_tensors(tmp_path / layout.name / "cuda-out").keys() - {"model.norm.weight"}
            assert {name.rpartition(".")[2].partition("_")[0] for name in names} == {"w13", "w2"}
        else:
            (note,) = report.notes
            assert report.modules == 9 and note.startswith(f"{BLOCK} are not stacked: ")
    assert stacked


@pytest.mark.parametrize("target", ["triton", "cuda"])
def test_biases(target: str, tmp_path: Path) -> None:
    source = write(tmp_path / "model", "int4 group 128", biases=True)
    report = convert_and_back(source, tmp_path, target, fuse=True)
    assert report.modules == 2
    before, after = load_tensors(source), load_tensors(tmp_path / f"{target}-out")
    for number in range(EXPERTS):
        gate, up, down = (before[f"{BLOCK}.{number}.{leaf}.bias"] for leaf in LEAVES)
        assert torch.equal(after[f"{BLOCK}.w13_bias"][number], torch.cat([gate, up]))
        assert torch.equal(after[f"{BLOCK}.w2_bias"][number], down)


def test_a_checkpoint_is_judged_independently(tmp_path: Path) -> None:
    source = write(tmp_path / "model", "int4 group asym")
    ctconvert.repack(source, tmp_path / "out", target="cuda", fuse=True, device="cpu")
    verified = ctconvert.verify(tmp_path / "out", against=source, independent=True)
    assert verified.independent is not None and verified.independent.agree == 3 * EXPERTS


# --- NVFP4: one power for a stack ----------------------------------------------------------------


def test_the_power_of_a_stack_is_that_of_its_greatest_scale(tmp_path: Path) -> None:
    """Every expert by itself would have another one: vLLM's is that of all of them."""
    tensors: Tensors = {}
    for number, greatest in enumerate((2.0, 28.0, 0.5)):  # powers 7, 4 and 9 by themselves
        for place, leaf in enumerate(LEAVES):
            shape = (HIDDEN, SIZE) if leaf == "down_proj" else (SIZE, HIDDEN)
            one = nvfp4(*shape, 3 * number + place, greatest=greatest / (1 + (leaf == "down_proj")))
            tensors |= module(f"{BLOCK}.{number}.{leaf}", one)
        for local in ("input_global_scale", "weight_global_scale"):
            same = tensors[f"{BLOCK}.{number}.gate_proj.{local}"]
            tensors[f"{BLOCK}.{number}.up_proj.{local}"] = same.clone()
    source = write_checkpoint(tmp_path / "model", tensors, config_of(nvfp4_group()))
    options: dict[str, Any] = {"fuse": True, "layout": {"*": "marlin-nvfp4"}}
    assert convert_and_back(source, tmp_path, "cuda", **options).modules == 2
    after = load_tensors(tmp_path / "cuda-out")
    for stack, leaf, power in (("w13", "gate_proj", 4), ("w2", "down_proj", 5)):
        factor = after[f"{BLOCK}.{stack}_weight_global_scale"]
        divisor = after[f"{BLOCK}.{stack}_weight_global_scale_source"]
        assert factor.shape == divisor.shape == (EXPERTS,)
        for number in range(EXPERTS):
            source_divisor = tensors[f"{BLOCK}.{number}.{leaf}.weight_global_scale"]
            assert divisor[number] == source_divisor
            assert factor[number] == (1 / source_divisor) * 2.0 ** (126 - 7) / 2.0**power
        # the exponent of a byte tells the scale times the power
        bytes_ = after[f"{BLOCK}.{stack}_weight_scale"].int()
        greatest = max(
            tensors[f"{BLOCK}.{n}.{part}.weight_scale"].float().max()
            for n in range(EXPERTS)
            for part in (LEAVES[:2] if stack == "w13" else LEAVES[2:])
        )
        top = int(bytes_.max())
        assert 2.0 ** ((top >> 3) - 15 - 7) * (1 + (top & 7) / 8) == greatest * 2.0**power


def test_a_scale_that_is_none_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "model", "nvfp4")
    tensors = load_tensors(source)
    tensors[f"{BLOCK}.2.up_proj.weight_scale"].view(torch.uint8)[5, 7] = 0x81
    write_checkpoint(tmp_path / "bad", tensors, config_of(nvfp4_group()))
    with pytest.raises(BadInputError, match=r"w13 \(expert 2\): weight_scale\[\d+, 7\]"):
        ctconvert.repack(
            tmp_path / "bad",
            tmp_path / "out",
            target="cuda",
            fuse=True,
            device="cpu",
            layout={"*": "marlin-nvfp4"},
        )


def test_unequal_global_scales_keep_them_apart(tmp_path: Path) -> None:
    source = write(tmp_path / "model", "nvfp4")
    tensors = load_tensors(source)
    tensors[f"{BLOCK}.1.up_proj.weight_global_scale"] *= 2
    write_checkpoint(tmp_path / "other", tensors, config_of(nvfp4_group()))
    for layout in ("marlin-nvfp4", "humming-nvfp4", "nvfp4-cutlass"):
        options: dict[str, Any] = {"fuse": True, "layout": {"*": layout}, "dtype": "bfloat16"}
        report = convert_and_back(tmp_path / "other", tmp_path / layout, "cuda", **options)
        both = f"{BLOCK}.1.gate_proj and {BLOCK}.1.up_proj"
        assert report.notes == (
            f"{BLOCK} are not stacked: {both} have different weight_global_scale values",
        )


# --- running them --------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int4 group", "w8a8 tensor, static"])
def test_experts_are_loaded_one_by_one(scheme: str, tmp_path: Path) -> None:
    """Each is its source's weight, gate above up; what was added is 0."""
    source = write(tmp_path / "model", scheme)
    ctconvert.repack(source, tmp_path / "plain", target="cuda", device="cpu")
    ctconvert.repack(source, tmp_path / "out", target="cuda", fuse=True, device="cpu")
    plain, found = load(tmp_path / "plain", "cpu"), load(tmp_path / "out", "cpu")
    together = {f"{BLOCK}.w13", f"{BLOCK}.w2"}  # there too where a kernel takes a stack whole
    each = {f"{BLOCK}.{s}.{e}" for s in ("w13", "w2") for e in range(EXPERTS)}
    assert each == found.keys() - together
    x = torch.randn(5, HIDDEN, dtype=torch.bfloat16)
    for number in range(EXPERTS):
        both = found[f"{BLOCK}.w13.{number}"]
        first, second = both.widths  # type: ignore[union-attr]
        dense, y = both.dequantize(), both(x)
        assert y.shape == (5, first + second)
        for start, leaf in ((0, "gate_proj"), (first, "up_proj")):
            want = plain[f"{BLOCK}.{number}.{leaf}"]
            assert torch.equal(dense[start : start + SIZE], want.dequantize())
            torch.testing.assert_close(y[:, start : start + SIZE], want(x))
            assert not y[:, start + SIZE : start + first].any()
        down = found[f"{BLOCK}.w2.{number}"]
        assert torch.equal(down.dequantize(), plain[f"{BLOCK}.{number}.down_proj"].dequantize())
    ctconvert.verify(tmp_path / "out", kernels=True, device="cpu")


def test_the_manifest_says_what_is_what(tmp_path: Path) -> None:
    source = write(tmp_path / "model", "int4 group")
    ctconvert.repack(source, tmp_path / "out", target="cuda", fuse=True, device="cpu")
    manifest = Manifest.load(LocalStore(tmp_path / "out"))
    for item in manifest.plan.modules:
        assert item.joint == "_" and item.experts == EXPERTS and item.stacked == EXPERTS
        assert all(entry.name.startswith(item.prefix) for entry in item.made)
    back = tmp_path / "back"
    ctconvert.restore(tmp_path / "out", back, device="cpu")
    check_restored(source, back)


def test_a_dry_run_says_how_many(tmp_path: Path) -> None:
    source = write(tmp_path / "model", "int4 group")
    ended = run("repack", source, tmp_path / "out", "--target", "cuda", "--fuse", "--dry-run")
    assert ended.code == 0
    assert "3 x 256x256" in ended.stdout and f"{BLOCK}.w13 " in ended.stdout
