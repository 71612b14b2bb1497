"""The layouts of NVFP4, FP8 and MXFP8: what the real library made, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from support.block_floats import (
    FP8,
    STATIC_FP8,
    described,
    fp8_group,
    fp8_weight,
    mxfp8_group,
    mxfp8_weight,
    nvfp4_group,
    nvfp4_weight,
)
from support.builders import group_config, quantised, weight_args

from ctconvert.assembly import padded
from ctconvert.formats.mxfp4 import MXFP4Packed
from ctconvert.formats.mxfp8 import MXFP8Quantized
from ctconvert.formats.nvfp4 import NVFP4Packed
from ctconvert.formats.quantized import FloatQuantized
from ctconvert.layouts import Layout
from ctconvert.layouts.marlin_fp8 import MarlinFP8, MarlinFP8Half
from ctconvert.layouts.marlin_mxfp8 import MarlinMXFP8
from ctconvert.layouts.marlin_nvfp4 import MarlinNVFP4, MarlinNVFP4Half
from ctconvert.layouts.mx_swizzled import MXFP4Swizzled, MXFP8Swizzled
from ctconvert.layouts.nvfp4_cutlass import NVFP4Cutlass
from ctconvert.specs import QuantizedWeight
from ctconvert.transforms import cuts
from ctconvert.transforms.dense import dense_weight
from ctconvert.transforms.dtypes import same_bits, spec_of

GOLDEN = Path(__file__).parents[1] / "golden" / "nvfp4_fp8.safetensors"
NVFP4_MARLIN = {"bfloat16": MarlinNVFP4(), "float16": MarlinNVFP4Half()}
FP4 = weight_args(4, 32, kind="float")
MXFP4 = group_config(FP4, format="mxfp4-pack-quantized", inputs=FP4 | {"dynamic": True})
MXFP4_A16 = group_config(FP4, format="mxfp4-pack-quantized")
FP8_MARLIN = {"bfloat16": MarlinFP8(), "float16": MarlinFP8Half()}


def vectors(prefix: str) -> dict[str, torch.Tensor]:
    found = load_file(GOLDEN)
    return {
        key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)
    }


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(same_bits(left[x], right[x]) for x in left)


def fitting(weight: QuantizedWeight, layout: Layout) -> QuantizedWeight:
    """Padded as the layout asks."""
    spec = weight.spec
    n, k = layout.padded_shape(spec)
    if spec.block is None:
        return cuts.pad(weight, padded(spec, n, k))
    shape = -(-n // spec.block[0]), -(-k // spec.block[1])
    return cuts.pad(weight, replace(spec, n=n, k=k, scale_shape=shape))


def round_trip(weight: QuantizedWeight, layout: Layout) -> dict[str, torch.Tensor]:
    assert layout.supports(weight.spec), layout.supports(weight.spec).reason
    whole = fitting(weight, layout)
    before = {name: tensor.clone() for name, tensor in whole.tensors().items()}
    made = layout.encode(whole)
    assert {name: spec_of(t) for name, t in made.items()} == layout.output_specs(whole.spec)
    assert all(tensor.is_contiguous() for tensor in made.values())
    back = layout.decode(made, whole.spec)
    assert same(back, whole)
    assert all(same_bits(tensor, before[name]) for name, tensor in whole.tensors().items())
    again = layout.encode(back)
    assert all(same_bits(tensor, again[name]) for name, tensor in made.items())
    assert same(cuts.strip(back, weight.spec), weight)
    return made


def near(y: torch.Tensor, x: torch.Tensor, weight: QuantizedWeight) -> None:
    """The real kernel's output is that of the dense weight, to the rounding of its dtype."""
    wanted = x.double() @ dense_weight(weight).double().t()
    assert (y.double() - wanted).norm() < 4e-3 * wanted.norm()


# ---------------------------------------------------------------------- the real library's


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["full", "low"])
def test_golden_nvfp4(dtype: str, kind: str) -> None:
    found = vectors(f"nvfp4_marlin.{dtype}.{kind}.")
    tensors = {
        "weight_packed": found["weight_packed"],
        "weight_scale": found["weight_scale_u8"].view(torch.float8_e4m3fn),
        "weight_global_scale": found["weight_global_scale"],
    }
    weight = described(NVFP4Packed(), nvfp4_group(inputs=False), tensors)
    made = round_trip(weight, NVFP4_MARLIN[dtype])
    assert torch.equal(made["weight"], found["out_weight"])
    assert torch.equal(made["weight_scale"], found["out_scale_u8"])
    assert torch.equal(made["weight_global_scale"], found["out_global"])
    near(found["y"], found["x"], weight)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
