"""Tensors that are missing, of a wrong dtype or shape, or hold what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.builders import config_of, group_config, weight_args, write_checkpoint
from support.damage import (
    DOWN,
    GROUP,
    ONE,
    PLAIN,
    UP,
    Damage,
    Q,
    convert,
    edit,
    fails,
    refused,
    small,
    tensors_of,
)
from support.models import tree

import ctconvert
from ctconvert.errors import UnsupportedError
from ctconvert.records import Manifest
from ctconvert.store.local import LocalStore


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sound checkpoint of one file; tests damage it."""
    return write_checkpoint(tmp_path / "model", small(), config_of(GROUP))


def with_value(name: str, at: tuple[int, ...], value: float) -> Damage:
    def change(model: Path) -> None:
        tensor = load_file(model / ONE)[f"{UP}.{name}"].clone()
        tensor[at] = value
        edit(model, UP, **{name: tensor})

    return change


def replaced(**tensors: torch.Tensor | None) -> Damage:
    return lambda model: edit(model, UP, **tensors)


BF16, F32 = torch.bfloat16, torch.float32

#: UP is [96, 64], int4, group size 32: weight_packed [96, 8], weight_scale [96, 2].
TENSOR_DAMAGE: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "missing scale": (replaced(weight_scale=None), ("weight_scale is missing",)),
    "missing weight_packed": (replaced(weight_packed=None), ("weight_packed",)),
    "missing weight_shape": (replaced(weight_shape=None), ("weight_shape is missing",)),
    "scale of a wrong shape": (
        replaced(weight_scale=torch.ones(96, 3, dtype=BF16)),
        ("weight_scale", "[96, 3]", "[96, 2]"),
    ),
    "scale transposed": (
        replaced(weight_scale=torch.ones(2, 96, dtype=BF16)),
        ("weight_scale", "[2, 96]", "[96, 2]"),
    ),
    "scale of too few rows": (
        replaced(weight_scale=torch.ones(95, 2, dtype=BF16)),
        ("weight_scale", "[95, 2]"),
    ),
    "scale is an integer": (
        replaced(weight_scale=torch.ones(96, 2, dtype=torch.int32)),
        ("weight_scale", "I32"),
    ),
    "NaN scale": (
        with_value("weight_scale", (70, 1), float("nan")),
        ("weight_scale[70, 1]", "nan"),
    ),
    "infinite scale": (
        with_value("weight_scale", (3, 0), float("inf")),
        ("weight_scale[3, 0]", "inf"),
    ),
    "minus infinite scale": (
        with_value("weight_scale", (95, 1), float("-inf")),
        ("weight_scale[95, 1]", "-inf"),
    ),
    "weight_shape of other rows": (
        replaced(weight_shape=torch.tensor([95, 64])),
        ("weight_shape", "[95, 64]", "[96, 8]"),
    ),
    "weight_shape of another K": (
        replaced(weight_shape=torch.tensor([96, 128])),
        ("weight_shape", "128", "8 words"),
    ),
    "weight_shape transposed": (
        replaced(weight_shape=torch.tensor([64, 96])),
        ("weight_shape", "[64, 96]"),
    ),
    "weight_shape negative": (
        replaced(weight_shape=torch.tensor([96, -64])),
        ("weight_shape", "-64"),
    ),
    "weight_shape enormous": (
        replaced(weight_shape=torch.tensor([96, 1 << 62])),
        ("weight_shape", str(1 << 62)),
    ),
    "weight_shape of three numbers": (
        replaced(weight_shape=torch.tensor([1, 96, 64])),
        ("weight_shape", "[3]"),
    ),
    "weight_shape is a float": (
        replaced(weight_shape=torch.tensor([96.0, 64.0])),
        ("weight_shape", "F32"),
    ),
    "weight_shape is a truth value": (
        replaced(weight_shape=torch.tensor([True, False])),
        ("weight_shape", "BOOL"),
    ),
    "packed as i64": (
        replaced(weight_packed=torch.zeros(96, 8, dtype=torch.int64)),
        ("weight_packed", "I64", "I32"),
    ),
    "packed as u8": (
        replaced(weight_packed=torch.zeros(96, 32, dtype=torch.uint8)),
        ("weight_packed", "U8", "I32"),
    ),
    "packed as one dimension": (
        replaced(weight_packed=torch.zeros(768, dtype=torch.int32)),
        ("weight_packed", "[768]"),
    ),
    "packed of too few words": (
        replaced(weight_packed=torch.zeros(96, 7, dtype=torch.int32)),
        ("weight_packed", "7 words"),
    ),
}


@pytest.mark.parametrize("case", TENSOR_DAMAGE)
def test_damaged_tensor(model: Path, case: str) -> None:
    damage, says = TENSOR_DAMAGE[case]
    damage(model)
    refused(model, says=(f"module {UP}", *says))


