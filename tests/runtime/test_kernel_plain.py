"""Plain paths of layouts whose kernels are not here: against the real kernels' vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiles import relative_error

from ctconvert.runtime.kernels.plain import weights

GOLDEN = Path(__file__).parents[1] / "golden"


def vectors(file: str, prefix: str) -> dict[str, torch.Tensor]:
    found = load_file(GOLDEN / f"{file}.safetensors")
    cut = len(prefix) + 1
    return {key[cut:]: t for key, t in found.items() if key.startswith(prefix + ".")}


@pytest.mark.parametrize("kind", ["u4b8", "u8b128"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_machete(kind: str, dtype: str) -> None:
    v = vectors("machete_prepack", f"machete_prepack.{kind}.{dtype}.K128.N128")
    bits = int(kind[1])
    # The K-packed source: code i of word (r, n) is the weight (r * f + i, n).
    codes = torch.stack([v["in"] >> s & (2**bits - 1) for s in range(0, 32, bits)], 1).flatten(0, 1)
    scales, zeros = torch.rand(2, 128) + 0.5, torch.rand(2, 128)
    spread = torch.arange(128) // 64
    plain = weights.machete(v["out"], scales, None, bits)
    assert torch.equal(plain, ((codes - 2 ** (bits - 1)) * scales[spread]).t())
    shifted = weights.machete(v["out"], scales, zeros, bits)
    assert torch.equal(shifted, (codes * scales[spread] + zeros[spread]).t())


@pytest.mark.parametrize("shape", ["N128.K128", "N256.K512", "N384.K256"])
def test_w4a8_fp8(shape: str) -> None:
    v = vectors("w4a8_humming", f"w4a8_fp8.{shape}")
    weight = weights.w4a8_fp8(v["out_weight"], v["out_chan"], v["out_scale_u8"])
    # FP8 rounds the scales twice, and the codes have their own signs and sizes.
    exact = (v["codes"].double() - 8) * v["scale"].double().repeat_interleave(128, 1)
    assert torch.equal(weight == 0, exact == 0)
    assert torch.equal(weight < 0, exact < 0)
    assert ((weight - exact).abs() <= 0.13 * exact.abs()).all()
    # The real kernel's own result, of FP8 activations with scales of 1.
    x = v["x_u8"].view(torch.float8_e4m3fn).double()
    assert relative_error(x @ weight.double().t(), v["y"]) < 3e-3


def test_cpu_w4a16() -> None:
    v = vectors("cpu_layouts", "cpu_w4a16")
    scales = v["scale"].t().contiguous()
    weight = weights.cpu_w4a16(v["q"], scales, None)
    columns = v["codes"].shape[1] // v["scale"].shape[1]
    exact = (v["codes"].float() - 8) * v["scale"].float().repeat_interleave(columns, 1)
    assert torch.equal(weight, exact)
    assert relative_error(v["x"].double() @ weight.double().t(), v["y"]) < 5e-3
    # Zero points, packed along N: the first eight channels have 1, the next 2, ...
    zeros = torch.arange(1, 9) * 0x11111111
    zeros = torch.where(zeros >= 2**31, zeros - 2**32, zeros).int().expand(4, 8).contiguous()
    shifted = weights.cpu_w4a16(v["q"], torch.ones_like(scales), zeros)
    assert torch.equal(shifted, v["codes"].float() - (torch.arange(64) // 8 + 1)[:, None])


@pytest.mark.parametrize(
    "shape", ["N32.K64.G32", "N64.K256.G128", "N64.K256.G64", "N64.K512.G256", "N96.K96.G32"]
)
def test_cpu_w4a8(shape: str) -> None:
    v = vectors("cpu_layouts", f"cpu_w4a8.{shape}")
    values, sums = weights.cpu_w4a8(v["w"], v["z"])
    group = int(shape.split("G")[1])
    exact = v["codes"].int() - v["zeros"].int().repeat_interleave(group, 1)
    assert torch.equal(values, exact)
    steps = sums.shape[1]
    assert torch.equal(sums, exact.unflatten(1, (steps, -1)).sum(-1).int())
    assert torch.equal(v["s"].transpose(1, 2).flatten(0, 1), v["scale"].float())


@pytest.mark.parametrize("shape", ["N32.K32", "N64.K128", "N96.K256"])
def test_cpu_int8(shape: str) -> None:
    v = vectors("cpu_layouts", f"int8_amx.{shape}")
    values, sums = weights.cpu_int8(v["out"])
    assert torch.equal(values, v["in"])
    assert torch.equal(sums, 128 * v["in"].int().sum(1).int())