def test_golden_fp8(dtype: str, kind: str) -> None:
    found = vectors(f"fp8_marlin.{dtype}.{kind}.")
    more: dict[str, Any] = {"block_structure": [128, 128]} if kind == "block" else {}
    tensors = {
        "weight": found["weight_u8"].view(torch.float8_e4m3fn),
        "weight_scale": found["weight_scale"],
    }
    weight = described(FloatQuantized(), fp8_group(kind, **more), tensors)
    weight = cuts.expand(weight)
    made = round_trip(weight, FP8_MARLIN[dtype])
    assert torch.equal(made["weight"], found["out_weight"])
    assert torch.equal(made["weight_scale"], found["out_scale"])
    assert ("weight_scale_source" in made) == (dtype == "float16")
    near(found["y"], found["x"], weight)


def test_golden_mxfp8() -> None:
    found = vectors("mxfp8_marlin.")
    tensors = {
        "weight": found["weight_u8"].view(torch.float8_e4m3fn),
        "weight_scale": found["scale_u8"],
    }
    weight = described(MXFP8Quantized(), mxfp8_group(), tensors)
    made = round_trip(weight, MarlinMXFP8())
    assert torch.equal(made["weight"], found["out_weight"])
    assert torch.equal(made["weight_scale"], found["out_scale_u8"])
    near(found["y"], found["x"], weight)


# ----------------------------------------------------------------------------- round trips

SHAPES = ((192, 256), (72, 160), (128, 384), (40, 96), (200, 64))


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("inputs", [True, False])
def test_nvfp4_round_trips(n: int, k: int, inputs: bool) -> None:
    for greatest in (448.0, 100.0, 20.0, 2.0):
        weight = nvfp4_weight(n, k, inputs=inputs, greatest=greatest)
        for layout in NVFP4_MARLIN.values():
            made = round_trip(weight, layout)
            assert ("input_global_scale" in made) == inputs
        if inputs:
            round_trip(weight, NVFP4Cutlass())


