"""The wNa16 GEMM and INT8 fake-quantisation: reference against arithmetic, Triton against both."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ctconvert.runtime.kernels.fake_quant.kernel import fake_quant_int8
from ctconvert.runtime.kernels.fake_quant.reference import fake_quant_int8_reference
from ctconvert.runtime.kernels.wna16.kernel import wna16_gemm
from ctconvert.runtime.kernels.wna16.reference import dequantize_wna16, wna16_gemm_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
#: Relative error in the Frobenius norm: the output's rounding, and a dequantised weight's.
TOLERANCE = {F16: 6e-4, BF16: 5e-3}


def pack_along_n(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, N] -> i32 [rows, N / f], code by code."""
    f = 32 // bits
    rows = []
    for row in codes.tolist():
        words = [
            sum(code << (bits * j) for j, code in enumerate(row[at : at + f]))
            for at in range(0, len(row), f)
        ]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


class Problem:
    """Random arguments of the GEMM, and its result in f64 from the formulas."""

    def __init__(
        self,
        m: int,
        n: int,
        k: int,
        *,
        group: int,
        bits: int = 4,
        asymmetric: bool = False,
        dtype: torch.dtype = F16,
        scale_dtype: torch.dtype | None = None,
        bias: bool = False,
        input_scale: float | None = None,
        output_scale: float | None = None,
        device: str = DEVICE,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        groups = k // group
        self.codes = torch.randint(0, 1 << bits, (k, n), generator=generator)
        self.zeros = torch.full((groups, n), 1 << (bits - 1))
        if asymmetric:
            self.zeros = torch.randint(0, 1 << bits, (groups, n), generator=generator)
        scales = torch.rand(groups, n, generator=generator) / 50 + 1e-3
        x = torch.randn(m, k, generator=generator) + 0.25
        self.x = x.to(dtype).to(device)
        self.scales = scales.to(scale_dtype or dtype).to(device)
        self.bias = torch.randn(n, generator=generator).to(dtype).to(device) if bias else None
        if n * k <= 1 << 17:
            pack = functools.partial(pack_along_n, bits=bits)
        else:
            pack = functools.partial(_pack_fast, bits=bits)
        self.qweight = pack(self.codes).to(device)
        self.qzeros = pack(self.zeros).to(device) if asymmetric else None
        self.bits, self.group, self.dtype = bits, group, dtype
        self.input_scale = None if input_scale is None else torch.tensor([input_scale]).to(device)
        self.output_scale = (
            None if output_scale is None else torch.tensor([output_scale]).to(device)
        )

    @property
    def weight(self) -> torch.Tensor:
        """f64 [K, N]."""
        row = torch.arange(self.codes.shape[0]) // self.group
        return (self.codes - self.zeros[row]).double() * self.scales.cpu().double()[row]

    def expected(self) -> torch.Tensor:
        """f64 [M, N] before the output's fake-quantisation."""
        x = self.x.cpu()
        if self.input_scale is not None:
            x = fake_quant_naive(x, self.input_scale.cpu())
        out = x.double() @ self.weight
        return out if self.bias is None else out + self.bias.cpu().double()

    def kwargs(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "group_size": self.group,
            "input_scale": self.input_scale,
            "output_scale": self.output_scale,
        }

    def run(self, function: Callable[..., torch.Tensor] = wna16_gemm) -> torch.Tensor:
        return function(self.x, self.qweight, self.scales, self.qzeros, self.bias, **self.kwargs())

    def launch(self, config: Any, tma: bool | None = None) -> torch.Tensor:
        """The Triton launcher with given tiles, on the GPU or interpreted."""
        from ctconvert.runtime.kernels.wna16 import triton

        return triton.gemm(
            self.x,
            self.qweight,
            self.scales,
            self.qzeros,
            self.bias,
            **self.kwargs(),
            config=config,
            tma=tma,
        )

    def check(self, out: torch.Tensor) -> None:
        """out against the formulas; with an output scale, against the unfused composition."""
        assert out.dtype == self.dtype
        assert out.shape == (self.x.shape[0], self.codes.shape[1])
        wanted = self.expected()
        if self.output_scale is None:
            error = ((out.cpu().double() - wanted).norm() / wanted.norm()).item()
            assert error < TOLERANCE[self.dtype], f"relative error {error:.1e}"
            return
        # What the rounding of the sum moves past a half lands one step away: the result is
        # between those of sums a little smaller and a little larger (no more than 6 sigma).
        slack = 6 * TOLERANCE[self.dtype] * wanted.square().mean().sqrt()
        scale = self.output_scale.cpu()
        least, most = (
            fake_quant_naive((wanted + by).to(self.dtype), scale) for by in (-slack, slack)
        )
        assert ((least <= out.cpu()) & (out.cpu() <= most)).all()


def _pack_fast(codes: torch.Tensor, bits: int) -> torch.Tensor:
    f = 32 // bits
    words = (codes.view(codes.shape[0], -1, f) << (bits * torch.arange(f))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def fake_quant_naive(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fq from exact f64 quotients and products, rounded to x's dtype where the formula does."""
    s = scale.to(x.dtype).double()
    quotient = (x.double() / s).to(x.dtype).double()
    low = quotient.floor()
    odd = low.remainder(2) == 1
    part = quotient - low
    rounded = torch.where((part > 0.5) | ((part == 0.5) & odd), low + 1, low)
    return (rounded.clamp(-128, 127) * s).to(x.dtype)


def test_packing_helpers_agree() -> None:
    for bits in (2, 4, 8):
        codes = torch.randint(0, 1 << bits, (3, 64))
        assert torch.equal(pack_along_n(codes, bits), _pack_fast(codes, bits))


# --- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [16, 48, 96])
def test_reference_dequantises_exactly(bits: int, asymmetric: bool, group: int) -> None:
    p = Problem(1, 64, 96, group=group, bits=bits, asymmetric=asymmetric, device="cpu")
    got = dequantize_wna16(p.qweight, p.scales, p.qzeros, bits=bits, group_size=group)
    assert got.dtype == F32
    # An f16 scale times an integer of 9 bits fits in f32.
    assert torch.equal(got.double(), p.weight)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("bias", "input_scale", "output_scale"),
    [(False, None, None), (True, None, None), (True, 0.03, None), (True, 0.05, 0.1)],
)
def test_reference_matches_the_formulas(
    dtype: torch.dtype,
    bits: int,
    bias: bool,
    input_scale: float | None,
    output_scale: float | None,
) -> None:
    p = Problem(
        5,
        96,
        80,
        group=40,
        bits=bits,
        asymmetric=True,
        dtype=dtype,
        bias=bias,
        input_scale=input_scale,
        output_scale=output_scale,
        device="cpu",
    )
    p.check(p.run(wna16_gemm_reference))
    assert torch.equal(p.run(wna16_gemm), p.run(wna16_gemm_reference))


def test_leading_dimensions_and_empty_input() -> None:
    p = Problem(6, 64, 64, group=32)
    flat = p.run()
    p.x = p.x.view(2, 3, 64)
    assert torch.equal(p.run(), flat.view(2, 3, 64))
    p.x = p.x.reshape(6, 64)[0].contiguous()
    assert p.run().shape == (64,)
    p.x = p.x.new_empty(2, 0, 64)
    assert p.run().shape == (2, 0, 64)


# --- Triton: interpreted on the CPU, compiled on a GPU -------------------------------------------


def tiles(block_m: int, *args: Any) -> Any:
    from ctconvert.runtime.kernels.wna16.triton import FEWEST_ROWS, Tiles

    return Tiles(max(block_m, FEWEST_ROWS), *args)


def dense() -> Any:
    from ctconvert.runtime.kernels.wna16.triton import Dense

    return Dense()


#: Problem, then tiles (their programs count multiprocessors; the interpreter has one).
SMALL: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "tile split in 3, ragged N": (
        {"m": 3, "n": 192, "k": 384, "group": 64, "asymmetric": True},
        lambda: tiles(8, 2, 64, 1, 4, 3, 5, True),
    ),
    "step past K, bias": (
        {"m": 8, "n": 64, "k": 192, "group": 64, "dtype": BF16, "bias": True},
        lambda: tiles(8, 2, 64, 2, 4, 2, 1, True),
    ),
    "8 bits, group of 32": (
        {"m": 11, "n": 96, "k": 256, "group": 32, "bits": 8, "dtype": BF16, "asymmetric": True},
        lambda: tiles(16, 4, 32, 1, 4, 3, 2, True),
    ),
    "2 bits, group of 16, f32 scales": (
        {"m": 1, "n": 144, "k": 128, "group": 16, "bits": 2, "asymmetric": True}
        | {"scale_dtype": F32},
        lambda: tiles(8, 2, 16, 1, 4, 3, 3, True),
    ),
    "group of 48": (
        {"m": 2, "n": 64, "k": 144, "group": 48, "dtype": BF16},
        lambda: tiles(8, 4, 16, 1, 4, 3, 1, True),
    ),
    "few rows, fake-quantised in and out": (
        {"m": 5, "n": 128, "k": 128, "group": 128, "dtype": BF16, "bias": True}
        | {"input_scale": 0.031, "output_scale": 0.11},
        lambda: tiles(8, 2, 64, 1, 4, 3, 2, True),
    ),
    "scaled weight, split, ragged M and N, bias": (
        {"m": 19, "n": 144, "k": 256, "group": 64, "asymmetric": True, "bias": True},
        lambda: tiles(16, 2, 64, 1, 4, 3, 5, False),
    ),
    "scaled weight, 8 bits": (
        {"m": 17, "n": 72, "k": 128, "group": 64, "bits": 8, "asymmetric": True, "dtype": BF16},
        lambda: tiles(16, 2, 64, 1, 4, 3, 0, False),
    ),
    "scaled weight, 2 bits, channel-wise, f32 scales": (
        {"m": 33, "n": 272, "k": 64, "group": 64, "bits": 2, "dtype": BF16, "scale_dtype": F32},
        lambda: tiles(32, 2, 32, 1, 4, 3, 0, False),
    ),
    "scaled weight, scales of the other half type": (
        {"m": 17, "n": 128, "k": 96, "group": 32, "dtype": F16, "scale_dtype": BF16},
        lambda: tiles(32, 2, 32, 1, 4, 3, 2, False),
    ),
    "scaled weight, step past K": (
        {"m": 17, "n": 128, "k": 160, "group": 32, "dtype": F16},
        lambda: tiles(16, 4, 32, 4, 8, 2, 2, False),
    ),
    "scaled weight, unpacked beside the product": (
        {"m": 37, "n": 160, "k": 256, "group": 128, "asymmetric": True, "dtype": BF16},
        lambda: tiles(64, 2, 128, 1, 4, 3, 1, False, True),
    ),
    "symmetric f16, unpacked and scaled beside the product": (
        {"m": 37, "n": 160, "k": 128, "group": 64},
        lambda: tiles(64, 2, 64, 1, 4, 3, 1, False, True),
    ),
    "many rows, fake-quantised in and out": (
        {"m": 21, "n": 136, "k": 64, "group": 32, "input_scale": 0.03, "output_scale": 0.09},
        lambda: tiles(32, 2, 32, 1, 4, 3, 0, False),
    ),
    "dense, odd group": (
        {"m": 19, "n": 136, "k": 120, "group": 24, "dtype": BF16, "asymmetric": True},
        dense,
    ),
    "dense, group of 1, bias": (
        {"m": 4, "n": 48, "k": 33, "group": 1, "bits": 8, "bias": True, "asymmetric": True},
        dense,
    ),
    "dense, 2 bits, fake-quantised in and out": (
        {"m": 7, "n": 80, "k": 64, "group": 64, "bits": 2, "input_scale": 0.03}
        | {"output_scale": 0.05},
        dense,
    ),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_triton_matches_the_formulas(name: str, tma: bool) -> None:
    arguments, config = SMALL[name]
    p = Problem(**arguments)
    if tma and (p.qweight.stride(0) % 4 or "dense" in name):
        pytest.skip("a TMA descriptor needs rows of a multiple of 16 bytes")
    p.check(p.launch(config(), tma))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("kind", ["scaled sum", "scaled weight", "dense"])
def test_one_hot_recovers_the_weight_exactly(bits: int, dtype: torch.dtype, kind: str) -> None:
    p = Problem(20, 128, 64, group=32, bits=bits, dtype=dtype, asymmetric=True)
    rows = [0, 1, 17, 31, 32, 63]
    p.x = torch.zeros(20, 64, dtype=dtype, device=DEVICE)
    for m, k in enumerate(rows):
        p.x[m, k] = 1
    config = dense() if kind == "dense" else tiles(32, 2, 32, 1, 4, 2, 2, kind == "scaled sum")
    out = p.launch(config).cpu()
    # An integer times a 16-bit scale is exact in f32 and rounded once.
    assert torch.equal(out[: len(rows)], p.weight[rows].float().to(dtype))
    assert not out[len(rows) :].any()


def test_tiles_do_not_cross_a_scale_group() -> None:
    """Scales that differ by 2^10 from group to group, and one row of x in each group."""
    p = Problem(4, 64, 128, group=32, dtype=BF16)
    p.scales = (2.0 ** (10 * torch.arange(4) - 20)).to(BF16)[:, None].repeat(1, 64).to(DEVICE)
    p.x = torch.zeros(4, 128, dtype=BF16, device=DEVICE)
    for group in range(4):
        p.x[group, 32 * group + 5] = 1
        p.x[group, 32 * group + 31] = 2
    for scale_sum in (True, False, None):
        config = dense() if scale_sum is None else tiles(16, 2, 32, 1, 4, 2, 1, scale_sum)
        out = p.launch(config).cpu().double()
        assert torch.equal(out, p.expected().to(BF16).double())


def test_selection_suits_every_shape() -> None:
    from ctconvert.runtime.kernels.wna16 import triton as triton_part

    for m, bits, group, sms, n in itertools.product(
        (1, 8, 9, 16, 17, 64, 65, 200, 300, 600, 5000),
        (2, 4, 8),
        (16, 24, 32, 48, 64, 128, 4096),
        (1, 132),
        (4096, 16384, 28672),
    ):
        for config, shared in (
            (triton_part.select(m, n, 4096, bits, group, sms), 227),
            (triton_part.select_elsewhere(m, group, bits), 64),
        ):
            if isinstance(config, triton_part.Tiles):
                staged = config.stages * config.block_k * config.pieces
                staged *= 2 * config.block_m + 32 * config.blocks
                assert staged + 4096 <= shared * 1024  # x and words, with scales beside them
                assert group % config.block_k == 0
                assert config.block_k % 16 == 0
                assert not (config.overlap and (config.scale_sum or config.pieces > 1))
                assert config.block_m * config.blocks * 256 // bits // config.warps // 32 <= 128
                assert config.block_m >= min(m, 64) or bits == 2
                # Eight words and a half word a warp: fewer would move codes between threads.
                assert config.blocks * 2 >= config.warps


def test_runs_of_steps_end_with_tiles_where_little_more_does_it() -> None:
    from ctconvert.runtime.kernels.wna16.triton import steps_a_program

    assert steps_a_program(64, 128, 0) == 128  # a program a tile
    assert steps_a_program(128, 128, 264) == 64  # 63 would do
    assert steps_a_program(192, 128, 264) == 94  # 128 would be a third more
    assert steps_a_program(448, 64, 264) == 109  # more than a tile
    for tiles, steps, programs in itertools.product(
        (1, 7, 64, 300), (1, 5, 32, 224), (1, 132, 396)
    ):
        per = steps_a_program(tiles, steps, programs)
        assert per * programs >= tiles * steps


# --- fake-quantisation ---------------------------------------------------------------------------


def fake_quant_triton(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    from ctconvert.runtime.kernels.fake_quant.triton import fake_quant

    return fake_quant(x, scale)


FAKE_QUANT = [fake_quant_int8_reference, fake_quant_int8, fake_quant_triton]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("function", FAKE_QUANT)
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("scale", [1.0, 0.0317, 0.05, 3.3])
def test_fake_quant_matches_the_formula(
    function: Callable[..., torch.Tensor], dtype: torch.dtype, scale: float
) -> None:
    x = (torch.randn(3, 5, 201, generator=torch.Generator().manual_seed(1)) * 60 * scale).to(dtype)
    s = torch.tensor([scale])
    out = function(x.to(DEVICE), s.to(DEVICE)).cpu()
    assert out.dtype == dtype
    assert torch.equal(out, fake_quant_naive(x, s))


@pytest.mark.parametrize("function", FAKE_QUANT)
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_fake_quant_rounds_half_to_even_and_clamps(
    function: Callable[..., torch.Tensor], dtype: torch.dtype
) -> None:
    inf = torch.inf
    x = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 200.0, -128.5, -200.0, inf, -inf, 0.0]
    wanted = [0.0, 2, 2, 0, -2, -2, 126, 127, 127, -128, -128, 127, -128, 0]
    s = torch.tensor([1.0], device=DEVICE)
    out = function(torch.tensor(x, dtype=dtype, device=DEVICE), s).cpu()
    assert torch.equal(out, torch.tensor(wanted, dtype=dtype))
    nan = function(torch.tensor([torch.nan], dtype=dtype, device=DEVICE), s)
    assert nan.isnan().all()
    assert function(torch.empty(0, 3, dtype=dtype, device=DEVICE), s).shape == (0, 3)


# --- refusals ------------------------------------------------------------------------------------


def test_refusals_name_the_argument() -> None:
    p = Problem(4, 64, 128, group=32, asymmetric=True, bias=True, device="cpu")
    good: dict[str, Any] = {
        "x": p.x,
        "qweight": p.qweight,
        "scales": p.scales,
        "qzeros": p.qzeros,
        "bias": p.bias,
        "bits": 4,
        "group_size": 32,
        "input_scale": torch.ones(1),
        "output_scale": torch.ones(1),
    }
    assert p.qzeros is not None
    assert p.bias is not None
    wna16_gemm(**good)
    cases: list[tuple[str, Any, type[Exception]]] = [
        ("x", p.x.float(), TypeError),
        ("x", p.x.t(), ValueError),
        ("x", p.x[:, ::2], ValueError),
        ("qweight", p.qweight.long(), TypeError),
        ("qweight", p.qweight[:64], ValueError),
        ("qweight", p.qweight.t().contiguous().t(), ValueError),
        ("scales", p.scales.double(), TypeError),
        ("scales", p.scales[:2], ValueError),
        ("scales", p.scales[:, :32].contiguous(), ValueError),
        ("qzeros", p.qzeros.to(torch.int8), TypeError),
        ("qzeros", p.qzeros[:, :4].contiguous(), ValueError),
        ("bias", p.bias[:3], ValueError),
        ("bias", p.bias.int(), TypeError),
        ("bias", p.bias.to("meta"), ValueError),
        ("bits", 3, ValueError),
        ("group_size", 48, ValueError),
        ("group_size", 0, ValueError),
        ("input_scale", torch.ones(2), ValueError),
        ("output_scale", torch.ones(1).half(), TypeError),
    ]
    for name, value, error in cases:
        with pytest.raises(error, match=name if name != "x" else r"\bx\b|qweight"):
            wna16_gemm(**(good | {name: value}))
    with pytest.raises(TypeError, match=r"\bx\b"):
        fake_quant_int8(p.x.float(), torch.ones(1))
    with pytest.raises(ValueError, match=r"\bx\b"):
        fake_quant_int8(p.x.t(), torch.ones(1))
    with pytest.raises(ValueError, match="scale"):
        fake_quant_int8(p.x, torch.ones(2))
    with pytest.raises(TypeError, match="scale"):
        fake_quant_int8(p.x, torch.ones(1).half())


def test_ops_are_registered_as_torch_expects() -> None:
    p = Problem(3, 64, 64, group=32, asymmetric=True, device="cpu")
    tests = ("test_schema", "test_faketensor")
    options = {"bits": 4, "group_size": 32, "output_scale": torch.ones(1)}
    torch.library.opcheck(
        torch.ops.ctconvert.wna16_gemm,
        (p.x, p.qweight, p.scales, p.qzeros),
        options,
        test_utils=tests,
    )
    torch.library.opcheck(
        torch.ops.ctconvert.fake_quant_int8, (p.x, torch.ones(1)), test_utils=tests
    )


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_gpu_overlap_changes_no_bit(bits: int, asymmetric: bool) -> None:
    """Unpacking beside the product reads and writes the same registers: a race would show."""
    # Rows of words that TMA takes at any width.
    p = Problem(333, 2112, 4096, group=128, bits=bits, asymmetric=asymmetric, dtype=BF16)
    wide = 2 if bits == 2 else 4
    for config in ((128, 2, 64, 1, 4, 3, 0), (128, wide, 64, 1, 8, 4, 1), (64, 2, 128, 1, 4, 3, 2)):
        if bits == 2 and config[0] == 128:
            continue  # its sums do not fit in registers
        wanted = p.launch(tiles(*config, False))
        p.check(wanted)
        for _ in range(5):
            assert torch.equal(p.launch(tiles(*config, False, True)), wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("bits", "asymmetric", "dtype", "group"),
    [
        (*case, group)
        for case, group in zip(
            itertools.product([2, 4, 8], [False, True], [F16, BF16]),
            [16, 48, 64, 128, 48, 16, 128, 1536, 1536, 64, 32, 16],
            strict=True,
        )
    ],
)
def test_gpu_grid(bits: int, asymmetric: bool, dtype: torch.dtype, group: int) -> None:
    """Each set is a dozen compilations: the widths meet all dtypes and zero points, not groups."""
    k = 1536
    for m, n, scales in ((1, 1040, None), (13, 512, F32), (17, 1040, None), (300, 528, F32)):
        p = Problem(
            m,
            n,
            k,
            group=group,
            bits=bits,
            asymmetric=asymmetric,
            dtype=dtype,
            scale_dtype=scales,
            bias=m % 2 == 0,
            input_scale=0.03 if m == 13 else None,
            output_scale=0.5 if m == 17 else None,
        )
        out = p.run()
        p.check(out)
        assert torch.equal(out, p.run())  # the same bits again
        if p.output_scale is not None:  # which only quantises what the same call without it gives
            fused, p.output_scale = p.output_scale, None
            plain = p.run()
            p.check(plain)
            assert torch.equal(out.cpu(), fake_quant_naive(plain.cpu(), fused.cpu()))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64, 256, 1024])
