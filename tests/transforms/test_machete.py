"""Machete's prepack: golden vectors, the layout's definition, both paths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.naive import GOLDEN, bit, codes_of, placed, random_words, words_of

from ctconvert.transforms.machete import (
    check_shape,
    machete_pack,
    machete_padded_shape,
    machete_unpack,
    machete_zero_points,
)

pytest_plugins = ("support.transform_paths",)
pytestmark = pytest.mark.usefixtures("poisoned")

BLOCK = {
    4: ("n3", "k3", "k0", "k4", "k5", "k1", "k2", "n0", "n1", "n2"),
    8: ("k0", "n3", "k3", "k4", "k5", "k1", "k2", "n0", "n1", "n2"),
}


def prepacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    codes = codes_of(words, bits)
    n, k = np.indices(codes.shape)
    place = 1024 * (n // 16 + codes.shape[0] // 16 * (k // 64))
    for number, name in enumerate(BLOCK[bits]):
        place += bit(n if name[0] == "n" else k, int(name[1])) << number
    return words_of(placed(codes, place), bits).view(codes.shape[1] * bits // 32, codes.shape[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("kind", "bits"), [("u4b8", 4), ("u8b128", 8)])
def test_golden(kind: str, bits: int, dtype: str, either_path: str) -> None:
    golden = load_file(GOLDEN / "machete_prepack.safetensors")
    words = golden[f"machete_prepack.{kind}.{dtype}.K128.N128.in"].t().contiguous()
    packed = golden[f"machete_prepack.{kind}.{dtype}.K128.N128.out"]
    assert torch.equal(machete_pack(words, bits), packed)
    assert torch.equal(machete_unpack(packed, bits, 128, 128), words)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(128, 64), (384, 192), (128, 320)])
def test_is_the_definition(bits: int, n: int, k: int, either_path: str) -> None:
    words = random_words(n, k, bits)
    packed = prepacked(words, bits)
    assert torch.equal(machete_pack(words, bits), packed)
    assert torch.equal(machete_unpack(packed, bits, n, k), words)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(640, 2176), (128, 4352), (1408, 64)])
def test_blocks_of_every_size(bits: int, n: int, k: int) -> None:
    words = random_words(n, k, bits)
    packed = prepacked(words, bits)
    assert torch.equal(machete_pack(words, bits), packed)
    assert torch.equal(machete_unpack(packed, bits, n, k), words)


@pytest.mark.parametrize(("n", "k"), [(0, 64), (128, 0)])
def test_of_nothing(n: int, k: int, either_path: str) -> None:
    packed = machete_pack(torch.zeros((n, k // 8), dtype=torch.int32), 4)
    assert packed.shape == (k // 8, n)
    assert machete_unpack(packed, 4, n, k).shape == (n, k // 8)


@pytest.mark.parametrize(
    ("words", "bits", "message"),
    [
        (torch.zeros((128, 8), dtype=torch.int32), 2, "bits must be 4 or 8, not 2"),
        (torch.zeros((128, 8), dtype=torch.int64), 4, r"2-D torch\.int32"),
        (torch.zeros((128, 8, 1), dtype=torch.int32), 4, r"2-D torch\.int32"),
        (torch.zeros((64, 8), dtype=torch.int32), 4, r"N % 128 == 0 and K % 64 == 0.*N = 64"),
        (torch.zeros((128, 8), dtype=torch.int32), 8, "K = 32"),
    ],
)
def test_pack_refuses(words: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        machete_pack(words, bits)


def test_unpack_refuses() -> None:
    packed = torch.zeros((8, 128), dtype=torch.int32)
    for n, k, bits, message in (
        (128, 128, 4, r"must be \[16, 128\], not \[8, 128\]"),
        (128, 64, 8, r"must be \[16, 128\]"),
        (64, 64, 4, "N = 64"),
        (128, 64, 5, "bits must be"),
    ):
        with pytest.raises(ValueError, match=message):
            machete_unpack(packed, bits, n, k)


def test_shapes() -> None:
    check_shape(128, 64)
    with pytest.raises(ValueError, match="K = 96"):
        check_shape(128, 96)
    assert machete_padded_shape(1, 1) == (128, 64)
    assert machete_padded_shape(256, 192) == (256, 192)
    assert machete_padded_shape(257, 193) == (384, 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zero_points(dtype: torch.dtype) -> None:
    scales = (torch.randn(3, 40) / 50).to(dtype)
    codes = torch.randint(0, 256, (3, 40)).to(torch.uint8)
    made = machete_zero_points(scales, codes)
    exact = -scales.double() * codes.double()  # a product of 11 and 8 bits is exact
    assert torch.equal(made, exact.to(dtype))
    with pytest.raises(ValueError, match="16-bit floats"):
        machete_zero_points(scales.float(), codes)
    with pytest.raises(ValueError, match="differ in shape"):
        machete_zero_points(scales[:2], codes)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(128, 64), (4096, 4096), (1024, 14336), (28672, 8192)])
def test_gpu(bits: int, n: int, k: int) -> None:
    words = random_words(n, k, bits)
    packed = machete_pack(words, bits)
    assert torch.equal(machete_pack(words.cuda(), bits).cpu(), packed)
    assert torch.equal(machete_unpack(packed.cuda(), bits, n, k).cpu(), words)
