"""``bench --load``: the engine's transforms give the layout's bytes, and what is timed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.builders import (
    DYNAMIC_INT8,
    config_of,
    group_config,
    quantised,
    weight_args,
    write_checkpoint,
)
from support.cli import run
from support.paths import CHECKPOINTS

import ctconvert
from ctconvert.errors import UsageError, VerificationError
from ctconvert.runtime import loadtime
from ctconvert.runtime.loadtime import bench_load

MLP = "model.layers.0.mlp."
SHAPES = {f"{MLP}gate_proj": (384, 256), f"{MLP}up_proj": (384, 256), f"{MLP}down_proj": (256, 384)}
FP8 = group_config(
    weight_args(8, None, kind="float"),
    format="float-quantized",
    inputs=DYNAMIC_INT8 | {"type": "float"},
)
EXPERT_NAMES = [
    f"{MLP}experts.{e}.{leaf}" for e in range(3) for leaf in ("gate_proj", "up_proj", "down_proj")
]


def made(folder: Path, group: Mapping[str, Any], target: str, **options: Any) -> tuple[Path, Path]:
    """A source of three modules, and what it becomes."""
    return _made(folder, SHAPES, group, target, **options)


def _made(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    group: Mapping[str, Any],
    target: str,
    **options: Any,
) -> tuple[Path, Path]:
    tensors = {
        f"{name}.{local}": tensor
        for seed, (name, shape) in enumerate(shapes.items())
        for local, tensor in quantised(*shape, group, seed).items()
    }
    source = write_checkpoint(folder / "in", tensors, config_of(group), shards=2)
    ctconvert.repack(source, folder / "out", target=target, device="cpu", **options)
    return source, folder / "out"


@pytest.mark.parametrize(
    ("group", "target", "layout"),
    [
        (weight_args(4, 32), "triton", "triton-wna16"),
        (weight_args(4, 64, symmetric=False), "triton", "triton-wna16"),
        (weight_args(8, None), "triton", "triton-wna16"),
        (weight_args(4, 128), "cuda", "marlin"),
        (weight_args(4, None), "cuda", "marlin"),
        (weight_args(4, 32, symmetric=False), "cuda", "marlin"),
        (weight_args(8, 64), "cuda", "marlin"),
        (weight_args(4, 64, symmetric=False), "cuda-sm90", "machete"),
        (weight_args(8, 128), "cuda-sm90", "machete"),
    ],
)
@pytest.mark.parametrize("fuse", [False, True])
def test_packed_weights(
    group: dict[str, Any], target: str, layout: str, fuse: bool, tmp_path: Path
) -> None:
    source, out = made(tmp_path, group_config(group), target, fuse=fuse)
    found = bench_load(out, source, "cpu", rounds=1)
    assert found.modules == {layout: 2 if fuse else 3}
    assert found.left_out == {}
    assert found.read_seconds > 0 < found.transform_seconds
    assert found.source_seconds == found.read_seconds + found.transform_seconds
    codes = 3 * 384 * 256 * group["num_bits"] // 8
    assert min(found.source_bytes, found.bytes) > codes


def test_fp8_weights(tmp_path: Path) -> None:
    source, out = made(tmp_path, FP8, "triton", fuse=True)
    assert bench_load(out, source, "cpu", rounds=1).modules == {"scaled-mm": 2}


def test_stacked_experts(tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32))
    shapes = {name: (128, 256) if "down" in name else (256, 128) for name in EXPERT_NAMES}
    source, out = _made(tmp_path, shapes, group, "cuda", fuse=True)
    found = bench_load(out, source, "cpu", rounds=1)
    assert found.modules == {"marlin": 2}  # w13 and w2


def test_a_real_checkpoint_and_what_is_left_out(tmp_path: Path) -> None:
    source = CHECKPOINTS / "smol-mixed-w4-w8-regex-ignore"
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    plan = ctconvert.plan(source, target="triton")
    found = bench_load(tmp_path / "out", source, "cpu", rounds=2)
    assert found.rounds == 2
    assert sum(found.modules.values()) + sum(found.left_out.values()) == len(plan.modules)
    ctconvert.repack(CHECKPOINTS / "smol-mxfp4a16", tmp_path / "none", target="cuda", device="cpu")
    with pytest.raises(UsageError, match=r"no module whose transforms at load are known.*mxfp4"):
        bench_load(tmp_path / "none", CHECKPOINTS / "smol-mxfp4a16", "cpu")


def test_another_source_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = made(tmp_path, group_config(weight_args(4, 32)), "cuda")
    monkeypatch.setattr(loadtime, "_time_load", None)  # nothing is timed
    path = next(source.glob("*00001*.safetensors"))
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("weight_packed"))
    tensors[name][5, 3] ^= 1 << 30
    save_file(tensors, path)
    where = rf"tensor {name.rpartition('.')[0]}\.qweight is not what loading"
    with pytest.raises(VerificationError, match=where):
        bench_load(out, source, "cpu")
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path)
    with pytest.raises(VerificationError, match=f"not what OUT was made from: its tensor {name}"):
        bench_load(out, source, "cpu")
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(VerificationError, match=f"it has no tensor {name}"):
        bench_load(out, source, "cpu")
    path.unlink()
    with pytest.raises(VerificationError, match=f"it has no {path.name}"):
        bench_load(out, source, "cpu")


def test_the_command(tmp_path: Path) -> None:
    source, out = made(tmp_path, group_config(weight_args(4, 32)), "triton")
    given = ("bench", out, "--load", "--against", source, "--device", "cpu")
    code, text, err = run(*given, "--json")
    assert (code, err) == (0, "")
    assert json.loads(text)["modules"] == {"triton-wna16": 3}
    code, text, err = run(*given)
    assert (code, err) == (0, "")
    assert "source, transformed" in text and "note: the transforms are in plain torch" in text
    for wrong in (("--load",), ("--against", source), (*given[2:5], "--plot", "a.png")):
        code, text, err = run("bench", out, *wrong)
        assert (code, text) == (2, "")
        assert err.startswith("error: --") and err.count("\n") == 1


def test_a_device_without_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    source, out = made(tmp_path, group_config(weight_args(4, 32)), "triton")
    monkeypatch.setattr(loadtime, "_time_load", fails)
    code, _, err = run("bench", out, "--load", "--against", source, "--device", "cpu")
    assert code == 1
    assert err.startswith("error: out of memory on cpu; ") and err.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["cuda", "cuda-sm90", "triton"])
def test_timed_on_a_gpu(target: str, tmp_path: Path) -> None:
    source, out = made(tmp_path, group_config(weight_args(4, 128)), target)
    code, text, err = run("bench", out, "--load", "--against", source, "--device", "cuda")
    assert (code, err) == (0, ""), err
    assert "source, transformed" in text
