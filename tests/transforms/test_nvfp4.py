"""NVFP4 scales for Marlin: golden vectors, references of single bytes, kernels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctconvert.transforms import nvfp4
from ctconvert.transforms.marlin import marlin_pack, marlin_permute_mxfp4_scales
from ctconvert.transforms.nvfp4 import (
    nvfp4_global_scale,
    nvfp4_pack_scales,
    nvfp4_power,
    nvfp4_power_of,
    nvfp4_unpack_scales,
    tile_scales,
    untile_scales,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "nvfp4_fp8.safetensors"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
GROUPED = [i + 8 * j for i in range(8) for j in range(8)]
ORDER = [GROUPED[at + p] for at in range(0, 64, 4) for p in (0, 2, 1, 3)]

pytestmark = pytest.mark.usefixtures("poisoned")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"
)


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of an accelerator, on the CPU."""
    monkeypatch.setattr(nvfp4, "_has_kernels", lambda tensor: True)


def random_scales(n: int, groups: int, greatest: int = 126, seed: int = 0) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    scales = torch.randint(0, greatest + 1, (n, groups), generator=made, dtype=torch.uint8)
    small = torch.rand((n, groups), generator=made) < 0.3
    scales[small] = torch.randint(0, min(8, greatest) + 1, (int(small.sum()),), generator=made).to(
        torch.uint8
    )
    scales[-1, -1] = greatest
    return scales


def e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3, byte & 7
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)


def e5m3(value: float) -> int:
    """The byte of a value as the kernel's half: exponent bias 15 with 2**7 put in, or 0."""
    for byte in range(128, 256):
        if (8 + (byte & 7)) * 2.0 ** ((byte >> 3) - 15 - 3) == value * 2.0**7:
            return byte
    assert value < 2.0**-6
    return 0


