"""Humming's layout for 16-bit activations: golden vectors and definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.naive import GOLDEN, codes_of, random_words, words_of

from ctconvert.transforms.humming import (
    humming_global_scale,
    humming_pack,
    humming_pack_zero_points,
    humming_padded_shape,
    humming_permute_scales,
    humming_unpack,
    humming_unpack_zero_points,
    humming_unpermute_scales,
)
from ctconvert.transforms.packed import unpack
from ctconvert.transforms.recode import humming_bytes, restore_bytes

pytest_plugins = ("support.transform_paths",)
pytestmark = pytest.mark.usefixtures("poisoned")

BF16 = torch.bfloat16
N, K = 256, 256
GROUPED = [i + 8 * j for i in range(8) for j in range(8)]


def golden(case: str) -> dict[str, torch.Tensor]:
    start = f"humming.{case}."
    found = load_file(GOLDEN / "w4a8_humming.safetensors")
    return {name.removeprefix(start): t for name, t in found.items() if name.startswith(start)}


@pytest.mark.parametrize(
    ("case", "bits"), [("int4", 4), ("int4_asym", 4), ("int8", 8), ("nvfp4", 4)]
)
def test_golden(case: str, bits: int, either_path: str) -> None:
    vectors = golden(case)
    words = vectors["in_weight_packed"].view(torch.int32)
    assert torch.equal(humming_pack(words, bits, BF16), vectors["out_weight"])
    assert torch.equal(humming_unpack(vectors["out_weight"], bits, N, K, BF16), words)
    scales = vectors["in_weight_scale"].t().contiguous()
    assert torch.equal(humming_permute_scales(scales), vectors["out_weight_scale"])
    assert torch.equal(humming_unpermute_scales(vectors["out_weight_scale"]), scales)


def test_golden_zero_points() -> None:
    vectors = golden("int4_asym")
    codes = unpack(vectors["in_weight_zero_point"].t().contiguous(), 4, N)
    packed = vectors["out_zero_point"]
    assert torch.equal(humming_pack_zero_points(codes, 4), packed)
    assert torch.equal(humming_unpack_zero_points(packed, 4), codes)


def test_golden_global_scale() -> None:
    vectors = golden("nvfp4")
    factor = humming_global_scale(vectors["in_weight_global_scale"])
    assert torch.equal(factor, vectors["out_weight_scale_2"])


@pytest.mark.parametrize("shape", [(2,), (6, 10), (4, 40000)])
def test_bytes(shape: tuple[int, ...], either_path: str) -> None:
    words = random_words(1, 4 * int(np.prod(shape)), 8).view(shape)
    flat = codes_of(words.view(1, -1), 8).astype(int)
    mapped = np.where(flat >= 128, flat - 128, 255 - flat)
    made = words.clone()
    humming_bytes(made)
    assert torch.equal(made, words_of(mapped, 8).view(shape))
    restore_bytes(made)
    assert torch.equal(made, words)


def test_bytes_are_all_256(either_path: str) -> None:
    words = torch.arange(256).to(torch.uint8).view(torch.int32)
    humming_bytes(words)
    expected = [255 - u if u < 128 else u - 128 for u in range(256)]
    assert words.view(torch.uint8).tolist() == expected


def test_only_bf16_int8_is_mapped() -> None:
    words = random_words(N, K, 8)
    assert not torch.equal(humming_pack(words, 8, BF16), humming_pack(words, 8, torch.float16))
    words = random_words(N, K, 4)
    assert torch.equal(humming_pack(words, 4, BF16), humming_pack(words, 4, torch.float16))
    for bits in (4, 8):
        for dtype in (BF16, torch.float16):
            words = random_words(N, K, bits)
            tiles = humming_pack(words, bits, dtype)
            assert torch.equal(humming_unpack(tiles, bits, N, K, dtype), words)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_zero_points(bits: int, groups: int) -> None:
    stored = 4 if bits <= 4 else 8
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (groups, 192), generator=generator).to(torch.uint8)
    order = [at + p for at in range(0, 192, 64) for p in GROUPED]
    packed = humming_pack_zero_points(codes, bits)
    assert torch.equal(packed, words_of(codes.numpy()[:, order], stored))
    assert torch.equal(humming_unpack_zero_points(packed, bits), codes)


def test_refuses() -> None:
    words = torch.zeros((64, 8), dtype=torch.int32)
    with pytest.raises(ValueError, match="float16 or"):
        humming_pack(words, 4, torch.float32)
    with pytest.raises(ValueError, match="float16 or"):
        humming_unpack(words, 4, 64, 64, torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        humming_pack_zero_points(torch.zeros((1, 64), dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="multiple of 64"):
        humming_pack_zero_points(torch.zeros((1, 32), dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="16 is outside"):
        humming_pack_zero_points(torch.full((1, 64), 16, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match=r"torch\.int32"):
        humming_unpack_zero_points(torch.zeros((1, 64), dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="even number"):
        humming_bytes(torch.zeros(3, dtype=torch.int32))
    for divisor in (0.0, float("inf"), float("nan"), 1e-45):
        with pytest.raises(ValueError, match="reciprocal"):
            humming_global_scale(torch.tensor([divisor]))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        humming_global_scale(torch.ones(1, dtype=BF16))


def test_padded_shape() -> None:
    assert humming_padded_shape(1, 1) == (256, 128)
    assert humming_padded_shape(512, 384) == (512, 384)
    assert humming_padded_shape(513, 385) == (768, 512)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(256, 128), (4096, 4096), (1024, 14336), (28672, 8192)])
def test_gpu(bits: int, n: int, k: int) -> None:
    words = random_words(n, k, bits)
    tiles = humming_pack(words, bits, BF16)
    assert torch.equal(humming_pack(words.cuda(), bits, BF16).cpu(), tiles)
    assert torch.equal(humming_unpack(tiles.cuda(), bits, n, k, BF16).cpu(), words)
