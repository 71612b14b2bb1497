"""Weights that do not fit a kernel's tiles: padded in the assembly, and given back without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.builders import (
    config_of,
    experts,
    group_config,
    module,
    quantised,
    weight_args,
    write_checkpoint,
)
from support.memory import converted
from support.paths import GOLDEN
from support.reference import (
    framed,
    load_tensors,
    marlin_qweight,
    marlin_qzeros,
    marlin_scales,
    mxfp4_scales,
    unsigned_codes,
    unsigned_zero_points,
)
from support.roundtrip import convert_and_back
from support.tamper import flip_bit

import ctconvert
from ctconvert.assembly import Concat, Pad, Part, Stack
from ctconvert.errors import VerificationError
from ctconvert.output import Output

NAME = "a.down_proj"
MXFP4 = group_config(weight_args(4, 32, kind="float"), format="mxfp4-pack-quantized")
#: (N, K, padded N, padded K): rows, columns, both; and one that fits.
SHAPES = [
    (72, 128, 128, 128),
    (192, 160, 192, 256),
    (72, 160, 128, 192),
    (64, 256, 64, 256),
]


def padded(values: Any, n: int, k: int) -> torch.Tensor:
    return torch.from_numpy(framed(values, n, k))


def padded_scales(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Scale 0 for what is added; the bits of bf16 are moved as i16."""
    return padded(scale.view(torch.int16).numpy(), n, k).view(scale.dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:2])))
@pytest.mark.parametrize("format", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, None])
def test_marlin_is_the_reference_of_the_padded_weight(
    shape: tuple[int, int, int, int], format: str, bits: int, symmetric: bool, size: int | None
) -> None:
    n, k, wide_n, wide_k = shape
    group = group_config(weight_args(bits, size, symmetric), format=format)
    tensors = module(NAME, quantised(n, k, group, bits))
    plan, made = converted(tensors, config_of(group), "cuda")
    (item,) = plan.modules
    assert item.recipe.layout == "marlin"
    fits = (n, k) == (wide_n, wide_k)
    assert item.recipe.assembly == (Part(0) if fits else Pad(Part(0), wide_n, wide_k))
    assert (item.logical.n, item.logical.k) == (n, k)
    assert (item.recipe.weight.n, item.recipe.weight.k) == (wide_n, wide_k)

    codes = unsigned_codes(tensors, NAME, bits)
    want = marlin_qweight(framed(codes, wide_n, wide_k), bits)
    assert torch.equal(made[f"{NAME}.qweight"], want)
    groups = wide_k // size if size else 1
    scale = padded_scales(tensors[f"{NAME}.weight_scale"], wide_n, groups)
    assert torch.equal(made[f"{NAME}.scales"], marlin_scales(scale))
    zero = unsigned_zero_points(tensors, NAME, bits, n)
    assert (zero is None) == symmetric == (f"{NAME}.qzeros" not in made)
    if zero is not None:
        want = marlin_qzeros(framed(zero, wide_n, groups), bits)
        assert torch.equal(made[f"{NAME}.qzeros"], want)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:2])))
