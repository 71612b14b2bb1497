"""Matmul on Marlin tiles of every form, dense and grouped: real kernels and naive encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiles import E2M1, Made, make_form, relative_error

from ctconvert.runtime.kernels.marlin import triton
from ctconvert.runtime.kernels.marlin.forms import FORMS
from ctconvert.runtime.kernels.marlin.grouped import marlin_grouped
from ctconvert.runtime.kernels.marlin.reference import tiles_dequantize
from ctconvert.runtime.kernels.marlin.tiles import marlin_tiles_gemm
from ctconvert.runtime.kernels.marlin.triton import Config, Dense

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = Config(16, 64, 4, 4, 2, 1)
SPLIT = Config(16, 128, 4, 4, 2, 3)
WIDE = Config(64, 128, 8, 4, 2, 1)
F16, BF16 = torch.float16, torch.bfloat16

#: Every form with the group sizes it has, and whether there are zero points.
CASES = (
    ("mxfp4", 32, False),
    ("mxfp8", 32, False),
    ("nvfp4", 16, False),
    ("nvfp4-f16", 16, False),
    ("fp8", -1, False),
    ("fp8", 64, False),
    ("fp8", 96, False),
    ("humming-int4", -1, True),
    ("humming-int4", 32, True),
    ("humming-int8", -1, False),
    ("humming-int8", 64, False),
    ("humming-nvfp4", 16, False),
)


def vectors(file: str, prefix: str) -> dict[str, torch.Tensor]:
    found = load_file(GOLDEN / f"{file}.safetensors")
    cut = len(prefix) + 1
    return {key[cut:]: t for key, t in found.items() if key.startswith(prefix + ".")}


def on_device(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.to(DEVICE) for t in tensors]


def shape_of(form: str, made: Made, group: int) -> dict[str, Any]:
    n, k = made.dense.shape
    return {"form": form, "n": n, "k": k, "group_size": group}


# --- the real kernels' results --------------------------------------------------------------------


def check_against_the_real_kernel(
    v: dict[str, torch.Tensor], dense: torch.Tensor, *args: Any, **shape: Any
) -> None:
    """``args`` are the real preparation's tensors, ``dense`` what it was given."""
    n, k = dense.shape
    shape |= {"n": n, "k": k}
    weight = tiles_dequantize(*args, **shape).double()
    assert relative_error(weight, dense) < 1e-7  # but for the last place of a float32
    reference = marlin_tiles_gemm(v["x"], *args, **shape)
    kernel = triton.tiles_gemm(*on_device(v["x"], *args), **shape)
    bf16 = v["x"].dtype == BF16
    # On a CPU the kernel runs in Triton's interpreter, which truncates to bf16.
    for made, limit in ((reference, 3e-3 if bf16 else 6e-4), (kernel, 1e-2 if bf16 else 6e-4)):
        assert relative_error(made, v["y"]) < limit
        assert relative_error(made, v["x"].double() @ dense.t()) < limit


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
def test_fp8_against_the_real_kernel(dtype: str, kind: str) -> None:
    v = vectors("nvfp4_fp8", f"fp8_marlin.{dtype}.{kind}")
    scale = v["weight_scale"].double().reshape(-1, 1 if kind != "block" else 2)
    if kind == "block":
        scale = scale.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)
    dense = v["weight_u8"].view(torch.float8_e4m3fn).double() * scale
    group = 128 if kind == "block" else -1
    check_against_the_real_kernel(
        v, dense, v["out_weight"], v["out_scale"], form="fp8", group_size=group
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["full", "low"])
def test_nvfp4_against_the_real_kernel(dtype: str, kind: str) -> None:
    v = vectors("nvfp4_fp8", f"nvfp4_marlin.{dtype}.{kind}")
    scale = v["weight_scale_u8"].view(torch.float8_e4m3fn).double()
    # What the kernel's scales have no room for; 0 of bfloat16's 'low', which a power lifts.
    flushed = (v["out_scale_u8"] == 0).sum() - (scale == 0).sum()
    if flushed:
        scale = torch.where(scale < 2.0**-6, 0.0, scale)
    dense = nibbles(v["weight_packed"]) * scale.repeat_interleave(16, 1)
    dense /= v["weight_global_scale"].double()
    form = "nvfp4" if dtype == "bfloat16" else "nvfp4-f16"
    args = (v["out_weight"], v["out_scale_u8"], None, v["out_global"])
    check_against_the_real_kernel(v, dense, *args, form=form, group_size=16)


