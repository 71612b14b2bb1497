"""FP8 and MXFP8 for Marlin: golden vectors, the definition of the scales, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctconvert.transforms.fp8_marlin import fp8_marlin_scales, fp8_marlin_scales_back
from ctconvert.transforms.marlin import marlin_pack, marlin_unpack
from ctconvert.transforms.nvfp4 import tile_scales, untile_scales

GOLDEN = Path(__file__).parents[1] / "golden" / "nvfp4_fp8.safetensors"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
POWERS = {torch.bfloat16: 120, torch.float16: 8}
GROUPED = [i + 8 * j for i in range(8) for j in range(8)]
CHANNELWISE = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


def naive(scale: torch.Tensor, dtype: torch.dtype, n: int, rows: int) -> list[list[float]]:
    cast = scale.to(dtype).double().tolist()
    groups = len(cast[0])
    order = CHANNELWISE if groups == 1 else GROUPED
    made = []
    for group in range(groups):
        row = [cast[at // rows][group] * 2.0 ** POWERS[dtype] for at in range(n)]
        made.append(
            [row[at // len(order) * len(order) + order[at % len(order)]] for at in range(n)]
        )
    return made


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
def test_golden(dtype: str, kind: str) -> None:
    vectors = load_file(GOLDEN)
    found = {
        key.rpartition(".")[2]: tensor
        for key, tensor in vectors.items()
        if key.startswith(f"fp8_marlin.{dtype}.{kind}.")
    }
    codes = found["weight_u8"]
    n, k = codes.shape
    assert torch.equal(marlin_pack(codes.view(torch.int32), 8), found["out_weight"])
    back = marlin_unpack(found["out_weight"], 8, n, k).view(torch.uint8)
    assert torch.equal(back, codes)
    scale, rows = found["weight_scale"], 128 if kind == "block" else 1
    if kind == "tensor":
        scale = scale.expand(n, 1)
    made = fp8_marlin_scales(scale, DTYPES[dtype], n, rows)
    assert torch.equal(made, found["out_scale"])
    if dtype == "bfloat16":
        assert torch.equal(fp8_marlin_scales_back(made, rows), scale)


def test_golden_mxfp8() -> None:
    vectors = load_file(GOLDEN)
    codes, scales = vectors["mxfp8_marlin.weight_u8"], vectors["mxfp8_marlin.scale_u8"]
    assert torch.equal(marlin_pack(codes.view(torch.int32), 8), vectors["mxfp8_marlin.out_weight"])
    assert torch.equal(tile_scales(scales), vectors["mxfp8_marlin.out_scale_u8"])
    assert torch.equal(untile_scales(vectors["mxfp8_marlin.out_scale_u8"]), scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("n", "rows", "groups"), [(64, 1, 1), (192, 1, 1), (192, 128, 3), (64, 128, 1), (320, 64, 5)]
)
def test_the_definition(
    dtype: torch.dtype, source: torch.dtype, n: int, rows: int, groups: int
) -> None:
    made = torch.Generator().manual_seed(n)
    scale = torch.exp2(torch.rand((-(-n // rows), groups), generator=made) * 30 - 24).to(source)
    scale[0, 0] = 0
    scale[-1, -1] = -3
    packed = fp8_marlin_scales(scale, dtype, n, rows)
    assert packed.dtype == dtype
    assert packed.is_contiguous()
    assert packed.double().tolist() == naive(scale, dtype, n, rows)
    assert torch.equal(fp8_marlin_scales_back(packed, rows), scale.to(dtype))


def test_every_scale_below_256() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
        scale = bits.view(dtype).view(-1, 1)
        scale = torch.where(scale.abs() < 256, scale, torch.ones_like(scale))
        packed = fp8_marlin_scales(scale, dtype, scale.shape[0])
        back = fp8_marlin_scales_back(packed)
        assert torch.equal(back.view(torch.int16), scale.view(torch.int16))


def test_refused() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for value in (256.0, -256.0, float("inf"), float("nan")):
            scale = torch.ones((64, 2))
            scale[9, 1] = value
            with pytest.raises(ValueError, match=rf"weight_scale\[9, 1\] is {value}; the kernel"):
                fp8_marlin_scales(scale, dtype, 64)
    ones = torch.ones((64, 1), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        fp8_marlin_scales(ones, torch.float32, 64)
    with pytest.raises(ValueError, match="float16, bfloat16 or float32"):
        fp8_marlin_scales(ones.double(), torch.bfloat16, 64)
    with pytest.raises(ValueError, match=r"are \[1, groups\], not \[64, 1\]"):
        fp8_marlin_scales(ones, torch.bfloat16, 64, 128)
    with pytest.raises(ValueError, match="multiple of 64"):
        fp8_marlin_scales(ones[:32], torch.bfloat16, 32)
    packed = fp8_marlin_scales(torch.ones((1, 2), dtype=torch.bfloat16), torch.bfloat16, 64, 128)
    packed[1, 5] = 7
    with pytest.raises(ValueError, match="differ"):
        fp8_marlin_scales_back(packed, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "rows", "groups"), [(8192, 1, 1), (7168, 128, 144), (576, 128, 56)])
def test_gpu(dtype: torch.dtype, n: int, rows: int, groups: int) -> None:
    scale = torch.exp2(torch.rand((-(-n // rows), groups)) * 150 - 143)
    packed = fp8_marlin_scales(scale, dtype, n, rows)
    made = fp8_marlin_scales(scale.cuda(), dtype, n, rows)
    assert torch.equal(made.cpu(), packed)
    back = fp8_marlin_scales_back(made, rows).cpu()
    assert torch.equal(back, fp8_marlin_scales_back(packed, rows))
    assert torch.equal(back, scale.to(dtype))
