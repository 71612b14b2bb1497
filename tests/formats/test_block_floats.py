"""nvfp4-pack-quantized and mxfp8-quantized: the producer's tensors, and what is refused."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from support.block_floats import (
    described,
    fp8_weight,
    mxfp8,
    mxfp8_group,
    mxfp8_weight,
    nvfp4,
    nvfp4_group,
    nvfp4_weight,
)

from ctconvert.errors import BadInputError
from ctconvert.formats.mxfp8 import MXFP8Quantized
from ctconvert.formats.nvfp4 import NVFP4Packed
from ctconvert.transforms.dense import dense_weight
from ctconvert.transforms.dtypes import same_bits

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    value = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -value if byte & 0x80 else value


# ----------------------------------------------------------------------------------- nvfp4


@pytest.mark.parametrize("inputs", [True, False])
def test_nvfp4_is_what_the_producer_reads(inputs: bool) -> None:
    tensors = nvfp4(48, 80, inputs=inputs)
    weight = described(NVFP4Packed(), nvfp4_group(inputs), tensors)
    spec = weight.spec
    assert (spec.n, spec.k, spec.family, spec.scale_shape) == (48, 80, "nvfp4", (48, 5))
    names = ["weight_global_scale", "input_global_scale"][: 1 + inputs]
    assert spec.side == tuple((name, "F32") for name in names)
    assert list(weight.side) == names
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    scheme = QuantizationScheme.model_validate(nvfp4_group(inputs))
    wanted = compressor.decompress(dict(tensors), scheme)["weight"]
    assert torch.equal(dense_weight(weight).to(wanted.dtype), wanted)
    assert wanted.abs().max() > 0
    for name, tensor in NVFP4Packed().encode(weight).items():
        assert same_bits(tensor, tensors[name])


def test_nvfp4_element_by_element() -> None:
    tensors = nvfp4(16, 32)
    weight = described(NVFP4Packed(), nvfp4_group(), tensors)
    made, divisor = dense_weight(weight), tensors["weight_global_scale"]
    scales = tensors["weight_scale"].view(torch.uint8)
    for n in range(16):
        for k in range(32):
            code = int(tensors["weight_packed"][n, k // 2]) >> 4 * (k % 2) & 15
            value = torch.tensor([e4m3(int(scales[n, k // 16]))]) / divisor * E2M1[code & 7]
            assert float(made[n, k]) == float(-value if code & 8 else value)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight_packed", torch.zeros((64, 32), dtype=torch.int8), "expected U8"),
        ("weight_packed", torch.zeros((64, 28), dtype=torch.uint8), "does not divide K = 56"),
        ("weight_packed", torch.zeros((64, 0), dtype=torch.uint8), "no elements"),
        ("weight_scale", torch.zeros((64, 4), dtype=torch.uint8), "expected F8_E4M3"),
        ("weight_scale", torch.zeros((64, 5)).to(torch.float8_e4m3fn), r"expected \[64, 4\]"),
        ("weight_scale", None, "weight_scale is missing"),
        ("weight_global_scale", None, "weight_global_scale is missing"),
        ("weight_global_scale", torch.ones(2), "expected one element"),
        ("weight_global_scale", torch.ones(1, dtype=torch.float16), "expected F32"),
        ("weight_global_scale", torch.zeros(1), "is 0; it is a divisor"),
        ("weight_global_scale", torch.tensor([float("inf")]), "must be finite"),
        ("weight_global_scale", torch.tensor([-1.0]), "not negative"),
        ("input_global_scale", None, "input_global_scale is missing"),
        ("input_global_scale", torch.tensor([float("nan")]), "must be finite"),
    ],
)
def test_nvfp4_refuses(name: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = nvfp4(64, 64)
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    with pytest.raises(BadInputError, match=message):
        described(NVFP4Packed(), nvfp4_group(), tensors)


def test_nvfp4_refuses_a_nan_scale() -> None:
    tensors = nvfp4(64, 64)
    for byte in (0x7F, 0xFF):
        tensors["weight_scale"].view(torch.uint8)[3, 1] = byte
        with pytest.raises(ValueError, match=r"weight_scale\[3, 1\] is NaN"):
            described(NVFP4Packed(), nvfp4_group(), tensors)


def test_nvfp4_refuses_other_schemes() -> None:
    group = nvfp4_group()
    for change, message in (
        ({"group_size": 32}, "float4 with group size 32"),
        ({"num_bits": 8}, "float8 with group size 16"),
        ({"symmetric": False}, "no zero points"),
    ):
        with pytest.raises(BadInputError, match=message):
            described(NVFP4Packed(), group | {"weights": group["weights"] | change}, nvfp4(64, 64))


def test_an_uncalibrated_input_scale_is_not_in_use() -> None:
    tensors = nvfp4(64, 64) | {"input_global_scale": torch.zeros(1)}
    weight = described(NVFP4Packed(), nvfp4_group(), tensors)
    assert weight.spec.side == (("weight_global_scale", "F32"),)
    assert "input_global_scale" in NVFP4Packed().parameter_names(weight.spec)


# ----------------------------------------------------------------------------------- mxfp8


@pytest.mark.parametrize("inputs", [True, False])
def test_mxfp8_is_what_the_producer_reads(inputs: bool) -> None:
    tensors = mxfp8(48, 96)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "weight": (torch.float8_e4m3fn, (48, 96)),
        "weight_scale": (torch.uint8, (48, 3)),
    }
    weight = described(MXFP8Quantized(), mxfp8_group(inputs), tensors)
    spec = weight.spec
    assert (spec.n, spec.k, spec.family, spec.scale_shape) == (48, 96, "mxfp8", (48, 3))
    compressor = BaseCompressor.get_value_from_registry("mxfp8-quantized")
    scheme = QuantizationScheme.model_validate(mxfp8_group(inputs))
    wanted = compressor.decompress(dict(tensors), scheme)["weight"]
    assert torch.equal(dense_weight(weight), wanted.float())
    codes, scales = tensors["weight"].view(torch.uint8), tensors["weight_scale"]
    made = dense_weight(weight)
    for n in range(0, 48, 7):
        for k in range(96):
            value = e4m3(int(codes[n, k])) * 2.0 ** (int(scales[n, k // 32]) - 127)
            assert float(made[n, k]) == value
    for name, tensor in MXFP8Quantized().encode(weight).items():
        assert same_bits(tensor, tensors[name])


def test_mxfp8_scales_may_be_a_float_dtype() -> None:
    tensors = mxfp8(64, 64)
    floats = tensors | {"weight_scale": tensors["weight_scale"].view(torch.float8_e8m0fnu)}
    weight = described(MXFP8Quantized(), mxfp8_group(), floats)
    assert weight.spec.scale_dtype == "F8_E8M0"
    assert torch.equal(
        dense_weight(weight), dense_weight(described(MXFP8Quantized(), mxfp8_group(), tensors))
    )


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight", torch.zeros((64, 64), dtype=torch.uint8), "expected F8_E4M3"),
        ("weight", torch.zeros((64, 48)).to(torch.float8_e4m3fn), "does not divide K = 48"),
        ("weight_scale", torch.zeros((64, 3), dtype=torch.uint8), r"expected \[64, 2\]"),
        ("weight_scale", torch.zeros((64, 2)), "expected U8 or F8_E8M0"),
        ("weight_scale", None, "weight_scale is missing"),
    ],
)
def test_mxfp8_refuses(name: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = mxfp8(64, 64)
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    with pytest.raises(BadInputError, match=message):
        described(MXFP8Quantized(), mxfp8_group(), tensors)


def test_mxfp8_refuses_a_nan_scale() -> None:
    tensors = mxfp8(64, 64)
    tensors["weight_scale"][3, 1] = 255
    with pytest.raises(ValueError, match=r"weight_scale\[3, 1\] is NaN"):
        described(MXFP8Quantized(), mxfp8_group(), tensors)


def test_mxfp8_refuses_other_schemes() -> None:
    group = mxfp8_group()
    changed = group | {"weights": group["weights"] | {"group_size": 64}}
    with pytest.raises(BadInputError, match="float8 with group size 64"):
        described(MXFP8Quantized(), changed, mxfp8(64, 64))


# ----------------------------------------------------------------------------------- dense


def test_dense_fp8() -> None:
    for weight in (fp8_weight(48, 80), fp8_weight(48, 80, strategy="tensor")):
        assert weight.scale is not None
        assert torch.equal(dense_weight(weight), weight.codes.float() * weight.scale.float())
    weight = fp8_weight(200, 300, strategy="block", block_structure=[128, 128])
    made = dense_weight(weight)
    assert weight.scale is not None
    for n, k in ((0, 0), (127, 127), (128, 128), (199, 299), (5, 256)):
        scale = weight.scale[n // 128, k // 128].float()
        assert float(made[n, k]) == float(weight.codes[n, k].float() * scale)


def test_families_are_told_apart() -> None:
    assert nvfp4_weight(16, 16).spec.family == "nvfp4"
    assert mxfp8_weight(16, 32).spec.family == "mxfp8"
    assert fp8_weight(16, 32).spec.family == "w8a8"