def test_gpu_large_against_the_reference(m: int) -> None:
    """Every kernel in the sizes it is tuned for, many times over: a race would show."""
    torch.manual_seed(m)
    k, n = 4096, 8192
    qweight = torch.randint(-(2**31), 2**31 - 1, (k, n // 8), dtype=torch.int32, device="cuda")
    scales = (torch.rand(k // 128, n, device="cuda") / 100 + 0.001).bfloat16()
    x = torch.randn(m, k, device="cuda").bfloat16()
    call = functools.partial(wna16_gemm, x, qweight, scales, bits=4, group_size=128)
    out = call()
    weight = dequantize_wna16(qweight, scales, bits=4, group_size=128)
    wanted = x.double() @ weight.double()
    assert ((out - wanted).norm() / wanted.norm()).item() < TOLERANCE[BF16]
    assert all(torch.equal(call(), out) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2048])
def test_gpu_compile_and_graph(m: int) -> None:
    p = Problem(m, 512, 1024, group=128, dtype=BF16, bias=True)
    eager = p.run()

    @torch.compile(fullgraph=True)
    def layer(x: torch.Tensor) -> torch.Tensor:
        return wna16_gemm(x, p.qweight, p.scales, bias=p.bias, bits=4, group_size=128) * 2

    assert torch.equal(layer(p.x), eager * 2)

    x = p.x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = wna16_gemm(x, p.qweight, p.scales, bias=p.bias, bits=4, group_size=128)
        second = wna16_gemm(x, p.qweight, p.scales, bias=p.bias, bits=4, group_size=128)
    for scale in (1, -2, 4):
        x.copy_(p.x * scale)
        first.fill_(torch.nan)
        second.fill_(torch.nan)
        graph.replay()
        wanted = wna16_gemm(x, p.qweight, p.scales, bias=p.bias, bits=4, group_size=128)
        assert torch.equal(first, wanted)
        assert torch.equal(second, wanted)


@pytest.mark.gpu
def test_gpu_streams_do_not_share_counters() -> None:
    p = Problem(16, 4096, 4096, group=128, dtype=BF16)
    wanted = p.run()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    torch.cuda.synchronize()
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(p.run())
    torch.cuda.synchronize()
    assert all(torch.equal(result, wanted) for result in results)


@pytest.mark.gpu
def test_gpu_unaligned_views() -> None:
    """Tensors that start 2 or 4 bytes into a buffer."""
    p = Problem(24, 256, 256, group=64, dtype=BF16)
    wanted = p.run()
    for name in ("x", "qweight", "scales"):
        tensor = getattr(p, name)
        buffer = tensor.new_zeros(tensor.numel() + 1)
        buffer[1:] = tensor.flatten()
        setattr(p, name, buffer[1:].view(tensor.shape))
    assert torch.equal(p.run(), wanted)
    p.x = p.x[:3]
    p.check(p.run())


@pytest.mark.gpu
def test_gpu_wrong_device() -> None:
    p = Problem(4, 64, 64, group=32)
    with pytest.raises(ValueError, match="scales"):
        wna16_gemm(p.x, p.qweight, p.scales.cpu(), bits=4, group_size=32)
