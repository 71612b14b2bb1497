"""W8A8 matmul and the quantisation of its activations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ctconvert.runtime.kernels.quantize import triton as quantize_triton
from ctconvert.runtime.kernels.quantize.kernel import quantize_per_token, quantize_static
from ctconvert.runtime.kernels.quantize.reference import (
    quantize_per_token_reference,
    quantize_static_reference,
)
from ctconvert.runtime.kernels.scaled_mm import triton
from ctconvert.runtime.kernels.scaled_mm.kernel import scaled_linear, scaled_mm
from ctconvert.runtime.kernels.scaled_mm.reference import scaled_mm_reference
from ctconvert.runtime.kernels.scaled_mm.triton import Config
from ctconvert.runtime.nvcc import KernelUnavailableError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT8, FP8 = torch.int8, torch.float8_e4m3fn
DTYPES = [INT8, FP8]
LARGEST = {INT8: 127.0, FP8: 448.0}

#: every finite e4m3 value, from its definition
E4M3 = sorted(
    {
        sign * (m / 8 * 2**-6 if e == 0 else (1 + m / 8) * 2 ** (e - 7))
        for sign, e, m in itertools.product((1, -1), range(16), range(8))
        if not (e == 15 and m == 7)
    }
)


def nearest(value: float, dtype: torch.dtype) -> float:
    """The code's value that a float32 quotient rounds to, half to even, saturating."""
    if math.isnan(value):
        return 0.0 if dtype == INT8 else math.nan
    if dtype == INT8:
        return float(min(max(round(min(max(value, -1e4), 1e4)), -128), 127))
    value = min(max(value, -448.0), 448.0)
    distance = min(abs(value - v) for v in E4M3)
    near = [v for v in E4M3 if abs(value - v) == distance]
    if len(near) == 1:
        return near[0]
    return min(near, key=lambda v: math.frexp(v)[0] * 16 % 2)  # the even mantissa


