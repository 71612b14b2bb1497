"""The 128 x 4 swizzle of scales: golden vectors, the definition, kernels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctconvert.transforms import swizzle
from ctconvert.transforms.swizzle import swizzle_scales, unswizzle_scales

GOLDEN = Path(__file__).parents[1] / "golden" / "nvfp4_fp8.safetensors"
CASES = [(128, 4), (200, 6), (384, 24), (64, 16)]
SHAPES = [(1, 1), (128, 4), (129, 5), (200, 66), (31, 3), (384, 8), (256, 130)]

pytestmark = pytest.mark.usefixtures("poisoned")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"
)


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of an accelerator, on the CPU."""
    monkeypatch.setattr(swizzle, "_has_kernels", lambda tensor: True)


def random_bytes(n: int, groups: int) -> torch.Tensor:
    return torch.randint(1, 256, (n, groups), generator=torch.Generator().manual_seed(n)).to(
        torch.uint8
    )


def naive(scales: torch.Tensor) -> torch.Tensor:
    n, groups = scales.shape
    height, width = -(-n // 128) * 128, -(-groups // 4) * 4
    made = [0] * (height * width)
    for row, values in enumerate(scales.tolist()):
        for group, value in enumerate(values):
            tile = (row // 128) * (width // 4) + group // 4
            made[tile * 512 + (row % 32) * 16 + (row // 32 % 4) * 4 + group % 4] = value
    return torch.tensor(made, dtype=torch.uint8).view(height, width)


@pytest.mark.parametrize(("n", "groups"), CASES)
def test_golden(n: int, groups: int) -> None:
    vectors = load_file(GOLDEN)
    scales = vectors[f"swizzle.N{n}.g{groups}.in"]
    made = vectors[f"swizzle.N{n}.g{groups}.out"]
    assert torch.equal(swizzle_scales(scales), made)
    assert torch.equal(unswizzle_scales(made, n, groups), scales)


@pytest.mark.parametrize(("n", "groups"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_the_definition(n: int, groups: int, dtype: torch.dtype) -> None:
    scales = random_bytes(n, groups)
    made = swizzle_scales(scales.view(dtype))
    assert made.dtype == dtype
    assert made.is_contiguous()
    assert torch.equal(made.view(torch.uint8), naive(scales))
    back = unswizzle_scales(made, n, groups)
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), scales)


def test_any_view_of_memory() -> None:
    scales = random_bytes(256, 12)
    made = naive(scales)
    odd = torch.zeros(scales.numel() + 1, dtype=torch.uint8)[1:].view(scales.shape).copy_(scales)
    assert torch.equal(swizzle_scales(odd), made)
    assert torch.equal(swizzle_scales(scales.t().contiguous().t()), made)
    odd = torch.zeros(made.numel() + 1, dtype=torch.uint8)[1:].view(made.shape).copy_(made)
    assert torch.equal(unswizzle_scales(odd, 256, 12), scales)


@pytest.mark.parametrize(("n", "groups"), [(129, 5), (200, 8), (128, 6)])
def test_padding_is_checked(n: int, groups: int) -> None:
    made = swizzle_scales(random_bytes(n, groups))
    padding = naive(torch.ones((n, groups), dtype=torch.uint8)) == 0
    for at in padding.nonzero().tolist()[::7]:
        wrong = made.clone()
        wrong[tuple(at)] = 1
        with pytest.raises(ValueError, match="padding"):
            unswizzle_scales(wrong, n, groups)


def test_refused() -> None:
    with pytest.raises(ValueError, match="one-byte dtype"):
        swizzle_scales(torch.zeros((128, 4)))
    with pytest.raises(ValueError, match="one-byte dtype"):
        swizzle_scales(torch.zeros(128, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"of 200 x 6 are \[256, 8\], not \[256, 4\]"):
        unswizzle_scales(torch.zeros((256, 4), dtype=torch.uint8), 200, 6)
    assert swizzle_scales(torch.zeros((0, 4), dtype=torch.uint8)).shape == (0, 4)
    assert unswizzle_scales(torch.zeros((128, 0), dtype=torch.uint8), 5, 0).shape == (5, 0)


@interpreted
@pytest.mark.usefixtures("on_kernels")
@pytest.mark.parametrize(("n", "groups"), SHAPES)
def test_kernels_interpreted(n: int, groups: int) -> None:
    test_the_definition(n, groups, torch.float8_e4m3fn)


@interpreted
@pytest.mark.usefixtures("on_kernels")
def test_kernels_golden() -> None:
    for n, groups in CASES:
        test_golden(n, groups)
    test_any_view_of_memory()
    test_padding_is_checked(200, 6)
    test_refused()


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "groups"), [*SHAPES, (8192, 512), (28672, 1024), (5120, 1730)])
def test_gpu(n: int, groups: int) -> None:
    scales = random_bytes(n, groups)
    made = swizzle_scales(scales.cuda())
    assert torch.equal(made.cpu(), swizzle_scales(scales))
    assert torch.equal(unswizzle_scales(made, n, groups).cpu(), scales)
    if n % 128:
        made[-1, -1] = 1
        with pytest.raises(ValueError, match="padding"):
            unswizzle_scales(made, n, groups)