def test_marlin_mxfp4_is_the_reference_of_the_padded_weight(
    shape: tuple[int, int, int, int],
) -> None:
    n, k, wide_n, wide_k = shape
    made = quantised(n, k, MXFP4, 3)
    plan, found = converted(module(NAME, made), config_of(MXFP4), "cuda")
    assert plan.modules[0].recipe.layout == "marlin-mxfp4"
    nibbles = made["weight_packed"].numpy()
    codes = np.stack([nibbles & 15, nibbles >> 4], -1).reshape(n, k).astype(np.int64)
    want = marlin_qweight(framed(codes, wide_n, wide_k), 4)
    assert torch.equal(found[f"{NAME}.weight"], want)
    scale = padded(made["weight_scale"].view(torch.uint8), wide_n, wide_k // 32)
    assert torch.equal(found[f"{NAME}.weight_scale"].view(torch.uint8), mxfp4_scales(scale))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_tiles_that_hold_no_padding_are_the_kernel_librarys(bits: int) -> None:
    vectors = load_file(GOLDEN / "marlin_repack.safetensors")
    key = f"marlin_repack.w{bits}.K256.N128"
    f = 32 // bits
    words = vectors[f"{key}.in"].t()[:72, : 160 // f].contiguous()
    tensors = module(
        NAME,
        {
            "weight_packed": words,
            "weight_scale": torch.rand(72, 5).bfloat16(),
            "weight_shape": torch.tensor([72, 160]),
        },
    )
    _, made = converted(tensors, config_of(group_config(weight_args(bits, 32))), "cuda")
    tiles = made[f"{NAME}.qweight"]  # [K/16, N/64 tiles]
    assert tiles.shape == (192 // 16, 128 * 16 // f)
    width = 64 * 16 // f
    assert torch.equal(tiles[:10, :width], vectors[f"{key}.out"][:10, :width])
    assert not tiles[10:].any() and tiles[:10, width:].any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_joined_parts_are_padded_once(symmetric: bool) -> None:
    group = group_config(weight_args(4, 32, symmetric))
    tensors = module("m.gate_proj", quantised(40, 96, group, 1))
    tensors |= module("m.up_proj", quantised(32, 96, group, 2))
    plan, made = converted(tensors, config_of(group), "cuda", fuse=True)
    (item,) = plan.modules
    assert item.recipe.assembly == Pad(Concat((Part(0), Part(1))), 128, 128)
    names = ("m.gate_proj", "m.up_proj")
    codes = np.concatenate([unsigned_codes(tensors, name, 4) for name in names])
    want = marlin_qweight(framed(codes, 128, 128), 4)
    assert torch.equal(made["m.gate_up_proj.qweight"], want)


def test_experts_are_padded_one_by_one(tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32))
    tensors = experts("m.experts.down_proj", 72, 96, group)
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    convert_and_back(source, tmp_path, "cuda")
    (item,) = ctconvert.plan(source, target="cuda").modules
    assert item.recipe.assembly == Stack(tuple(Pad(Part(0, i), 128, 128) for i in range(3)))
    made = load_tensors(tmp_path / "cuda-out")["m.experts.down_proj.qweight"]
    assert made.shape == (3, 128 // 16, 128 * 2)


KINDS = {
    "pack-quantized": group_config(weight_args(4, 32, symmetric=False)),
    "int-quantized": group_config(weight_args(4, 32), format="int-quantized"),
    "int-quantized of 8 bits": group_config(weight_args(8, 32, False), format="int-quantized"),
    "mxfp4-pack-quantized": MXFP4,
}


@pytest.fixture(scope="module", params=KINDS)
def padded_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Path, Path]:
    """A source of one 72 x 160 weight, and its conversion to 128 x 192."""
    folder, group = tmp_path_factory.mktemp("padded"), KINDS[request.param]
    tensors = module(NAME, quantised(72, 160, group, 1))
    source = write_checkpoint(folder / "in", tensors, config_of(group))
    convert_and_back(source, folder, "cuda")
    return source, folder / "cuda-out"


def test_padding_comes_back_off(padded_checkpoint: tuple[Path, Path]) -> None:
    _, out = padded_checkpoint
    (item,) = Output.open(out).plan.modules
    assert isinstance(item.recipe.assembly, Pad)
    assert (item.recipe.weight.n, item.recipe.weight.k) == (128, 192)


def test_a_changed_padding_byte_is_found(padded_checkpoint: tuple[Path, Path]) -> None:
    """The hashes are made to match: only taking the padding off again can tell."""
    source, out = padded_checkpoint
    for entry in Output.open(out).plan.entries.values():
        local = entry.name.removeprefix(f"{NAME}.")
        # the last byte: of the last tile, or of the last group or row, all of which were added
        with flip_bit(out, entry.name, entry.nbytes - 1, bit=0):
            ctconvert.verify(out)
            with pytest.raises(VerificationError, match=f"module {NAME}: the padding of") as error:
                ctconvert.verify(out, against=source)
        words = {"qweight": "codes", "weight": "codes", "qzeros": "zero points"}
        assert words.get(local, "scales") in str(error.value)
    ctconvert.verify(out, against=source)