@pytest.mark.parametrize(("n", "k"), [*SHAPES, (48, 80), (33, 112)])
def test_nvfp4_cutlass_by_element(n: int, k: int) -> None:
    weight = nvfp4_weight(n, k)
    made = round_trip(weight, NVFP4Cutlass())
    height, width = -(-n // 32) * 32, -(-k // 32) * 16
    assert made["weight"].shape == (height, width)
    assert torch.equal(made["weight"][:n, : k // 2], weight.codes.view(torch.uint8))
    groups = k // 16
    assert weight.scale is not None
    flat, scale = made["weight_scale"].view(torch.uint8).flatten(), weight.scale.view(torch.uint8)
    tiles = -(-groups // 4)
    assert flat.numel() == -(-n // 128) * 128 * tiles * 4
    for row in range(n):
        for g in range(groups):
            at = (row // 128 * tiles + g // 4) * 512 + row % 32 * 16 + row // 32 % 4 * 4 + g % 4
            assert flat[at] == scale[row, g]
    inputs, divisor = weight.side["input_global_scale"], weight.side["weight_global_scale"]
    assert torch.equal(made["input_global_scale_inv"], inputs)
    assert torch.equal(made["alpha"], (1 / inputs) * (1 / divisor))


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inputs", [None, FP8, STATIC_FP8])
def test_fp8_round_trips(n: int, k: int, dtype: torch.dtype, inputs: dict[str, Any] | None) -> None:
    for layout in FP8_MARLIN.values():
        made = round_trip(fp8_weight(n, k, dtype=dtype, inputs=inputs), layout)
        assert ("input_scale" in made) == (inputs is STATIC_FP8)
        weight = cuts.expand(fp8_weight(n, k, dtype=dtype, strategy="tensor", inputs=inputs))
        round_trip(weight, layout)


@pytest.mark.parametrize(("n", "k"), [*SHAPES, (192, 128), (576, 320)])
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 128), (128, 64)])
def test_fp8_blocks_round_trip(n: int, k: int, block: tuple[int, int]) -> None:
    for layout in FP8_MARLIN.values():
        weight = fp8_weight(n, k, strategy="block", block_structure=list(block))
        made = round_trip(weight, layout)
        padded_n, padded_k = layout.padded_shape(weight.spec)
        assert padded_k % block[1] == 0
        assert made["weight_scale"].shape == (padded_k // block[1], padded_n)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_mxfp8_round_trips(n: int, k: int) -> None:
    round_trip(mxfp8_weight(n, k), MarlinMXFP8())


def swizzled(scale: torch.Tensor) -> torch.Tensor:
    """Scales [N, G] at the places that the block-scaled kernels read, one by one."""
    n, groups = scale.shape
    tiles = -(-groups // 4)
    made = [0] * (-(-n // 128) * 128 * tiles * 4)
    for row, values in enumerate(scale.view(torch.uint8).tolist()):
        for g, value in enumerate(values):
            at = (row // 128 * tiles + g // 4) * 512 + row % 32 * 16 + row // 32 % 4 * 4 + g % 4
            made[at] = value
    return torch.tensor(made, dtype=torch.uint8).view(-1, tiles * 4)


@pytest.mark.parametrize(("n", "k"), [*SHAPES, (33, 224)])
def test_mx_swizzled_by_element(n: int, k: int) -> None:
    for layout, weight in (
        (MXFP8Swizzled(), mxfp8_weight(n, k, inputs=True)),
        (MXFP4Swizzled(), described(MXFP4Packed(), MXFP4, quantised(n, k, MXFP4, n))),
    ):
        made = round_trip(weight, layout)
        assert weight.scale is not None
        rows, source = made["weight"].view(torch.uint8), weight.codes.view(torch.uint8)
        assert torch.equal(rows[:n], source) and not rows[n:].any()
        assert rows.shape[0] == -(-n // 32) * 32
        assert torch.equal(made["weight_scale"].view(torch.uint8), swizzled(weight.scale))


def kernels_own(weight: QuantizedWeight, made: dict[str, torch.Tensor]) -> torch.Tensor:
    """Scales [K/16, N] as the float16 kernel takes its bytes: exponent bias 15, shifted 7 bits."""
    halves = (made["weight_scale"].to(torch.int32) << 7).to(torch.int16).view(torch.float16)
    return halves.double() * made["weight_global_scale"].double()


def test_what_the_kernel_multiplies_is_the_source() -> None:
    """But for the flushed scales, which the plane beside holds."""
    weight = nvfp4_weight(128, 256)
    made = MarlinNVFP4Half().encode(weight)
    assert weight.scale is not None
    divisor = weight.side["weight_global_scale"]
    kept = weight.scale.float() * (weight.scale.float() >= 2.0**-6)
    assert (kept != weight.scale.float()).any()
    exact = (kept.double() * divisor.reciprocal().double()).flatten().sort().values
    own = kernels_own(weight, made).flatten().sort().values
    assert torch.equal(own * 2.0**-14, exact)


# ------------------------------------------------------------------- parts, ranks, a corpus


@pytest.mark.parametrize("layout", [MarlinNVFP4(), NVFP4Cutlass()])
def test_joined_parts_share_a_power(layout: Layout) -> None:
    parts = [nvfp4_weight(64, 128, greatest=10.0), nvfp4_weight(128, 128, seed=1)]
    parts[1].side = parts[0].side  # a plan joins only parts with equal global scales
    whole = cuts.join_rows(parts)
    made = round_trip(whole, layout)
    back = layout.decode(made, whole.spec)
    assert same(cuts.rows(back, 0, 64), parts[0])
    assert same(cuts.rows(back, 64, 192), parts[1])
    cut = cuts.columns(whole, 64, 128)
    round_trip(cut, layout)


def test_fp8_ranks() -> None:
    group = fp8_group("block", block_structure=[128, 128])
    weight = described(FloatQuantized(), group, quantised(256, 512, group, 0))
    for part in (cuts.rows(weight, 128, 256), cuts.columns(weight, 256, 512)):
        round_trip(part, MarlinFP8())


# --------------------------------------------------------------------------------- refused


def test_supports() -> None:
    weights = {
        "nvfp4": nvfp4_weight(64, 128).spec,
        "nvfp4 a16": nvfp4_weight(64, 128, inputs=False).spec,
        "mxfp8": mxfp8_weight(64, 128, inputs=True).spec,
        "mxfp8 a16": mxfp8_weight(64, 128).spec,
        "mxfp4": described(MXFP4Packed(), MXFP4, quantised(64, 128, MXFP4, 1)).spec,
        "mxfp4 a16": described(MXFP4Packed(), MXFP4_A16, quantised(64, 128, MXFP4_A16, 1)).spec,
        "fp8": fp8_weight(64, 128).spec,
    }
    layouts: list[tuple[Layout, set[str]]] = [
        (MarlinNVFP4(), {"nvfp4", "nvfp4 a16"}),
        (MarlinNVFP4Half(), {"nvfp4", "nvfp4 a16"}),
        (NVFP4Cutlass(), {"nvfp4"}),
        (MarlinFP8(), {"fp8"}),
        (MarlinFP8Half(), {"fp8"}),
        (MarlinMXFP8(), {"mxfp8", "mxfp8 a16"}),
        (MXFP8Swizzled(), {"mxfp8"}),
        (MXFP4Swizzled(), {"mxfp4"}),
    ]
    assert len({layout.name for layout, _ in layouts}) == len(layouts)
    for layout, taken in layouts:
        for name, spec in weights.items():
            support = layout.supports(spec)
            assert bool(support) == (name in taken), (layout.name, name)
            assert "\n" not in support.reason
            table = layout.supports(replace(spec, embedding=True))
            assert table.other_kind
    assert "input_global_scale" in NVFP4Cutlass().supports(weights["nvfp4 a16"]).reason
    spec = fp8_weight(64, 256, strategy="block", block_structure=[128, 256]).spec
    assert "128 x 256" in MarlinFP8().supports(spec).reason


def refuse(layout: Layout, weight: QuantizedWeight, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.encode(weight)


def test_scales_no_kernel_reads() -> None:
    layouts: list[Layout] = [MarlinNVFP4(), MarlinNVFP4Half(), NVFP4Cutlass()]
    for layout in layouts:
        weight = nvfp4_weight(64, 128)
        assert weight.scale is not None
        weight.scale.view(torch.uint8)[5, 3] = 0x88
        refuse(layout, weight, r"weight_scale\[5, 3\] is -0.0156")
    weight = nvfp4_weight(64, 128)
    weight.side["weight_global_scale"] = torch.tensor([1e-4])
    refuse(MarlinNVFP4(), weight, "is inf in float32")
    weight.side["input_global_scale"] = torch.tensor([1e-36])
    refuse(NVFP4Cutlass(), weight, "give a factor of inf")
    weight = fp8_weight(64, 128)
    weight.scale = torch.full((64, 1), 300.0, dtype=torch.bfloat16)
    refuse(MarlinFP8(), weight, r"weight_scale\[0, 0\] is 300.0")
    weight = fp8_weight(64, 256, strategy="block", block_structure=[128, 128])
    weight.scale = weight.scale[:, :1] if weight.scale is not None else None
    refuse(MarlinFP8(), weight, "256 columns in blocks of 128 have 1 scales")


def changed(name: str, value: int = 1) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(torch.uint8).view(-1)[0] ^= value

    return change


@pytest.mark.parametrize("name", ["weight_global_scale", "weight_global_scale_source"])
def test_a_damaged_global_scale_is_noticed(name: str) -> None:
    weight = nvfp4_weight(64, 128)
    made = {key: tensor.clone() for key, tensor in MarlinNVFP4().encode(weight).items()}
    changed(name, 4)(made)
    with pytest.raises(ValueError, match="is not one that the source's"):
        MarlinNVFP4().decode(made, weight.spec)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_lost"])
def test_damaged_scales_do_not_encode_to_themselves(name: str) -> None:
    weight = nvfp4_weight(64, 128)
    layout = MarlinNVFP4()
    made = {key: tensor.clone() for key, tensor in layout.encode(weight).items()}
    raw, wrong = made[name].view(-1), 0
    for at in range(0, raw.numel(), 5):
        for bit in (1, 8, 128):
            raw[at] ^= bit
            try:
                back = layout.decode(made, weight.spec)
                again = layout.encode(back)
            except ValueError:
                wrong += 1
            else:  # another weight that is one, or it is noticed
                told = any(not same_bits(again[key], made[key]) for key in made)
                assert told or not same(back, weight)
                wrong += told
            raw[at] ^= bit
    assert wrong
