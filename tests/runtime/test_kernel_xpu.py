"""The XPU layout's matmuls: the reference, and how oneDNN's ops are called."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from ctconvert.runtime.kernels.xpu import onednn
from ctconvert.runtime.kernels.xpu.kernel import int4_gemm_w4a8, int4_gemm_w4a16
from ctconvert.runtime.kernels.xpu.onednn import xpu_kernels_available
from ctconvert.runtime.kernels.xpu.reference import (
    int4_gemm_w4a8_reference,
    int4_gemm_w4a16_reference,
    quantize_activations,
)

N, K = 24, 96
ZERO = torch.tensor([8], dtype=torch.int8)


def make(group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight_packed, weight_scale, signed codes [N, K]), packed word by word."""
    torch.manual_seed(group_size)
    signed = torch.randint(-8, 8, (N, K))
    words = []
    for row in signed.tolist():
        for at in range(0, K, 8):
            word = sum((q + 8) << (4 * i) for i, q in enumerate(row[at : at + 8]))
            words.append(word - 2**32 if word >= 2**31 else word)
    groups = 1 if group_size == -1 else K // group_size
    packed = torch.tensor(words, dtype=torch.int32).reshape(N, K // 8)
    return packed, torch.rand(groups, N).half() * 0.1 + 0.01, signed


def test_activations_are_quantised_as_vllm_does() -> None:
    x = torch.tensor([[1.0, -2.54, 0.01, 1.27], [0, 0, 0, 0], [1e-7, 0, 0, 0]]).half()
    q, scale = quantize_activations(x)
    assert scale.dtype == torch.float16 and scale.shape == (3, 1)
    assert scale[0, 0] == torch.tensor(float(x[0, 1].abs()) / 127).half()
    assert scale[1, 0] == scale[2, 0] == torch.tensor(1e-5).half()
    divisor = scale.float()
    for i, j in itertools.product(range(3), range(4)):
        expected = round((x[i, j].float() / divisor[i, 0]).item())
        assert q[i, j] == min(max(expected, -128), 127)


@pytest.mark.parametrize("group_size", [-1, 32, K])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_w4a8_is_the_formula(group_size: int, dtype: torch.dtype, bias: bool) -> None:
    packed, scale, signed = make(group_size)
    x = torch.randn(2, 3, K).to(dtype)
    shift = torch.randn(N).to(dtype) if bias else None
    out = int4_gemm_w4a8(x, packed, scale, ZERO, shift, group_size=group_size)
    assert out.dtype == torch.float16 and out.shape == (2, 3, N)
    q, x_scale = quantize_activations(x)
    size = K // scale.shape[0]
    for i, j, n in itertools.product(range(2), range(3), range(0, N, 5)):
        total = sum(
            float(scale[g, n])
            * sum(int(q[i, j, k]) * int(signed[n, k]) for k in range(g * size, (g + 1) * size))
            for g in range(scale.shape[0])
        )
        expected = total * float(x_scale[i, j, 0]) + (float(shift[n]) if bias else 0.0)
        assert float(out[i, j, n]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_w4a16_is_the_formula(group_size: int, dtype: torch.dtype) -> None:
    packed, scale, signed = make(group_size)
    x, bias = torch.randn(5, K).to(dtype), torch.randn(N).to(dtype)
    weight = signed.double() * scale.double().t().repeat_interleave(K // scale.shape[0], dim=1)
    out = int4_gemm_w4a16(x, packed, scale, ZERO, bias, group_size=group_size)
    expected = x.double() @ weight.t() + bias.double()
    assert out.dtype == dtype
    assert (out.double() - expected).norm() / expected.norm() < (
        1e-3 if dtype == torch.float16 else 5e-3
    )


@pytest.fixture
def fake_onednn() -> Iterator[list[tuple[object, ...]]]:
    """``torch.ops._xpu_C`` with the real ops' schemas, computing from what it is handed."""
    if xpu_kernels_available():
        pytest.skip("the real library is installed")
    calls: list[tuple[object, ...]] = []
    library = torch.library.Library("_xpu_C", "DEF")
    library.define(
        "int4_gemm_w4a8(Tensor A_, Tensor A_scale, Tensor A_zp, Tensor B, Tensor B_scale, "
        "Tensor B_zp, int group_size, Tensor? g_idx, Tensor? bias) -> Tensor"
    )
    library.define(
        "int4_gemm_w4a16(Tensor A, Tensor B, Tensor? bias, Tensor B_scale, Tensor B_zp, "
        "int group_size, Tensor? g_idx) -> Tensor"
    )

    def weight(b: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, size: int) -> torch.Tensor:
        # [K/8, N] words whose K is contiguous, as oneDNN's "nt" format has them
        assert b.dtype == torch.int32 and b.stride(0) == 1
        assert scale.is_contiguous() and size * scale.shape[0] == b.shape[0] * 8
        codes = torch.stack([b >> (4 * i) & 15 for i in range(8)], dim=1).flatten(0, 1)
        return (codes - zero).float() * scale.float().repeat_interleave(size, dim=0)

    def w4a8(a, a_scale, a_zp, b, b_scale, b_zp, group_size, g_idx, bias):  # type: ignore[no-untyped-def]
        calls.append(("w4a8", a, a_scale, a_zp, b, b_scale, b_zp, group_size, g_idx, bias))
        assert a.dtype == torch.int8 and a.dim() == 2 and a_zp.dtype == torch.int32
        assert a_scale.shape == a_zp.shape == (a.shape[0], 1) and a_scale.is_contiguous()
        out = ((a - a_zp).float() * a_scale.float()) @ weight(b, b_scale, b_zp, group_size)
        return (out + (0 if bias is None else bias.float())).half()

    def w4a16(a, b, bias, b_scale, b_zp, group_size, g_idx):  # type: ignore[no-untyped-def]
        calls.append(("w4a16", a, b, bias, b_scale, b_zp, group_size, g_idx))
        out = a.float() @ weight(b, b_scale, b_zp, group_size)
        return (out + (0 if bias is None else bias.float())).half()

    library.impl("int4_gemm_w4a8", w4a8, "CPU")
    library.impl("int4_gemm_w4a16", w4a16, "CPU")
    yield calls
    library._destroy()
    # torch.ops remembers the ops it resolved
    for name in ("int4_gemm_w4a8", "int4_gemm_w4a16"):
        torch.ops._xpu_C.__dict__.pop(name, None)


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_onednn_is_called_with_its_own_arguments(
    fake_onednn: list[tuple[object, ...]],
    group_size: int,
    with_bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onednn, "_runs", lambda x: True)
    packed, scale, _ = make(group_size)
    x = torch.randn(2, 3, K).half()
    bias = torch.randn(N).half() if with_bias else None
    arguments = (x, packed, scale, ZERO, bias)
    assert xpu_kernels_available()
    out = onednn.int4_gemm_w4a8(*arguments, group_size=group_size)
    reference = int4_gemm_w4a8_reference(*arguments, group_size=group_size)
    assert torch.allclose(out.float(), reference.float(), rtol=2e-3, atol=2e-3)
    out = onednn.int4_gemm_w4a16(*arguments, group_size=group_size)
    reference = int4_gemm_w4a16_reference(*arguments, group_size=group_size)
    assert torch.allclose(out.float(), reference.float(), rtol=2e-3, atol=2e-3)
    assert out.dtype == x.dtype and out.shape == (2, 3, N)
    assert [call[0] for call in fake_onednn] == ["w4a8", "w4a16"]
    for call in fake_onednn:
        words = next(t for t in call if isinstance(t, torch.Tensor) and t.shape == (K // 8, N))
        assert words.data_ptr() == packed.data_ptr()  # a stride, not a copy


def test_without_the_library_the_reference_runs() -> None:
    if xpu_kernels_available():
        pytest.skip("the real library is installed")
    packed, scale, _ = make(32)
    x = torch.randn(1, K).half()
    out = int4_gemm_w4a8(x, packed, scale, ZERO, group_size=32)
    assert torch.equal(out, int4_gemm_w4a8_reference(x, packed, scale, ZERO, group_size=32))


def test_bad_arguments_are_named() -> None:
    packed, scale, _ = make(32)
    good = {
        "x": torch.randn(2, K).half(),
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_zero_point": ZERO,
        "bias": torch.zeros(N).half(),
        "group_size": 32,
    }
    for gemm in (int4_gemm_w4a8, int4_gemm_w4a16):
        gemm(**good)
        for change, error, message in (
            ({"x": torch.randn(2, K)}, TypeError, "x must be float16 or bfloat16"),
            ({"x": torch.randn(2, 32).half()}, ValueError, r"x must have shape \[\.\.\., 96\]"),
            ({"weight_packed": packed.long()}, TypeError, "weight_packed must be int32"),
            ({"weight_packed": packed.t()}, ValueError, "weight_packed must be contiguous"),
            ({"weight_packed": packed[:20]}, ValueError, "N a positive multiple of 8"),
            ({"weight_scale": scale[:1]}, ValueError, r"weight_scale must have shape \[3, 24\]"),
            ({"weight_zero_point": ZERO.int()}, TypeError, "weight_zero_point must be int8"),
            ({"bias": torch.zeros(3).half()}, ValueError, "bias must have shape"),
            ({"group_size": 24}, ValueError, "group_size must be -1"),
            ({"weight_scale": scale.to("meta")}, ValueError, "weight_scale is on meta"),
        ):
            with pytest.raises(error, match=message):
                gemm(**{**good, **change})


def test_the_custom_ops_are_sound() -> None:
    packed, scale, _ = make(32)
    x = torch.randn(2, K).bfloat16()
    for op, function in (
        (torch.ops.ctconvert.int4_gemm_w4a8, int4_gemm_w4a8),
        (torch.ops.ctconvert.int4_gemm_w4a16, int4_gemm_w4a16),
    ):
        torch.library.opcheck(op.default, (x, packed, scale, ZERO), {"group_size": 32})
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        out = compiled(x, packed, scale, ZERO, group_size=32)
        assert torch.equal(out, function(x, packed, scale, ZERO, group_size=32))


@pytest.mark.skipif(not torch.xpu.is_available(), reason="needs an Intel GPU")
@pytest.mark.parametrize("group_size", [-1, 32])
def test_xpu_equals_the_reference(group_size: int) -> None:
    if not xpu_kernels_available():
        pytest.skip("needs vllm-xpu-kernels")
    packed, scale, _ = make(group_size)
    x = torch.randn(5, K).half()
    for gemm, reference in (
        (int4_gemm_w4a8, int4_gemm_w4a8_reference),
        (int4_gemm_w4a16, int4_gemm_w4a16_reference),
    ):
        arguments = (x, packed, scale, ZERO)
        out = gemm(*(t.to("xpu") for t in arguments), group_size=group_size).cpu()
        expected = reference(*arguments, group_size=group_size)
        assert torch.allclose(out.float(), expected.float(), rtol=1e-2, atol=1e-2)