def randoms(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype == INT8:
        return torch.randint(-128, 128, shape, dtype=INT8)
    return (torch.randn(shape) * 60).to(FP8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [None, 8])
def test_per_token_reference_is_the_formula(dtype: torch.dtype, group_size: int | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 21).half()
    x[0, 0] = 0
    q, scale = quantize_per_token(x, dtype, group_size)
    size = group_size or 21
    assert q.shape == x.shape
    assert scale.shape == (3, 2, math.ceil(21 / size))
    for i, j in itertools.product(range(3), range(2)):
        for g in range(scale.shape[-1]):
            row = x[i, j, g * size : (g + 1) * size].float()
            largest = row.abs().max()
            expected = largest / LARGEST[dtype] if largest > 0 else torch.tensor(1.0)
            assert scale[i, j, g] == expected
            codes = q[i, j, g * size : (g + 1) * size].float().tolist()
            assert codes == [nearest(v, dtype) for v in (row / expected).tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_static_reference_is_the_formula(dtype: torch.dtype) -> None:
    scale = torch.tensor([0.5])
    x = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75, 63.5, 64.0, 1e6, -1e6, 3.3, 0.0, 1e-3])
    zero = torch.tensor([5], dtype=INT8)
    q = quantize_static(x, scale, None, dtype)
    assert q.float().tolist() == [nearest(v, dtype) for v in (x / scale).tolist()]
    if dtype == INT8:
        # round(0.5) + 5, not round(5.5): the zero point is added to the rounded quotient
        q = quantize_static(x, scale, zero)
        expected = [min(max(nearest(v, INT8) + 5, -128), 127) for v in (x / scale).tolist()]
        expected[7], expected[8] = 127, -128
        assert q.tolist() == expected


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_triton_quantisation_equals_the_reference(dtype: torch.dtype, kind: torch.dtype) -> None:
    torch.manual_seed(1)
    x = (torch.randn(5, 3, 200) * 3).to(kind)
    x[1, 1] = 0
    x[2, 2, 0] = 98 / 8  # many quotients lie half-way between two codes
    for group_size in (None, 128, 64):
        q, scale = quantize_triton.quantize_per_token(x.to(DEVICE), dtype, group_size)
        q_ref, scale_ref = quantize_per_token_reference(x, dtype, group_size)
        assert torch.equal(scale.cpu(), scale_ref)
        assert torch.equal(q.cpu().view(INT8), q_ref.view(INT8))
    step = torch.tensor([0.017])
    zeros = [None, torch.tensor([-3], dtype=INT8)] if dtype == INT8 else [None]
    for zero in zeros:
        q = quantize_triton.quantize_static(
            x.to(DEVICE), step.to(DEVICE), None if zero is None else zero.to(DEVICE), dtype
        )
        q_ref = quantize_static_reference(x, step, zero, dtype)
        assert torch.equal(q.cpu().view(INT8), q_ref.view(INT8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_quantises_long_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = torch.randn(2, 20001)
    q, scale = quantize_triton.quantize_per_token(x.to(DEVICE), dtype, None)
    q_ref, scale_ref = quantize_per_token_reference(x, dtype)
    assert torch.equal(scale.cpu(), scale_ref)
    assert torch.equal(q.cpu().view(INT8), q_ref.view(INT8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nan_or_infinity_reaches_the_output(dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(2, 64)
    x[1, 9] = bad
    weight = torch.ones(16, 64).to(dtype)
    out = scaled_linear(x, weight, torch.ones(16, 1))
    assert torch.allclose(out[0], torch.full((16,), 64.0))
    assert out[1].isnan().all()
    _, scale = quantize_triton.quantize_per_token(x.to(DEVICE), dtype, None)
    assert torch.equal(scale.flatten().cpu(), torch.tensor([1 / LARGEST[dtype], math.inf]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("static", [False, True])
def test_matmul_reference_is_the_formula(dtype: torch.dtype, static: bool) -> None:
    torch.manual_seed(3)
    m, n, k = 3, 5, 19
    x_q, weight = randoms((m, k), dtype), randoms((n, k), dtype)
    x_scale = torch.rand(1) if static else torch.rand(m, 1)
    weight_scale, bias = torch.rand(n, 1), torch.randn(n).half()
    zeros = [None, torch.tensor([-128], dtype=INT8)] if static and dtype == INT8 else [None]
    for zero in zeros:
        out = scaled_mm(
            x_q,
            weight,
            x_scale,
            weight_scale,
            x_zero_point=zero,
            bias=bias,
            out_dtype=torch.float32,
        )
        for i, j in itertools.product(range(m), range(n)):
            shift = 0 if zero is None else -128
            total = sum(
                (a - shift) * b
                for a, b in zip(x_q[i].double().tolist(), weight[j].double().tolist(), strict=True)
            )
            scale = x_scale.flatten()[0 if static else i].item() * weight_scale[j, 0].item()
            assert out[i, j].item() == pytest.approx(total * scale + bias[j].item(), rel=1e-5)


def test_blockwise_reference_is_the_formula() -> None:
    torch.manual_seed(4)
    m, n, k = 2, 130, 260
    x_q, weight = randoms((m, k), FP8), randoms((n, k), FP8)
    x_scale, weight_scale = torch.rand(m, 3), torch.rand(2, 3)
    out = scaled_mm(x_q, weight, x_scale, weight_scale, out_dtype=torch.float32)
    for i, j in [(0, 0), (1, 127), (0, 128), (1, 129)]:
        total = sum(
            x_q[i, p].item()
            * weight[j, p].item()
            * x_scale[i, p // 128].item()
            * weight_scale[j // 128, p // 128].item()
            for p in range(k)
        )
        assert out[i, j].item() == pytest.approx(total, rel=1e-4, abs=1e-2)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "config", [Config(16, 64, 128, 4, 2, 1), Config(32, 32, 128, 4, 2, 3)], ids=["one", "split"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_matmul_equals_the_reference(dtype: torch.dtype, config: Config) -> None:
    torch.manual_seed(5)
    m, n, k = 19, 144, 272
    x_q, weight = randoms((m, k), dtype), randoms((n, k), dtype)
    bias, rows, one = torch.randn(n), torch.rand(m, 1), torch.rand(1)
    zero = torch.tensor([-9], dtype=INT8)
    cases = [
        (rows, torch.rand(n, 1), None, bias),
        (one, torch.rand(n, 1), None, None),
        (one, torch.rand(1), None, bias.half()),
    ]
    if dtype == INT8:
        cases.append((one, torch.rand(n, 1), zero, bias))
    else:
        cases.append((torch.rand(m, 3), torch.rand(2, 3), None, bias))
        cases.append((one, torch.rand(2, 3), None, None))
    for x_scale, weight_scale, x_zero, b in cases:
        operands = (t.to(DEVICE) for t in (x_q, weight, x_scale, weight_scale))
        out = triton.scaled_mm(
            *operands,
            x_zero_point=None if x_zero is None else x_zero.to(DEVICE),
            bias=None if b is None else b.to(DEVICE),
            out_dtype=torch.float32,
            config=config,
        )
        expected = scaled_mm_reference(
            x_q, weight, x_scale, weight_scale, x_zero_point=x_zero, bias=b, out_dtype=torch.float32
        )
        assert torch.allclose(out.cpu(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_stays_near_the_product(dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    x = torch.randn(2, 3, 160)
    dense = torch.randn(48, 160)
    weight, weight_scale = quantize_per_token(dense, dtype)
    bias = torch.randn(48)
    exact = x @ dense.t() + bias
    scale = x.abs().max().reshape(1) / LARGEST[dtype]
    outputs = [scaled_linear(x, weight, weight_scale, bias=bias)]
    outputs.append(scaled_linear(x, weight, weight_scale, input_scale=scale, bias=bias))
    if dtype == INT8:
        shifted = x + 2  # one-sided: what a zero point is for
        low, high = shifted.min(), shifted.max()
        step = ((high - low) / 255).reshape(1)
        zero = (-128 - low / step).round().to(INT8)
        outputs.append(
            scaled_linear(
                shifted,
                weight,
                weight_scale,
                input_scale=step,
                input_zero_point=zero,
                weight_sum=weight.sum(1, dtype=torch.int32),
                bias=bias - 2 * dense.sum(1),
            )
        )
    for out in outputs:
        assert out.shape == (2, 3, 48)
        assert (out - exact).norm() / exact.norm() < (0.02 if dtype == INT8 else 0.06)


def test_linear_blockwise() -> None:
    torch.manual_seed(7)
    x, dense = torch.randn(4, 256).bfloat16(), torch.randn(192, 256)
    dense[:128, :128] *= 50
    tiles = dense.reshape(192, 2, 128)
    largest = torch.stack([tiles[:128].abs().amax((0, 2)), tiles[128:].abs().amax((0, 2))])
    weight_scale = largest / 448
    rows = weight_scale.repeat_interleave(128, dim=0)[:192]
    weight = (tiles / rows[:, :, None]).reshape(192, 256).to(FP8)
    out = scaled_linear(x, weight, weight_scale)
    exact = x.float() @ dense.t()
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("m", [0, 1])
def test_few_tokens(m: int) -> None:
    weight = torch.ones(16, 32, dtype=INT8)
    out = scaled_linear(
        torch.ones(m, 32).half().to(DEVICE), weight.to(DEVICE), torch.ones(16, 1, device=DEVICE)
    )
    assert torch.equal(out.cpu(), torch.full((m, 16), 32.0).half())


def test_bad_arguments_are_named() -> None:
    m, n, k = 4, 16, 32
    x_q, weight = randoms((m, k), INT8), randoms((n, k), INT8)
    good = {
        "x_q": x_q,
        "weight": weight,
        "x_scale": torch.ones(1),
        "weight_scale": torch.ones(n, 1),
        "x_zero_point": torch.zeros(1, dtype=INT8),
        "bias": torch.ones(n),
        "out_dtype": torch.float16,
    }
    scaled_mm(**good)
    fp8 = {"x_q": x_q.float().to(FP8), "weight": weight.float().to(FP8)}
    for change, error, message in (
        ({"x_q": x_q.int()}, TypeError, "x_q must be int8 or float8_e4m3fn"),
        ({"x_q": x_q[0]}, ValueError, "x_q must have shape"),
        ({"weight": weight.t()}, ValueError, r"weight must have shape \[any, 32\]"),
        ({"weight": randoms((32, 16), INT8).t()}, ValueError, "weight must be contiguous"),
        ({"weight": fp8["weight"]}, TypeError, "weight must be int8"),
        ({"x_scale": torch.ones(2)}, ValueError, "x_scale must have shape"),
        ({"x_scale": torch.ones(m, 1)}, ValueError, "x_zero_point needs a static x_scale"),
        ({"x_scale": torch.ones(1).half()}, TypeError, "x_scale must be float32"),
        ({"weight_scale": torch.ones(n)}, ValueError, "weight_scale must have shape"),
        ({"weight_scale": torch.ones(1, 1)}, ValueError, "weight_scale must have shape"),
        ({"bias": torch.ones(n + 1)}, ValueError, "bias must have shape"),
        ({"out_dtype": INT8}, TypeError, "out_dtype must be"),
        (fp8, ValueError, "x_zero_point needs an int8 weight"),
        ({"weight_sum": torch.ones(n)}, TypeError, "weight_sum must be int32"),
        ({"bias": torch.ones(n, device="meta")}, ValueError, "bias is on meta"),
    ):
        with pytest.raises(error, match=message):
            scaled_mm(**{**good, **change})
    long = torch.zeros(1, 65552, dtype=INT8)
    with pytest.raises(ValueError, match="65552; above 65536"):
        scaled_mm(long, long, torch.ones(1), torch.ones(1), out_dtype=torch.float32)
    x = torch.ones(4, k)
    with pytest.raises(ValueError, match=r"weight_zero_point must have shape"):
        scaled_linear(x, weight, torch.ones(n, 1), weight_zero_point=torch.zeros(n, dtype=INT8))
    with pytest.raises(ValueError, match=r"weight_zero_point needs an int8 weight"):
        scaled_linear(
            x,
            weight.float().to(FP8),
            torch.ones(n, 1),
            weight_zero_point=torch.zeros(n, 1, dtype=INT8),
        )
    with pytest.raises(ValueError, match="input_zero_point needs a static input_scale"):
        scaled_linear(x, weight, torch.ones(n, 1), input_zero_point=torch.zeros(1, dtype=INT8))
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., 32\]"):
        scaled_linear(x[:, :16].contiguous(), weight, torch.ones(n, 1))
    with pytest.raises(TypeError, match="dtype must be int8"):
        quantize_per_token(x, torch.uint8)
    with pytest.raises(ValueError, match="group_size must be positive"):
        quantize_per_token(x, INT8, 0)
    with pytest.raises(ValueError, match="zero_point needs dtype int8"):
        quantize_static(x, torch.ones(1), torch.zeros(1, dtype=INT8), FP8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_custom_ops_are_sound(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 32), randoms((16, 32), dtype)
    ops = torch.ops.ctconvert
    # opcheck's schema test multiplies its inputs, which torch does not do in f8.
    tests = ("test_faketensor",) if dtype == FP8 else ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.quantize_per_token.default, (x, dtype, 16), test_utils=tests)
    static = (x, torch.ones(1), None, dtype)
    torch.library.opcheck(ops.quantize_static.default, static, test_utils=tests)
    x_q, scale = quantize_per_token(x, dtype)
    arguments, options = (x_q, weight, scale, torch.ones(16, 1)), {"out_dtype": torch.bfloat16}
    torch.library.opcheck(ops.scaled_mm.default, arguments, options, test_utils=tests)
    compiled = torch.compile(scaled_linear, backend="aot_eager", fullgraph=True)
    weight_scale = torch.ones(16, 1)
    assert torch.equal(compiled(x, weight, weight_scale), scaled_linear(x, weight, weight_scale))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "out_dtypes"),
    [
        (1, (torch.bfloat16,)),
        (17, (torch.float16,)),
        (64, (torch.float32,)),
        (256, (torch.bfloat16, torch.float32)),  # f8 to bf16 is torch's own product
        (1000, (torch.bfloat16, torch.float16)),
    ],
)
def test_gpu_matmul(dtype: torch.dtype, m: int, out_dtypes: tuple[torch.dtype, ...]) -> None:
    torch.manual_seed(m)
    n, k = 1040, 2064
    x_q, weight = randoms((m, k), dtype).cuda(), randoms((n, k), dtype).cuda()
    x_scale, weight_scale = torch.rand(m, 1).cuda(), torch.rand(n, 1).cuda()
    bias = torch.randn(n).cuda()
    for out_dtype in out_dtypes:
        scale = 1e-4 * weight_scale
        out = scaled_mm(x_q, weight, x_scale, scale, bias=bias, out_dtype=out_dtype)
        expected = scaled_mm_reference(
            x_q.cpu(),
            weight.cpu(),
            x_scale.cpu(),
            scale.cpu(),
            bias=bias.cpu(),
            out_dtype=torch.float32,
        )
        error = (out.float().cpu() - expected).norm() / expected.norm()
        limit = {torch.float32: 1e-5 if dtype == INT8 else 5e-4}.get(out_dtype, 4e-3)
        assert error < limit, out_dtype
    if dtype == INT8:
        zero = torch.tensor([11], dtype=INT8)
        out = scaled_mm(
            x_q,
            weight,
            x_scale[:1, 0],
            weight_scale,
            x_zero_point=zero.cuda(),
            out_dtype=torch.float32,
        )
        expected = scaled_mm_reference(
            x_q.cpu(),
            weight.cpu(),
            x_scale[:1, 0].cpu(),
            weight_scale.cpu(),
            x_zero_point=zero,
            out_dtype=torch.float32,
        )
    else:
        blocks = torch.rand(m, 17).cuda(), torch.rand(9, 17).cuda()
        out = scaled_mm(x_q, weight, *blocks, out_dtype=torch.float32)
        expected = scaled_mm_reference(
            x_q.cpu(), weight.cpu(), *(b.cpu() for b in blocks), out_dtype=torch.float32
        )
    limit = 1e-5 if dtype == INT8 else 5e-4
    assert (out.cpu() - expected).norm() / expected.norm() < limit


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_quantisation_equals_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in ((300, 4096), (3, 14336), (2, 40000)):
        x = torch.randn(shape).bfloat16()
        x[0] = x[0].clamp(-3, 3)
        x[0, 0] = 49 / 16  # many quotients lie half-way between two codes
        for group_size in (None, 128):
            q, scale = quantize_per_token(x.cuda(), dtype, group_size)
            q_ref, scale_ref = quantize_per_token_reference(x, dtype, group_size)
            assert torch.equal(scale.cpu(), scale_ref)
            assert torch.equal(q.cpu().view(INT8), q_ref.view(INT8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [3, 300])
def test_gpu_graph_and_compile(dtype: torch.dtype, m: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(m, 512, device="cuda").bfloat16()
    weight, weight_scale = quantize_per_token(torch.randn(256, 512, device="cuda"), dtype)
    eager = scaled_linear(x, weight, weight_scale)
    compiled = torch.compile(scaled_linear, fullgraph=True)
    assert torch.equal(compiled(x, weight, weight_scale), eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = scaled_linear(x, weight, weight_scale)
    x.copy_(torch.randn(m, 512))
    graph.replay()
    assert torch.equal(out, scaled_linear(x, weight, weight_scale))


@pytest.mark.parametrize("lead", [(1, 1), (2, 3), (5,), ()])
@pytest.mark.parametrize("static", [False, True])
def test_an_asymmetric_weight(static: bool, lead: tuple[int, ...]) -> None:
    """Zero points of weight and input, against the sum written out in float64."""
    torch.manual_seed(len(lead))
    n, k = 48, 80
    weight = torch.randint(-128, 128, (n, k), dtype=INT8)
    zero = torch.randint(-128, 128, (n, 1), dtype=INT8)
    scale, bias = torch.rand(n, 1) / 50 + 0.001, torch.randn(n)
    x = torch.randn(*lead, k).bfloat16()
    shift = torch.tensor([-7], dtype=INT8) if static else None
    step = torch.tensor([0.031]) if static else None
    out = scaled_linear(
        *(t.to(DEVICE) for t in (x, weight, scale)),
        input_scale=None if step is None else step.to(DEVICE),
        input_zero_point=None if shift is None else shift.to(DEVICE),
        weight_zero_point=zero.to(DEVICE),
        bias=bias.to(DEVICE),
    )
    rows = x.double().reshape(-1, k)
    if step is None or shift is None:
        unit = rows.abs().amax(1, keepdim=True) / 127
        taken = (rows / unit).round().clamp(-128, 127) * unit
    else:
        taken = ((rows / step + shift.double()).round().clamp(-128, 127) - shift.double()) * step
    dense = (weight.double() - zero.double()) * scale.double()
    expected = taken @ dense.t() + bias.double()
    assert out.shape == (*lead, n)
    assert out.dtype == x.dtype
    error = (out.double().cpu().reshape(-1, n) - expected).norm() / expected.norm()
    assert error < 1e-2


def test_f8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    device = torch.device("cuda", 0)
    with pytest.raises(KernelUnavailableError, match=r"A100 has compute capability 8\.0; f8"):
        quantize_triton.check_device(FP8, device)
    quantize_triton.check_device(INT8, device)
