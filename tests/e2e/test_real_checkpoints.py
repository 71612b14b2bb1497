"""Trimmed checkpoints of real models, for every target: converted, verified, restored."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.paths import CHECKPOINTS, EXAMPLE
from support.reference import check_against_reference, equal, load_tensors, read_json
from support.roundtrip import convert_and_back
from support.schemes import REAL

import ctconvert
from ctconvert.errors import UnsupportedError
from ctconvert.layouts import TARGETS
from ctconvert.records import Manifest
from ctconvert.store.local import LocalStore


def test_every_real_checkpoint_is_tested() -> None:
    assert {path.name for path in CHECKPOINTS.iterdir()} == set(REAL)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", REAL)
def test_every_target(name: str, target: str, tmp_path: Path) -> None:
    source, expected = CHECKPOINTS / name, REAL[name].get(target)
    if expected is None:
        with pytest.raises(UnsupportedError):
            ctconvert.repack(source, tmp_path / "out", target=target, device="cpu")
        assert not (tmp_path / "out").exists()
        return
    for fuse in (False, True):
        report = convert_and_back(source, tmp_path / str(fuse), target, fuse=fuse)
        assert set(report.layouts) == expected


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("smol-w4a16-g64-sym", 4),
        ("smol-w4a16-g32-asym", 4),
        ("smol-w4a8-int8dyn-g32-packed", 4),
        ("smol-w4a8o8-pack-static", 4),
        ("smol-w8a8o8-static-sym", 8),
    ],
)
def test_the_triton_layout_is_the_reference(name: str, bits: int, tmp_path: Path) -> None:
    source = CHECKPOINTS / name
    report = ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    modules = {
        tensor.rpartition(".")[0]: bits
        for tensor in load_tensors(source)
        if tensor.endswith(".weight_scale")
    }
    assert report.layouts == {"triton-wna16": len(modules)}
    check_against_reference(source, tmp_path / "out", modules)


def test_mixed_widths_by_pattern_and_ignore(tmp_path: Path) -> None:
    source = CHECKPOINTS / "smol-mixed-w4-w8-regex-ignore"
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    attention = "model.layers.{}.self_attn.{}_proj"
    bits = {attention.format(0, part): 8 for part in "qkv"} | {attention.format(1, "v"): 8}
    bits["model.layers.1.mlp.up_proj"] = 4
    check_against_reference(source, tmp_path / "out", bits)
    assert f"{attention.format(1, 'k')}.weight" in load_tensors(tmp_path / "out")


def test_the_output_is_described(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ctconvert.repack(EXAMPLE, out, target="triton", device="cpu")
    config, original = read_json(out / "config.json"), read_json(EXAMPLE / "config.json")
    ours = config.pop("quantization_config")
    assert ours["source"] == original.pop("quantization_config")
    assert config == original
    assert ours["quant_method"] == "ctconvert"
    assert ours["modules"] == {"triton-wna16": 14}
    manifest = Manifest.load(LocalStore(out))
    assert manifest.plan.kind == "converted"
    assert [(file.name, file.size) for file in manifest.sources] == [
        ("model.safetensors", (EXAMPLE / "model.safetensors").stat().st_size)
    ]
    (module,) = (m for m in manifest.plan.modules if m.name == "model.layers.0.mlp.down_proj")
    assert (module.recipe.layout, module.recipe.layout_version) == ("triton-wna16", 1)
    assert (module.logical.n, module.logical.k, module.logical.group_size) == (576, 1536, 64)
    generation = "generation_config.json"
    assert (out / generation).read_bytes() == (EXAMPLE / generation).read_bytes()


def test_the_restored_checkpoint_is_described(tmp_path: Path) -> None:
    source = CHECKPOINTS / "smol-w4a16-g64-sym"
    report = convert_and_back(source, tmp_path, "cuda", fuse=True)
    back = tmp_path / "cuda-back"
    manifest = Manifest.load(LocalStore(back))
    made = Manifest.load(LocalStore(tmp_path / "cuda-out"))
    assert manifest.plan.kind == "restored"
    assert manifest.plan.source.manifest == made.manifest_sha256
    assert {path.name for path in back.iterdir()} == {
        *(path.name for path in source.iterdir()),
        "ctconvert.json",
    }
    assert report.target == "cuda" and ctconvert.verify(back).modules == 0
    convert_and_back(back, tmp_path / "again", "cuda", fuse=True)
    again = tmp_path / "again" / "cuda-out" / "model.safetensors"
    assert again.read_bytes() == (tmp_path / "cuda-out" / "model.safetensors").read_bytes()


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    for out, workers in (("a", 1), ("b", 6)):
        ctconvert.repack(EXAMPLE, tmp_path / out, target="triton", device="cpu", workers=workers)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_unsupported_module_stops_everything_or_is_kept(tmp_path: Path) -> None:
    source = CHECKPOINTS / "rand-w3a16-g128-sym"
    with pytest.raises(UnsupportedError, match=r"k_proj.*3-bit(.|\n)*v_proj.*3-bit"):
        ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    assert not list(tmp_path.iterdir())
    report = ctconvert.repack(
        source, tmp_path / "out", target="triton", device="cpu", keep_unsupported=True
    )
    assert len(report.kept) == 2
    before, after = load_tensors(source), load_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(equal(before[name], after[name]) for name in before)
    ctconvert.verify(tmp_path / "out", against=source)


def test_act_order_is_sorted(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj"
    source = CHECKPOINTS / "old071-rand-w4a16-g128-actorder-group-gidx"
    ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")
    before, after = load_tensors(source), load_tensors(tmp_path / "out")
    g_idx = before[f"{name}.weight_g_idx"]
    perm = after[f"{name}.g_idx_sort_indices"]
    assert torch.equal(g_idx[perm.long()], g_idx.sort().values)
    assert sorted(perm.tolist()) == list(range(1024))


def test_restore_checks_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ctconvert.errors import ConversionError

    out, back = tmp_path / "out", tmp_path / "back"
    ctconvert.repack(CHECKPOINTS / "smol-w4a16-g64-sym", out, target="cuda", device="cpu")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConversionError, match=r"needs .* GB and .* are free"):
        ctconvert.restore(out, back, device="cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