def test_mxfp8_against_the_real_kernel() -> None:
    v = vectors("nvfp4_fp8", "mxfp8_marlin")
    scale = torch.exp2(v["scale_u8"].double() - 127).repeat_interleave(32, 1)
    dense = v["weight_u8"].view(torch.float8_e4m3fn).double() * scale
    args = (v["out_weight"], v["out_scale_u8"])
    check_against_the_real_kernel(v, dense, *args, form="mxfp8", group_size=32)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """E2M1 values float64 [N, K] of u8 [N, K/2], low nibble first."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    return torch.tensor(E2M1).double()[codes.long()]


@pytest.mark.parametrize("kind", ["int4", "int4_asym", "int8", "nvfp4"])
def test_the_tensors_of_the_real_humming(kind: str) -> None:
    v = vectors("w4a8_humming", f"humming.{kind}")
    packed, scale = v["in_weight_packed"], v["in_weight_scale"]
    n, k = 256, 256
    zeros = factor = None
    if kind == "nvfp4":
        form, group, factor = "humming-nvfp4", 16, v["out_weight_scale_2"]
        dense = nibbles(packed) * scale.view(torch.float8_e4m3fn).double().repeat_interleave(16, 1)
        dense /= v["in_weight_global_scale"].double()
    else:
        bits, group = int(kind[3]), 128
        form = f"humming-int{bits}"
        codes = torch.stack([packed >> s & (2**bits - 1) for s in range(0, 32, bits)], 2).flatten(1)
        zero: Any = 2 ** (bits - 1)
        if kind == "int4_asym":
            points = v["in_weight_zero_point"]
            zero = torch.stack([points >> s & 15 for s in range(0, 32, 4)], 1).flatten(0, 1)
            zero, zeros = zero.repeat_interleave(128, 1), v["out_zero_point"]
        dense = (codes - zero).double() * scale.double().repeat_interleave(128, 1)
    args = (v["out_weight"], v["out_weight_scale"], zeros, factor)
    shape = {"form": form, "n": n, "k": k, "group_size": group}
    assert relative_error(tiles_dequantize(*args, **shape), dense) < 1e-7
    made = triton.dequantize(
        *on_device(*args), form=FORMS[form], n=n, k=k, group=group, dtype=torch.float32
    )
    assert relative_error(made, dense) < 1e-7


# --- naive encoders ------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("form", "group", "zero_point"), CASES)
def test_weights_are_exact(form: str, group: int, zero_point: bool) -> None:
    """Of the reference and of the kernel that dequantises; codes and scales of every value."""
    n, k = 192, 320 if group == 64 else 288
    for dtype in (BF16, F16):
        made = make_form(form, n, k, group, 1, zero_point, dtype)
        shape = shape_of(form, made, group)
        weight = tiles_dequantize(*made[:4], **shape)
        shape = {"n": n, "k": k, "group": group, "form": FORMS[form], "dtype": torch.float32}
        found = triton.dequantize(*on_device(*made[:4]), **shape).cpu()
        exact = made.dense.float()
        if made.factor is None:
            assert torch.equal(weight, exact)
            assert torch.equal(found, exact)
        else:  # a factor is multiplied with in float32
            assert torch.equal(weight == 0, exact == 0) and torch.equal(found == 0, exact == 0)
            assert torch.allclose(weight, exact, rtol=2e-7, atol=0)
            assert torch.allclose(found, exact, rtol=2e-7, atol=0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", range(len(CASES)))
def test_triton_equals_the_reference(case: int) -> None:
    """Each form meets one, three, 17 and 64 tokens, both dtypes and every kind of tile."""
    form, group, zero_point = CASES[case]
    n, k = 64, {96: 96, 64: 128}.get(group, 160)
    made = make_form(form, n, k, group, case, zero_point, (BF16, F16)[case % 2])
    shape = shape_of(form, made, group)
    configs: tuple[Config | Dense, ...] = (SMALL, SPLIT, WIDE, Dense())
    torch.manual_seed(case)
    for place, m in enumerate((1, 3, 17, 64)):
        dtype, limit = ((F16, 1e-3), (BF16, 1e-2))[(case + place) % 2]
        x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
        config = configs[(case + place) % 3] if dtype == F16 else configs[(case + place) % 4]
        out = triton.tiles_gemm(*on_device(x, *made[:4], bias), **shape, config=config)
        assert out.dtype == dtype
        assert relative_error(out, x.double() @ made.dense.t() + bias.double()) < limit
        reference = marlin_tiles_gemm(*on_device(x, *made[:4], bias), **shape)
        assert relative_error(reference, x.double() @ made.dense.t() + bias.double()) < limit / 2


@pytest.mark.parametrize("form", ["nvfp4", "nvfp4-f16"])
def test_a_factor_that_float16_weights_would_not_survive(form: str) -> None:
    """The weights are under 2**-25, and more tokens than a tile has would dequantise them."""
    made = make_form(form, 64, 64, 16, 0)
    assert made.factor is not None
    small = 2.0**-27
    x = (
        torch.randn(triton.DENSE_ROWS, 64, generator=torch.Generator().manual_seed(0)) * 2.0**13
    ).half()
    args = (*made[:3], made.factor * small)
    out = triton.tiles_gemm(*on_device(x, *args), **shape_of(form, made, 16))
    expected = x.double() @ (made.dense * small).t()
    assert float(expected.abs().mean()) > 2.0**-14
    assert relative_error(out, expected) < 5e-3


# --- experts -------------------------------------------------------------------------------------

STACKED = (
    ("int4", 32, True),
    ("int4", -1, False),
    ("int8", 64, False),
    ("mxfp4", 32, False),
    ("nvfp4", 16, False),
    ("fp8", -1, False),
    ("fp8", 96, False),
    ("mxfp8", 32, False),
    ("humming-int8", 96, False),
)


def stacked(form: str, group: int, zero_point: bool, count: int, n: int, k: int) -> Made:
    every = [
        make_form(form, n, k, group, 7 + e, zero_point, F16 if "int" in form else BF16)
        for e in range(count)
    ]
    parts = zip(*every, strict=True)
    return Made(*(None if one[0] is None else torch.stack(one) for one in parts))  # type: ignore[arg-type]


def routed(count: int, tokens: int, each: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows sorted by expert and their offsets, of random routing that leaves one expert out."""
    made = torch.Generator().manual_seed(seed)
    scores = torch.rand((tokens, count), generator=made)
    scores[:, count // 2] = -1
    expert = scores.topk(each, 1).indices
    order = expert.flatten().argsort(stable=True)
    counts = expert.flatten().bincount(minlength=count)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return (order // each).int(), offsets.int()


def product(
    x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, dense: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros(len(rows), dense.shape[1], dtype=torch.float64)
    for expert, (start, end) in enumerate(
        zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ):
        for place in range(start, end):
            out[place] = dense[expert] @ x[int(rows[place])].double()
    return out


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", range(len(STACKED)))
def test_grouped_equals_the_reference(case: int) -> None:
    form, group, zero_point = STACKED[case]
    count, n, k = 5, 64, 128 if group == 64 else 96
    made = stacked(form, group, zero_point, count, n, k)
    shape = {"form": form, "n": n, "k": k, "group_size": group}
    # More rows of one expert than a tile has, or few; one sum, or of two parts of K.
    tokens, config = (20, 3, 1)[case % 3], (SMALL, SPLIT)[case // 2 % 2]
    dtype, limit = ((BF16, 1e-2), (F16, 1e-3))[case % 2]
    torch.manual_seed(case)
    rows, offsets = routed(count, tokens, 2, case)
    x, bias = torch.randn(tokens, k).to(dtype), torch.randn(count, n).to(dtype)
    expert = torch.arange(count).repeat_interleave(offsets.diff())
    expected = product(x, rows, offsets, made.dense) + bias.double()[expert]
    args = on_device(x, rows, offsets, *made[:4], bias)
    out = triton.grouped(*args, **shape, config=config)
    assert out.dtype == dtype and out.shape == (len(rows), n)
    assert relative_error(out, expected) < limit
    assert relative_error(marlin_grouped(*args, **shape), expected) < limit / 2


def test_an_expert_may_have_every_token_and_there_may_be_none() -> None:
    made = stacked("int4", 32, False, 3, 64, 96)
    shape = {"form": "int4", "n": 64, "k": 96, "group_size": 32}
    x = torch.randn(40, 96).bfloat16()
    rows = torch.arange(39, -1, -1).int()
    for offsets, dense in (([0, 0, 40, 40], made.dense[1]), ([0, 0, 0, 40], made.dense[2])):
        args = on_device(x, rows, torch.tensor(offsets).int(), *made[:4])
        out = triton.grouped(*args, **shape)
        assert relative_error(out, x.double().flip(0) @ dense.t()) < 1e-2
    args = on_device(x, rows[:0], torch.zeros(4, dtype=torch.int32), *made[:4])
    assert marlin_grouped(*args, **shape).shape == triton.grouped(*args, **shape).shape == (0, 64)


def test_bad_arguments_are_named() -> None:
    made = make_form("nvfp4", 64, 64, 16, 0)
    good = dict(zip(("weight", "scale", "zeros", "factor"), made[:4], strict=True))
    good |= {"x": torch.randn(2, 64).half(), **shape_of("nvfp4", made, 16)}
    marlin_tiles_gemm(**good)
    for change, error, message in (
        ({"form": "int5"}, ValueError, "form must be one of int4, int8, mxfp4"),
        ({"factor": None}, ValueError, "factor must be given for nvfp4"),
        ({"form": "fp8", "group_size": -1}, ValueError, r"weight must have shape \[4, 256\]"),
        ({"group_size": 32}, ValueError, "group_size must be 16 for nvfp4"),
        ({"zeros": made.weight}, ValueError, "zeros must be None for nvfp4"),
        ({"scale": made.scale.view(torch.float8_e4m3fn)}, TypeError, "scale must be uint8"),
        ({"factor": torch.ones(())}, ValueError, r"factor must have shape \[1\]"),
    ):
        with pytest.raises(error, match=message):
            marlin_tiles_gemm(**good | change)
    good |= {name: good[name][None] for name in ("weight", "scale", "factor")}
    good |= {"rows": torch.arange(2).int(), "offsets": torch.tensor([0, 2]).int()}
    marlin_grouped(**good)
    for change, error, message in (
        ({"x": torch.randn(1, 2, 64).half()}, ValueError, r"x must have shape \[M, 64\]"),
        ({"rows": torch.arange(2)}, TypeError, "rows must be int32"),
        ({"offsets": torch.zeros(1).int()}, ValueError, "offsets must have"),
        ({"offsets": torch.tensor([0, 1, 2]).int()}, ValueError, r"weight must have shape \[2, 4"),
        ({"bias": torch.zeros(64).half()}, ValueError, r"bias must have shape \[1, 64\]"),
    ):
        with pytest.raises(error, match=message):
            marlin_grouped(**good | change)


def test_the_custom_ops_are_sound() -> None:
    made = make_form("nvfp4", 64, 64, 16, 0)
    x, shape = torch.randn(2, 64).bfloat16(), shape_of("nvfp4", made, 16)
    torch.library.opcheck(torch.ops.ctconvert.marlin_tiles_gemm.default, (x, *made[:4]), shape)
    stack = [None if t is None else t[None] for t in made[:4]]
    rows, offsets = torch.arange(2).int(), torch.tensor([0, 2]).int()
    torch.library.opcheck(
        torch.ops.ctconvert.marlin_grouped.default, (x, rows, offsets, *stack), shape
    )


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("form", "group", "zero_point"), CASES)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_gpu_tiles(form: str, group: int, zero_point: bool, dtype: torch.dtype) -> None:
    n, k = 1088, 1152 if group in (-1, 64, 96) else 1056
    made = make_form(form, n, k, group, 0, zero_point, dtype)
    shape = shape_of(form, made, group)
    torch.manual_seed(0)
    for m in (1, 17, 50, 300):
        x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
        out = marlin_tiles_gemm(*on_device(x, *made[:4], bias), **shape)
        expected = x.double() @ made.dense.t() + bias.double()
        assert relative_error(out, expected) < (4e-3 if dtype == BF16 else 1e-3), m


@pytest.mark.gpu
@pytest.mark.parametrize(("form", "group", "zero_point"), STACKED)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_gpu_grouped(form: str, group: int, zero_point: bool, dtype: torch.dtype) -> None:
    count, n, k = 24, 320, 576
    made = stacked(form, group, zero_point, count, n, k)
    shape = {"form": form, "n": n, "k": k, "group_size": group}
    torch.manual_seed(0)
    for tokens in (1, 20, 300):
        rows, offsets = routed(count, tokens, 4, tokens)
        x, bias = torch.randn(tokens, k).to(dtype), torch.randn(count, n).to(dtype)
        expert = torch.arange(count).repeat_interleave(offsets.diff())
        expected = product(x, rows, offsets, made.dense) + bias.double()[expert]
        out = marlin_grouped(*on_device(x, rows, offsets, *made[:4], bias), **shape)
        assert relative_error(out, expected) < (4e-3 if dtype == BF16 else 1e-3), tokens


@pytest.mark.gpu
def test_gpu_grouped_in_a_graph() -> None:
    """What has which expert's rows is read on the device: the graph serves another routing."""
    made = stacked("nvfp4", 16, False, 8, 128, 256)
    shape = {"form": "nvfp4", "n": 128, "k": 256, "group_size": 16}
    held = on_device(*made[:4])
    x = torch.randn(16, 256, device="cuda").bfloat16()
    rows, offsets = (t.cuda() for t in routed(8, 16, 2, 0))
    marlin_grouped(x, rows, offsets, *held, **shape)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = marlin_grouped(x, rows, offsets, *held, **shape)
    for new, old in zip(routed(8, 16, 2, 1), (rows, offsets), strict=True):
        old.copy_(new)
    graph.replay()
    assert torch.equal(out, marlin_grouped(x, rows, offsets, *held, **shape))