def naive_pack(scales: torch.Tensor, power: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = scales.tolist()
    n, groups = len(rows), len(rows[0])
    packed = torch.zeros((groups, n), dtype=torch.uint8)
    lost = torch.zeros((n, -(-groups // 2)), dtype=torch.uint8)
    for group in range(groups):
        for at in range(n):
            row = at // 64 * 64 + ORDER[at % 64]
            packed[group, at] = e5m3(e4m3(rows[row][group]) * 2.0**power)
            if packed[group, at] == 0:
                lost[row, group // 2] |= rows[row][group] << 4 * (group % 2)
    return packed, lost


# --------------------------------------------------------------------------------- scales


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["full", "low"])
def test_golden(dtype: str, kind: str) -> None:
    vectors = load_file(GOLDEN)
    found = {
        key.rpartition(".")[2]: tensor
        for key, tensor in vectors.items()
        if key.startswith(f"nvfp4_marlin.{dtype}.{kind}.")
    }
    words = found["weight_packed"].view(torch.int32)
    assert torch.equal(marlin_pack(words, 4), found["out_weight"])
    scales = found["weight_scale_u8"]
    power = nvfp4_power(scales) if dtype == "bfloat16" else 0
    assert power == (7 if (dtype, kind) == ("bfloat16", "low") else 0)
    packed, lost = nvfp4_pack_scales(scales, power)
    assert torch.equal(packed, found["out_scale_u8"])
    assert torch.equal(nvfp4_unpack_scales(packed, lost, power), scales)
    divisor = found["weight_global_scale"]
    factor = nvfp4_global_scale(divisor, DTYPES[dtype], power)
    assert torch.equal(factor, found["out_global"])
    assert nvfp4_power_of(factor, divisor, DTYPES[dtype]) == power


@pytest.mark.parametrize("power", range(18))
def test_every_byte_with_every_power(power: int) -> None:
    bytes_ = [byte for byte in range(127) if e4m3(byte) * 2.0**power <= 448]
    assert bytes_
    scales = torch.zeros((64, len(bytes_)), dtype=torch.uint8)
    scales[5] = torch.tensor(bytes_)
    packed, lost = nvfp4_pack_scales(scales, power)
    at = ORDER.index(5)
    for group, byte in enumerate(bytes_):
        made = int(packed[group, at])
        assert made == e5m3(e4m3(byte) * 2.0**power), byte
        nibble = int(lost[5, group // 2]) >> 4 * (group % 2) & 15
        assert nibble == (byte if made == 0 else 0), byte
    assert packed.ne(0).sum() == packed[:, at].ne(0).sum()
    assert torch.equal(nvfp4_unpack_scales(packed, lost, power), scales)


@pytest.mark.parametrize(("n", "groups"), [(64, 1), (64, 4), (128, 7), (192, 24), (64, 65)])
@pytest.mark.parametrize(("power", "greatest"), [(0, 126), (1, 118), (2, 110), (4, 90)])
def test_pack_is_the_definition(n: int, groups: int, power: int, greatest: int) -> None:
    scales = random_scales(n, groups, greatest)
    before = scales.clone()
    packed, lost = nvfp4_pack_scales(scales, power)
    for made, wanted in zip((packed, lost), naive_pack(scales, power), strict=True):
        assert torch.equal(made, wanted)
        assert made.is_contiguous()
    assert torch.equal(nvfp4_unpack_scales(packed, lost, power), scales)
    assert torch.equal(scales, before)


@pytest.mark.parametrize(("n", "groups"), [(64 * 19, 1000), (64 * 300, 8), (64, 9000), (1024, 512)])
def test_blocks_of_every_size(n: int, groups: int) -> None:
    scales = random_scales(n, groups)
    scales[: n // 2].clamp_(8)  # whole chunks without a subnormal
    packed, lost = nvfp4_pack_scales(scales, 0)
    columns = torch.arange(n).view(-1, 64)[:, ORDER].flatten()
    wanted = torch.where(scales < 8, 0, scales + 120).t()[:, columns]
    assert torch.equal(packed, wanted)
    assert torch.equal(nvfp4_unpack_scales(packed, lost, 0), scales)
    tiled = tile_scales(scales)
    assert torch.equal(tiled, scales.t()[:, columns])
    assert torch.equal(untile_scales(tiled), scales)


def test_the_orders_of_the_layouts_are_one() -> None:
    scales = random_scales(192, 12)
    assert torch.equal(tile_scales(scales), marlin_permute_mxfp4_scales(scales.t().contiguous()))


def test_any_view_of_memory() -> None:
    scales = random_scales(64, 8)
    packed, lost = nvfp4_pack_scales(scales, 0)

    def odd(tensor: torch.Tensor) -> torch.Tensor:
        return (
            torch.zeros(tensor.numel() + 1, dtype=torch.uint8)[1:].view(tensor.shape).copy_(tensor)
        )

    for view in (odd, lambda tensor: tensor.t().contiguous().t()):
        again = nvfp4_pack_scales(view(scales), 0)
        assert torch.equal(again[0], packed)
        assert torch.equal(again[1], lost)
        assert torch.equal(nvfp4_unpack_scales(view(packed), view(lost), 0), scales)
        assert torch.equal(tile_scales(view(scales)), tile_scales(scales))
        assert torch.equal(untile_scales(view(tile_scales(scales))), scales)
    floats = scales.view(torch.float8_e4m3fn)
    assert torch.equal(nvfp4_pack_scales(floats, 0)[0], packed)


def test_nothing_to_pack() -> None:
    for n, groups in ((0, 4), (64, 0)):
        packed, lost = nvfp4_pack_scales(torch.zeros((n, groups), dtype=torch.uint8), 0)
        assert packed.shape == (groups, n)
        assert lost.shape == (n, -(-groups // 2))
        assert nvfp4_unpack_scales(packed, lost, 0).shape == (n, groups)


def test_power() -> None:
    for byte in range(1, 127):
        wanted = max(p for p in range(30) if e4m3(byte) * 2.0**p <= 448)
        scales = torch.tensor([[1, byte]], dtype=torch.uint8)
        assert nvfp4_power(scales) == nvfp4_power(scales.view(torch.float8_e4m3fn)) == wanted
    assert nvfp4_power(torch.zeros((2, 3), dtype=torch.uint8)) == 0


def test_scales_refused() -> None:
    for byte, value in ((0x7F, "nan"), (0x80, "-0.0"), (0x81, "-0.00195"), (0xFF, "nan")):
        scales = torch.full((64, 4), 8, dtype=torch.uint8)
        scales[3, 2] = byte
        for refused in (lambda x: nvfp4_pack_scales(x, 0), nvfp4_power):
            with pytest.raises(ValueError, match=rf"weight_scale\[3, 2\] is {value}"):
                refused(scales)
    good = torch.full((64, 4), 126, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"times 2\*\*1 is greater than 448"):
        nvfp4_pack_scales(good, 1)
    for power in (-1, 18):
        with pytest.raises(ValueError, match=r"in 0 \.\. 17"):
            nvfp4_pack_scales(good, power)
    with pytest.raises(ValueError, match="multiple of 64"):
        nvfp4_pack_scales(good[:32], 0)
    with pytest.raises(ValueError, match="float8_e4m3fn or"):
        nvfp4_pack_scales(good.float(), 0)
    with pytest.raises(ValueError, match="multiple of 64"):
        tile_scales(good[:32])
    with pytest.raises(ValueError, match=r"torch\.uint8 bytes"):
        untile_scales(good.float())
    packed, lost = nvfp4_pack_scales(good, 0)
    with pytest.raises(ValueError, match=r"are \[64, 2\], not \[2, 64\]"):
        nvfp4_unpack_scales(packed, lost.t(), 0)
    with pytest.raises(ValueError, match="multiple of 64"):
        nvfp4_unpack_scales(packed[:, :32], lost[:32], 0)
    with pytest.raises(ValueError, match=r"lost scales must be torch\.uint8"):
        nvfp4_unpack_scales(packed, lost.int(), 0)


# --------------------------------------------------------------------------- global scale


def test_global_scale() -> None:
    for value in (1.0, 3.0, 1536.0, 1e-9, 1e30):
        for power in (0, 3):
            divisor = torch.tensor([value])
            reciprocal = torch.tensor(1.0 / float(divisor), dtype=torch.float64).float()
            made = nvfp4_global_scale(divisor, torch.float16, power)
            assert made.dtype == torch.float32
            assert float(made) == float(reciprocal) * 2.0 ** (7 - power)
            assert nvfp4_power_of(made, divisor, torch.float16) == power


def test_global_scale_refused() -> None:
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="finite and positive"):
            nvfp4_global_scale(torch.tensor([value]), torch.bfloat16, 0)
    nvfp4_global_scale(torch.tensor([1e-3]), torch.float16, 0)
    with pytest.raises(ValueError, match="is inf in float32"):
        nvfp4_global_scale(torch.tensor([1e-3]), torch.bfloat16, 0)
    nvfp4_global_scale(torch.tensor([1e-3]), torch.bfloat16, 4)
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        nvfp4_global_scale(torch.tensor([1.0]), torch.float32, 0)
    for wrong in (torch.tensor(1.0), torch.ones(2), torch.ones(1, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"must be torch\.float32 \[1\]"):
            nvfp4_global_scale(wrong, torch.float16, 0)
    with pytest.raises(ValueError, match=r"not one that the source's 3\.0 gives"):
        nvfp4_power_of(torch.tensor([5.0]), torch.tensor([3.0]), torch.float16)


# ------------------------------------------------------------------------------ the kernels


@interpreted
@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("power", [0, 1, 2, 3, 9, 17])
def test_kernels_on_every_byte(power: int) -> None:
    test_every_byte_with_every_power(power)


@interpreted
@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize(("n", "groups"), [(64, 1), (128, 7), (192, 24), (64, 65)])
def test_kernels_are_the_definition(n: int, groups: int) -> None:
    for power, greatest in ((0, 126), (1, 118), (2, 110), (4, 90)):
        test_pack_is_the_definition(n, groups, power, greatest)
    scales = random_scales(n, groups)
    assert torch.equal(tile_scales(scales), marlin_permute_mxfp4_scales(scales.t().contiguous()))
    assert torch.equal(untile_scales(tile_scales(scales)), scales)


@interpreted
@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["full", "low"])
def test_kernels_golden(dtype: str, kind: str) -> None:
    test_golden(dtype, kind)
    test_any_view_of_memory()
    test_nothing_to_pack()
    test_scales_refused()


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "groups"), [(64, 1), (192, 36), (8192, 512), (28672, 512)])
def test_gpu(n: int, groups: int) -> None:
    for power, greatest in ((0, 126), (1, 118), (2, 110), (5, 80)):
        scales = random_scales(n, groups, greatest)
        assert nvfp4_power(scales.cuda()) == nvfp4_power(scales)
        packed, lost = nvfp4_pack_scales(scales, power)
        made = nvfp4_pack_scales(scales.cuda(), power)
        assert torch.equal(made[0].cpu(), packed)
        assert torch.equal(made[1].cpu(), lost)
        assert torch.equal(nvfp4_unpack_scales(*made, power).cpu(), scales)
    tiled = tile_scales(scales.cuda())
    assert torch.equal(tiled.cpu(), tile_scales(scales))
    assert torch.equal(untile_scales(tiled).cpu(), scales)
    scales[-1, 0] = 0x80
    with pytest.raises(ValueError, match=rf"weight_scale\[{n - 1}, 0\] is -0.0"):
        nvfp4_pack_scales(scales.cuda(), 0)
