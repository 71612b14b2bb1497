"""CUTLASS' W4A8-FP8: golden vectors, the layout's definition, the kernel's own results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.naive import GOLDEN, codes_of, placed, random_words, words_of

from ctconvert.transforms.w4a8_fp8 import w4a8_fp8_pack, w4a8_fp8_scales, w4a8_fp8_unpack

pytest_plugins = ("support.transform_paths",)
pytestmark = pytest.mark.usefixtures("poisoned")

CASES = ((128, 128), (256, 512), (384, 256))
FP8 = torch.float8_e4m3fn


def golden(n: int, k: int) -> dict[str, torch.Tensor]:
    start = f"w4a8_fp8.N{n}.K{k}."
    found = load_file(GOLDEN / "w4a8_humming.safetensors")
    return {name.removeprefix(start): t for name, t in found.items() if name.startswith(start)}


def encoded(codes: np.ndarray) -> torch.Tensor:
    rows, columns = codes.shape
    nibbles = np.zeros_like(codes)
    for code in range(16):
        q = code - 8
        nibbles[codes == code] = 8 - q if q > 0 else q % 16
    n, k = np.indices(codes.shape)
    place = 512 * (n // 16 + rows // 16 * (k // 32)) + 16 * ((k // 4) % 4 + 4 * (n % 8))
    place += k % 4 + 4 * ((n // 8) % 2) + 8 * ((k // 16) % 2)
    return words_of(placed(nibbles, place), 4).view(rows, columns // 8)


@pytest.mark.parametrize(("n", "k"), CASES)
def test_golden_codes(n: int, k: int, either_path: str) -> None:
    vectors = golden(n, k)
    words = words_of(vectors["codes"].numpy(), 4)
    assert torch.equal(w4a8_fp8_pack(words), vectors["out_weight"])
    assert torch.equal(w4a8_fp8_unpack(vectors["out_weight"], n, k), words)


@pytest.mark.parametrize(("n", "k"), CASES)
def test_golden_scales(n: int, k: int) -> None:
    vectors = golden(n, k)
    packed, channel = w4a8_fp8_scales(vectors["scale"])
    assert packed.dtype == FP8
    assert torch.equal(packed.view(torch.uint8), vectors["out_scale_u8"])
    assert torch.equal(channel, vectors["out_chan"])


@pytest.mark.parametrize(("n", "k"), CASES)
def test_is_what_the_kernel_computes(n: int, k: int) -> None:
    """The prepared tensors, read as their meaning is, give the kernel's own result."""
    vectors = golden(n, k)
    packed, channel = w4a8_fp8_scales(vectors["scale"])
    codes = codes_of(w4a8_fp8_unpack(vectors["out_weight"], n, k), 4)
    table = packed.float().view(k // 128, n, 8).transpose(0, 1)  # -8t .. -1t of [n, group]
    table = torch.cat([table, torch.zeros(n, k // 128, 1)], 2)  # and of q = 0
    q = torch.from_numpy(codes.astype(np.int64)) - 8
    looked_up = table.repeat_interleave(128, 1).gather(2, 8 - q.abs()[..., None])[..., 0]
    q = q.to(torch.float32)
    weight = -q.sign() * looked_up * channel
    x = vectors["x_u8"].view(FP8).float()
    expected = x @ weight.t()
    found = vectors["y"].float()
    assert (found - expected).norm() < 0.01 * expected.norm()
    # The scales' rounding to three bits is what is left against the source's own.
    source = q * vectors["scale"].float().repeat_interleave(128, 1)
    assert (found - x @ source.t()).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(("n", "k"), [(128, 384), (256, 128)])
def test_is_the_definition(n: int, k: int, either_path: str) -> None:
    words = random_words(n, k, 4)
    packed = encoded(codes_of(words, 4))
    assert torch.equal(w4a8_fp8_pack(words), packed)
    assert torch.equal(w4a8_fp8_unpack(packed, n, k), words)


@pytest.mark.parametrize(("n", "k"), [(640, 2176), (384, 4224)])
def test_blocks_of_every_size(n: int, k: int) -> None:
    words = random_words(n, k, 4)
    packed = encoded(codes_of(words, 4))
    assert torch.equal(w4a8_fp8_pack(words), packed)
    assert torch.equal(w4a8_fp8_unpack(packed, n, k), words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_one_by_one(dtype: torch.dtype) -> None:
    scale = (torch.randn(6, 5, generator=torch.Generator().manual_seed(1)) / 30).to(dtype)
    scale[2] = 0
    scale[3, 1] = 0
    packed, channel = w4a8_fp8_scales(scale)
    assert channel.shape == (6, 1)
    for n in range(6):
        c = max(max(abs(v) for v in scale[n].tolist()) / 448, 1 / (448 * 512))
        assert float(channel[n]) == pytest.approx(8 * c, rel=1e-6)
        for g in range(5):
            t = torch.tensor(float(scale[n, g].float() / (channel[n] / 8))).to(FP8).float() / 8
            t = t.to(FP8).float()
            eight = packed[8 * (g * 6 + n) : 8 * (g * 6 + n) + 8]
            made = torch.stack([-(8 - i) * t for i in range(8)]).to(FP8)
            assert torch.equal(eight.view(torch.uint8), made.view(torch.uint8))


def test_refuses() -> None:
    words = torch.zeros((128, 16), dtype=torch.int32)
    for bad, message in (
        (words.to(torch.int64), r"2-D torch\.int32"),
        (words[:64], "N = 64"),
        (words[:, :8], "K = 64"),
    ):
        with pytest.raises(ValueError, match=message):
            w4a8_fp8_pack(bad)
    with pytest.raises(ValueError, match=r"must be \[128, 32\]"):
        w4a8_fp8_unpack(words, 128, 256)
    with pytest.raises(ValueError, match="not finite"):
        w4a8_fp8_scales(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(ValueError, match="f32, f16 or bf16"):
        w4a8_fp8_scales(torch.zeros(4))


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(128, 128), (4096, 4096), (1024, 14336), (28672, 8192)])
def test_gpu(n: int, k: int) -> None:
    words = random_words(n, k, 4)
    packed = w4a8_fp8_pack(words)
    assert torch.equal(w4a8_fp8_pack(words.cuda()).cpu(), packed)
    assert torch.equal(w4a8_fp8_unpack(packed.cuda(), n, k).cpu(), words)
    scale = (torch.rand(n, k // 128) / 50).to(torch.bfloat16)
    for here, there in zip(w4a8_fp8_scales(scale), w4a8_fp8_scales(scale.cuda()), strict=True):
        assert torch.equal(here.view(torch.uint8), there.cpu().view(torch.uint8))
