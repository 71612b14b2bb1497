"""Machete, W4A8-FP8, Humming and CPU layouts: what they take, make, and give back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file

from ctconvert.layouts.base import Layout
from ctconvert.layouts.cpu import CPUW4A8, CPUW4A16, CPUInt8
from ctconvert.layouts.humming import Humming, HummingNVFP4
from ctconvert.layouts.machete import Machete
from ctconvert.layouts.w4a8_fp8 import ACTIVATIONS, W4A8FP8
from ctconvert.specs import QuantizedWeight, WeightSpec
from ctconvert.transforms.dtypes import same_bits, spec_of, torch_dtype
from ctconvert.transforms.packed import pack

GOLDEN = Path(__file__).parent.parent / "golden"
LAYOUTS = (Machete(), W4A8FP8(), Humming(), HummingNVFP4(), CPUW4A16(), CPUW4A8(), CPUInt8())


def wna16(n: int, k: int, bits: int = 4, group: int | None = 128, **fields: Any) -> WeightSpec:
    defaults = {
        "format": "pack-quantized",
        "family": "wna16",
        "kind": "int",
        "storage": "packed",
        "strategy": "group" if group else "channel",
        "scale_dtype": "BF16",
        "scale_shape": (n, k // group if group else 1),
    }
    return WeightSpec(n=n, k=k, bits=bits, group_size=group, **defaults | fields)


def w4a8_fp8(n: int, k: int, **fields: Any) -> WeightSpec:
    defaults = {"family": "other", "input_type": "F8_E4M3", "activations": ACTIVATIONS}
    return wna16(n, k, **defaults | fields)


def nvfp4(n: int, k: int, **fields: Any) -> WeightSpec:
    defaults = {
        "format": "nvfp4-pack-quantized",
        "family": "nvfp4",
        "kind": "float",
        "strategy": "tensor_group",
        "scale_dtype": "F8_E4M3",
        "side": (("weight_global_scale", "F32"), ("input_global_scale", "F32")),
    }
    return wna16(n, k, group=16, **defaults | fields)


def int8(n: int, k: int, **fields: Any) -> WeightSpec:
    defaults = {
        "format": "int-quantized",
        "family": "w8a8",
        "storage": "plain",
        "element": "I8",
        "input_type": "I8",
        "activations": "int8 dynamic token in",
    }
    return wna16(n, k, bits=8, group=None, **defaults | fields)


STATIC = (("input_scale", "BF16"), ("output_scale", "F32"))
PLAIN = {"format": "int-quantized", "storage": "plain", "element": "I8"}
CASES: list[tuple[Layout, WeightSpec]] = [
    (Machete(), wna16(256, 384)),
    (Machete(), wna16(128, 192, group=64, symmetric=False)),
    (Machete(), wna16(128, 320, bits=8, group=None, scale_dtype="F16", symmetric=False)),
    (Machete(), wna16(128, 320, bits=8, group=None, family="wna8o8", side=STATIC, **PLAIN)),
    (W4A8FP8(), w4a8_fp8(256, 384)),
    (W4A8FP8(), w4a8_fp8(128, 128, scale_dtype="F32", **PLAIN)),
    (W4A8FP8(), w4a8_fp8(128, 256, scale_dtype="F16")),
    (Humming(), wna16(256, 384)),
    (Humming(), wna16(512, 128, group=32, symmetric=False, scale_dtype="F16")),
    (Humming(), wna16(256, 128, bits=8, group=None, **PLAIN)),
    (Humming(), wna16(256, 384, bits=8, scale_dtype="F16", family="wna8o8", side=STATIC)),
    (HummingNVFP4(), nvfp4(256, 384)),
    (HummingNVFP4(), nvfp4(512, 128, side=(("weight_global_scale", "F32"),))),
    (CPUW4A16(), wna16(96, 160, group=32)),
    (CPUW4A16(), wna16(32, 96, group=6, symmetric=False)),
    (CPUW4A16(), wna16(64, 96, group=None, scale_dtype="F16", side=STATIC, **PLAIN)),
    (CPUW4A8(), wna16(96, 160, group=32)),
    (CPUW4A8(), wna16(64, 512, group=256, symmetric=False, scale_dtype="F32")),
    (CPUW4A8(), wna16(32, 384, group=None, family="w4a8", scale_dtype="F16", **PLAIN)),
    (CPUW4A8(), wna16(32, 96, group=None, symmetric=False)),
    (CPUInt8(), int8(96, 160)),
    (CPUInt8(), int8(32, 64, scale_dtype="F32", storage="packed", element="I32")),
]


def weight_of(spec: WeightSpec, seed: int = 0) -> QuantizedWeight:
    torch.manual_seed(seed)
    codes = torch.randint(0, 1 << spec.bits, (spec.n, spec.k)).to(torch.uint8)
    if spec.storage == "packed":
        codes = pack(codes, spec.bits)
    else:
        codes = (codes.to(torch.int16) - (1 << spec.bits - 1)).to(torch.int8)
    assert spec.scale_dtype is not None
    assert spec.scale_shape is not None
    scale = torch.rand(spec.scale_shape).to(torch_dtype(spec.scale_dtype))
    zero_point = None
    if not spec.symmetric:
        zero_point = torch.randint(0, 1 << spec.bits, spec.scale_shape).to(torch.uint8)
    side = {name: torch.rand(1).to(torch_dtype(dtype)) + 1 for name, dtype in spec.side}
    return QuantizedWeight(spec, codes=codes, scale=scale, zero_point=zero_point, side=side)


@pytest.mark.parametrize(("layout", "spec"), CASES, ids=lambda value: getattr(value, "name", None))
def test_there_and_back(layout: Layout, spec: WeightSpec) -> None:
    assert layout.supports(spec), layout.supports(spec).reason
    assert layout.padded_shape(spec) == (spec.n, spec.k)
    weight = weight_of(spec)
    made = layout.encode(weight)
    assert {name: spec_of(tensor) for name, tensor in made.items()} == layout.output_specs(spec)
    assert all(tensor.is_contiguous() for tensor in made.values())
    assert set(layout.views(spec)) <= set(made)
    assert set(made) - {name for name, _ in spec.side} <= set(layout.writes.split(", "))
    back = layout.decode(made, spec).tensors()
    expected = weight.tensors()
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(back[name], tensor), name


def test_every_layout_has_a_case() -> None:
    assert {layout.name for layout, _ in CASES} == {layout.name for layout in LAYOUTS}


@pytest.mark.parametrize(
    ("layout", "spec", "padded"),
    [
        (Machete(), wna16(100, 320, group=64), (128, 320)),
        (Machete(), wna16(129, 72, group=None), (256, 128)),
        (W4A8FP8(), w4a8_fp8(100, 384), (128, 384)),
        (Humming(), wna16(257, 160, group=32), (512, 256)),
        (HummingNVFP4(), nvfp4(64, 144), (256, 256)),
        (CPUW4A16(), wna16(40, 72, group=None), (64, 96)),
        (CPUW4A8(), wna16(40, 160, group=32), (64, 160)),
        (CPUW4A8(), wna16(40, 160, group=None), (64, 256)),
        (CPUW4A8(), wna16(40, 72, group=None), (64, 96)),
        (CPUInt8(), int8(33, 65), (64, 96)),
    ],
)
def test_padded(layout: Layout, spec: WeightSpec, padded: tuple[int, int]) -> None:
    assert layout.supports(spec)
    assert layout.padded_shape(spec) == padded
    n, k = padded
    groups = k // spec.group_size if spec.group_size else 1
    whole = replace(spec, n=n, k=k, scale_shape=(n, groups))
    assert layout.supports(whole)
    weight = weight_of(whole)
    assert weight.scale is not None
    weight.codes[spec.n :] = 0
    weight.scale.view(torch.uint8)[spec.n :] = 0
    made = layout.encode(weight)
    assert {name: spec_of(tensor) for name, tensor in made.items()} == layout.output_specs(whole)
    assert same_bits(layout.decode(made, whole).codes, weight.codes)


@pytest.mark.parametrize(
    ("layout", "spec", "reason"),
    [
        (Machete(), wna16(128, 128, bits=2), "2-bit codes"),
        (Machete(), wna16(128, 128, scale_dtype="F32"), "F32 scales"),
        (Machete(), wna16(128, 128, group=32), "group size 32"),
        (Machete(), wna16(128, 128, has_g_idx=True), "act-order"),
        (Machete(), wna16(128, 132, group=None), "K = 132"),
        (Machete(), wna16(128, 128, embedding=True), "embedding"),
        (Machete(), int8(128, 128), "not weight-only"),
        (W4A8FP8(), wna16(128, 128), "not W4A8-FP8"),
        (W4A8FP8(), w4a8_fp8(128, 128, embedding=True), "embedding"),
        (W4A8FP8(), w4a8_fp8(128, 128, symmetric=False), "asymmetric"),
        (W4A8FP8(), w4a8_fp8(128, 128, group=64), "group size 64"),
        (W4A8FP8(), w4a8_fp8(128, 128, group=None), "strategy channel"),
        (W4A8FP8(), w4a8_fp8(128, 128, activations="fp8 static tensor in"), "static"),
        (W4A8FP8(), w4a8_fp8(128, 128, has_g_idx=True), "act-order"),
        (W4A8FP8(), w4a8_fp8(128, 128, scale_dtype="F8_E4M3"), "F8_E4M3 scales"),
        (Humming(), wna16(256, 128, bits=8, symmetric=False), "asymmetric 8-bit"),
        (Humming(), wna16(256, 128, bits=3), "3-bit"),
        (Humming(), wna16(256, 128, scale_dtype="F32"), "F32 scales"),
        (Humming(), wna16(256, 128, group=16), "group size 16"),
        (Humming(), wna16(256, 132, group=None), "K = 132"),
        (Humming(), wna16(256, 128, has_g_idx=True), "act-order"),
        (Humming(), nvfp4(256, 128), "not weight-only"),
        (HummingNVFP4(), wna16(256, 128), "not NVFP4"),
        (HummingNVFP4(), nvfp4(256, 128, embedding=True), "embedding"),
        (CPUW4A16(), wna16(32, 128, bits=8), "8-bit"),
        (CPUW4A16(), wna16(32, 96, group=3), "group size 3"),
        (CPUW4A16(), wna16(32, 40, group=10), "padded to 64"),
        (CPUW4A16(), wna16(32, 128, scale_dtype="F32"), "F32 scales"),
        (CPUW4A16(), wna16(32, 128, has_g_idx=True), "act-order"),
        (CPUW4A16(), wna16(32, 36, group=None), "K = 36"),
        (CPUW4A8(), wna16(32, 128, group=16), "group size 16"),
        (CPUW4A8(), wna16(32, 320, group=160), "group size 160"),
        (CPUW4A8(), wna16(32, 128, family="wna8o8", side=STATIC), "static"),
        (CPUW4A8(), wna16(32, 128, scale_dtype="F8_E4M3"), "F8_E4M3 scales"),
        (CPUInt8(), wna16(32, 128), "not INT8"),
        (CPUInt8(), int8(32, 128, symmetric=False), "asymmetric weights"),
        (CPUInt8(), int8(32, 128, side=STATIC), "static"),
        (CPUInt8(), int8(32, 128, input_symmetric=False), "asymmetric activations"),
        (CPUInt8(), int8(32, 128, strategy="group"), "strategy group"),
        (CPUInt8(), int8(32, 130, storage="packed"), "K = 130"),
    ],
)
def test_refuses(layout: Layout, spec: WeightSpec, reason: str) -> None:
    support = layout.supports(spec)
    assert not support
    assert reason in support.reason
    assert "\n" not in support.reason


@pytest.mark.parametrize(
    ("layout", "spec", "name"),
    [
        (Machete(), wna16(128, 128, symmetric=False), "zeros"),
        (Machete(), wna16(128, 128, symmetric=False), "zero_point_source"),
        (W4A8FP8(), w4a8_fp8(128, 128), "weight_scale"),
        (W4A8FP8(), w4a8_fp8(128, 128), "weight_chan_scale"),
        (HummingNVFP4(), nvfp4(256, 128), "weight_scale_2"),
        (CPUW4A8(), wna16(32, 128), "qweight"),
        (CPUW4A8(), wna16(32, 128), "qzeros"),
        (CPUW4A8(), wna16(32, 128), "scales"),
        (CPUInt8(), int8(32, 128), "weight"),
        (CPUInt8(), int8(32, 128), "weight_scale"),
    ],
)
def test_decode_refuses_what_was_not_encoded(layout: Layout, spec: WeightSpec, name: str) -> None:
    made = layout.encode(weight_of(spec))
    made[name] = made[name].clone()
    made[name].view(-1).view(torch.uint8)[0] ^= 1
    with pytest.raises(ValueError, match=r"sum|zero|scale"):
        layout.decode(made, spec)


# ------------------------------------------------------------------- the libraries' own tensors


def test_golden_humming() -> None:
    golden = load_file(GOLDEN / "w4a8_humming.safetensors")
    for case, bits in (("int4", 4), ("int8", 8)):
        spec = wna16(256, 256, bits=bits)
        codes, scale = (golden[f"humming.{case}.in_weight_{x}"] for x in ("packed", "scale"))
        made = Humming().encode(QuantizedWeight(spec, codes=codes, scale=scale))
        for name in ("weight", "weight_scale"):
            assert torch.equal(made[name], golden[f"humming.{case}.out_{name}"])


def test_golden_humming_nvfp4() -> None:
    golden = {
        name.removeprefix("humming.nvfp4."): tensor
        for name, tensor in load_file(GOLDEN / "w4a8_humming.safetensors").items()
        if name.startswith("humming.nvfp4.")
    }
    spec = nvfp4(256, 256, side=(("weight_global_scale", "F32"),))
    weight = QuantizedWeight(
        spec,
        codes=golden["in_weight_packed"].view(torch.int32),
        scale=golden["in_weight_scale"].view(torch.float8_e4m3fn),
        side={"weight_global_scale": golden["in_weight_global_scale"]},
    )
    made = HummingNVFP4().encode(weight)
    assert torch.equal(made["weight"], golden["out_weight"])
    assert torch.equal(made["weight_scale"].view(torch.uint8), golden["out_weight_scale"])
    assert torch.equal(made["weight_scale_2"], golden["out_weight_scale_2"])


def test_golden_w4a8_fp8() -> None:
    golden = load_file(GOLDEN / "w4a8_humming.safetensors")
    start = "w4a8_fp8.N256.K512."
    codes = pack(golden[start + "codes"], 4)
    weight = QuantizedWeight(w4a8_fp8(256, 512), codes=codes, scale=golden[start + "scale"])
    made = W4A8FP8().encode(weight)
    assert torch.equal(made["weight"], golden[start + "out_weight"])
    assert torch.equal(made["weight_chan_scale"], golden[start + "out_chan"])
    assert torch.equal(made["weight_scale"].view(torch.uint8), golden[start + "out_scale_u8"])


def test_golden_cpu() -> None:
    golden = load_file(GOLDEN / "cpu_layouts.safetensors")
    start = "cpu_w4a8.N64.K256.G64."
    weight = QuantizedWeight(
        wna16(64, 256, group=64, symmetric=False),
        codes=pack(golden[start + "codes"], 4),
        scale=golden[start + "scale"],
        zero_point=golden[start + "zeros"],
    )
    made = CPUW4A8().encode(weight)
    for name, key in (("qweight", "w"), ("scales", "s"), ("qzeros", "z")):
        assert torch.equal(made[name], golden[start + key]), name
    codes = pack(golden["cpu_w4a16.codes"], 4)
    weight = QuantizedWeight(wna16(64, 128, group=32), codes=codes, scale=golden["cpu_w4a16.scale"])
    assert torch.equal(CPUW4A16().encode(weight)["qweight"], golden["cpu_w4a16.q"])
    values = golden["int8_amx.N64.K128.in"]
    weight = QuantizedWeight(
        int8(64, 128), codes=values, scale=torch.ones((64, 1), dtype=torch.bfloat16)
    )
    assert torch.equal(CPUInt8().encode(weight)["weight"], golden["int8_amx.N64.K128.out"])
