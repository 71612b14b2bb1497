"""``diff``: decoded weights beside decoded weights, whatever stores them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINTS, EXAMPLE
from safetensors.torch import load_file, save_file
from support.builders import (
    config_of,
    group_config,
    module,
    quantised,
    weight_args,
    write_checkpoint,
)
from support.cli import run
from support.models import write_experts

from ctconvert import api
from ctconvert.records import Difference
from ctconvert.work import differing

DOWN = "model.layers.1.mlp.down_proj"


def edited(source: Path, to: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint of one file, its tensors edited."""
    shutil.copytree(source, to)
    tensors = load_file(to / "model.safetensors")
    edit(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def convert(source: Path, out: Path, target: str, **more: bool) -> Path:
    api.repack(source, out, target=target, device="cpu", **more)
    return out


def test_every_form_of_a_checkpoint_is_the_same(tmp_path: Path) -> None:
    """A source, two layouts of it (one fused) and what is restored of one."""
    triton = convert(EXAMPLE, tmp_path / "triton", "triton")
    cuda = convert(EXAMPLE, tmp_path / "cuda", "cuda", fuse=True)
    api.restore(cuda, tmp_path / "back", device="cpu")
    forms = [EXAMPLE, triton, cuda, tmp_path / "back"]
    for a in forms:
        for b in forms:
            found = api.diff(a, b)
            assert (found.modules, found.tensors, found.differences) == (14, 6, ())


@pytest.mark.parametrize("target", ["triton", "cuda"])
def test_one_code(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differing, "_BLOCK", 1)  # a row at a time

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{DOWN}.weight_packed"][5, 3] ^= 1 << 9  # column 26

    other = edited(EXAMPLE, tmp_path / "other", edit)
    word = int(load_file(other / "model.safetensors")[f"{DOWN}.weight_packed"][5, 3])
    new, old = (word >> 8 & 15) - 8, ((word ^ 1 << 9) >> 8 & 15) - 8
    out = convert(other, tmp_path / "out", target, fuse=True)
    for b in (other, out):
        (one,) = api.diff(EXAMPLE, b).differences
        first = f"[5, 26] is {old} and {new}"
        assert one == Difference(module=DOWN, what="codes", first=first, elements=1)
        (one,) = api.diff(b, EXAMPLE).differences
        assert one.first == f"[5, 26] is {new} and {old}"


def test_scales_other_tensors_and_what_one_has_alone(tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{DOWN}.weight_scale"][7, 2:4] *= 2
        tensors["model.norm.weight"].view(torch.uint8)[1] ^= 255
        tensors["model.extra"] = torch.ones(3)

    other = edited(EXAMPLE, tmp_path / "other", edit)
    out = convert(other, tmp_path / "out", "triton")
    for b in (other, out):
        found = api.diff(EXAMPLE, b)
        by_module = {one.module: (one.what, one.elements) for one in found.differences}
        assert by_module == {
            DOWN: ("scale", 2),
            "model.norm": ("model.norm.weight", 1),
            "model": ("model.extra", 0),
        }
        assert found.differences[0].module == DOWN


def test_modules_that_were_kept_are_decoded_too(tmp_path: Path) -> None:
    source = CHECKPOINTS / "rand-w3a16-g128-sym"
    out = convert(source, tmp_path / "out", "triton", keep_unsupported=True)
    assert api.diff(source, out).differences == () == api.diff(out, source).differences

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.k_proj.weight_packed"][0, 0] ^= 1

    (one,) = api.diff(out, edited(source, tmp_path / "other", edit)).differences
    assert (one.what, one.elements) == ("codes", 1) and one.first.startswith("[0, 0] is ")


def checkpoint(folder: Path, format: str, scale: torch.dtype = torch.bfloat16) -> Path:
    group = group_config(weight_args(4, 32), format=format)
    made = quantised(64, 96, group, 3, scale)
    return write_checkpoint(folder, module("model.a.q_proj", made), config_of(group))


def test_how_codes_are_stored_is_no_difference(tmp_path: Path) -> None:
    """int-quantized holds as bytes what pack-quantized packs; the same values in both."""
    packed = checkpoint(tmp_path / "packed", "pack-quantized")
    plain = checkpoint(tmp_path / "plain", "int-quantized")
    assert "I32" in str(api.inspect(packed).modules[0].tensors)
    assert "I32" not in str(api.inspect(plain).modules[0].tensors["weight"])
    assert api.diff(packed, plain).differences == ()

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        row = tensors["model.a.q_proj.weight"][63]
        row[95] = -row[95] - 1

    (one,) = api.diff(packed, edited(plain, tmp_path / "other", edit)).differences
    assert (one.what, one.elements) == ("codes", 1) and one.first.startswith("[63, 95] is ")


def test_wider_scales_of_the_same_values_are_no_difference(tmp_path: Path) -> None:
    narrow = checkpoint(tmp_path / "narrow", "pack-quantized")
    wide = edited(
        narrow,
        tmp_path / "wide",
        lambda tensors: tensors.update(
            {n: t.float() for n, t in tensors.items() if n.endswith("_scale")}
        ),
    )
    assert api.diff(narrow, wide).differences == ()

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.a.q_proj.weight_scale"][1, 1] += 1e-6

    (one,) = api.diff(narrow, edited(wide, tmp_path / "other", edit)).differences
    assert (one.what, one.elements) == ("scale", 1)


@pytest.mark.parametrize("stacked", [False, True])
def test_experts(tmp_path: Path, stacked: bool) -> None:
    model = write_experts(tmp_path / "model", stacked)
    apart = convert(model, tmp_path / "apart", "cuda")
    joined = convert(model, tmp_path / "joined", "cuda", fuse=True)
    for a, b in ((model, joined), (apart, joined), (joined, model)):
        found = api.diff(a, b)
        assert found.modules and found.differences == ()


def test_the_command(tmp_path: Path) -> None:
    out = convert(EXAMPLE, tmp_path / "out", "triton")
    code, stdout, stderr = run("diff", EXAMPLE, out)
    assert (code, stderr.count("\n")) == (0, 1) and "14 modules hold the same codes" in stdout
    assert json.loads(run("diff", EXAMPLE, out, "--json").stdout)["ok"] is True

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            tensors[f"model.layers.{layer}.mlp.down_proj.weight_packed"][5, 3] ^= 1

    other = edited(EXAMPLE, tmp_path / "other", edit)
    code, stdout, stderr = run("diff", other, out)
    assert code == 1 and "model.layers.{0-1}.mlp.down_proj  codes" in stdout
    line = stderr.splitlines()[-1]
    assert line.startswith(f"error: {other} and {out} differ in model.layers.0.mlp.down_proj: ")
    assert line.endswith("; 1 other module too")
    found = json.loads(run("diff", other, out, "--json").stdout)
    assert (found["ok"], found["error"]["kind"]) == (False, "Difference")
    assert found["error"]["module"] == "model.layers.0.mlp.down_proj"
    assert [one["elements"] for one in found["differences"]] == [1, 1]
    assert run("diff", EXAMPLE, tmp_path / "nowhere").code == 2


def test_a_damaged_checkpoint_is_no_difference(tmp_path: Path) -> None:
    out = convert(EXAMPLE, tmp_path / "out", "triton")
    (out / "ctconvert.json").write_text("{")
    found = json.loads(run("diff", EXAMPLE, out, "--json").stdout)
    assert (found["exit_code"], found["error"]["kind"]) == (1, "Verification")