@pytest.mark.parametrize("case", ["NaN scale", "missing scale"])
def test_damage_with_overwrite_leaves_the_old_output(
    model: Path, tmp_path: Path, case: str
) -> None:
    out = tmp_path / "out"
    convert(model, out)
    before = tree(out)
    TENSOR_DAMAGE[case][0](model)
    fails(convert, model, out, says=(f"module {UP}",), overwrite=True)
    assert tree(out) == before and not (tmp_path / "out.partial").exists()
    ctconvert.verify(out)


@pytest.mark.parametrize("value", [9, 8, -9, 127, -128])
def test_code_out_of_range(tmp_path: Path, value: int) -> None:
    group = group_config(weight_args(4, 32, symmetric=False), format="int-quantized")
    tensors = tensors_of(group, (UP, 96, 64))
    tensors[f"{UP}.weight"][70, 41] = value
    model = write_checkpoint(tmp_path / "model", tensors, config_of(group))
    refused(model, says=(f"module {UP}", "weight[70, 41]", f" {value},", "4-bit"))


@pytest.mark.parametrize("value", [9, 8, -9, 127])
def test_zero_point_out_of_range(tmp_path: Path, value: int) -> None:
    group = group_config(weight_args(4, 32, symmetric=False), format="int-quantized")
    tensors = tensors_of(group, (UP, 96, 64))
    tensors[f"{UP}.weight_zero_point"][70, 1] = value
    model = write_checkpoint(tmp_path / "model", tensors, config_of(group))
    refused(model, says=(f"module {UP}", "weight_zero_point[70, 1]", f" {value},", "4-bit"))


def test_one_zero_point_for_many_channels(tmp_path: Path) -> None:
    group = group_config(weight_args(8, None, symmetric=False), format="int-quantized")
    tensors = tensors_of(group, (UP, 96, 64))
    tensors[f"{UP}.weight_zero_point"] = torch.tensor(3, dtype=torch.int8)
    model = write_checkpoint(tmp_path / "model", tensors, config_of(group))
    refused(model, says=(f"module {UP}", "weight_zero_point", "[96, 1]"))


def test_a_tensor_of_an_output_name_is_not_explained_away(model: Path) -> None:
    edit(model, UP, qweight=torch.zeros(4))
    with pytest.raises(UnsupportedError, match="holds qweight"):
        convert(model, model.parent / "out")
    made = load_file(model / ONE)
    del made[f"{UP}.qweight"]
    save_file(made | {f"{UP}.qweight.x": torch.zeros(1)}, model / ONE)  # no clash, no fault
    convert(model, model.parent / "out")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two int3 modules beside an int4 one."""
    three = group_config(weight_args(3, 32), targets=["re:.*mlp.*"])
    tensors = tensors_of(GROUP, (Q, 48, 64)) | tensors_of(three, (UP, 96, 64), (DOWN, 64, 96))
    return write_checkpoint(tmp_path / "model", tensors, config_of(three, GROUP))


@pytest.mark.parametrize("options", [{}, {"overwrite": True, "verify": False}])
def test_unsupported_modules_are_all_listed(
    mixed: Path, tmp_path: Path, options: dict[str, bool]
) -> None:
    before = tree(mixed)
    with pytest.raises(UnsupportedError) as caught:
        convert(mixed, tmp_path / "out", **options)
    assert caught.value.exit_code == 3
    first, *refusals = str(caught.value).splitlines()
    assert "2 modules" in first and "nothing" in first and "keep_unsupported=True" in first
    assert len(refusals) == 2 and all("3-bit" in line for line in refusals)
    assert any(UP in line for line in refusals) and any(DOWN in line for line in refusals)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert tree(mixed) == before


def test_keep_unsupported_copies_them_unchanged(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = convert(mixed, out, keep_unsupported=True)
    assert {kept.module for kept in report.kept} == {UP, DOWN}
    assert all("3-bit" in kept.reason for kept in report.kept)
    source, made = load_file(mixed / ONE), load_file(out / ONE)
    kept = {name for name in source if name.startswith((UP, DOWN)) or name == PLAIN}
    assert made.keys() == kept | {f"{Q}.qweight", f"{Q}.scales"}
    for name in kept:
        assert made[name].dtype == source[name].dtype and torch.equal(made[name], source[name])
    assert Manifest.load(LocalStore(out)).plan.kept == report.kept
    ctconvert.verify(out, against=mixed)


def test_keep_unsupported_is_no_cover_for_damage(mixed: Path) -> None:
    edit(mixed, UP, weight_scale=None)
    refused(mixed, says=(f"module {UP}", "weight_scale is missing"), keep_unsupported=True)
