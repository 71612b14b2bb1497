"""Matmul on Marlin tiles: against real kernels' vectors, naive encoders and float64."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiles import (
    E2M1,
    naive_scales,
    naive_tiles,
    naive_zero_points,
    pack,
    relative_error,
)

from ctconvert.runtime.kernels.marlin import fragments, triton
from ctconvert.runtime.kernels.marlin.forms import FORMS
from ctconvert.runtime.kernels.marlin.fragments import Fragments
from ctconvert.runtime.kernels.marlin.kernel import marlin_gemm
from ctconvert.runtime.kernels.marlin.reference import marlin_dequantize, tiles_dequantize
from ctconvert.runtime.kernels.marlin.tiles import marlin_tiles_gemm
from ctconvert.runtime.kernels.marlin.triton import Config, Dense
from ctconvert.runtime.kernels.wna16.triton import FEWEST_ROWS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = Config(16, 64, 4, 4, 2, 1)
SPLIT = Config(16, 128, 4, 4, 2, 3)
WIDE = Config(16, 128, 8, 4, 2, 1)
SIZES = (-1, 32, 48, 64, 96, 192)
MXFP4 = {"form": "mxfp4", "group_size": 32}


def make(
    bits: int, n: int, k: int, group_size: int, zero_point: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(qweight, scales, qzeros, the float64 weight [N, K]) of random codes."""
    rows = k if group_size == -1 else group_size
    codes = torch.randint(0, 2**bits, (k, n))
    scales = (torch.rand(k // rows, n) * 0.02 + 0.01).to(dtype)
    zeros = torch.randint(0, 2**bits, (k // rows, n)) if zero_point else None
    shift = torch.full((k // rows, n), 2 ** (bits - 1)) if zeros is None else zeros
    spread = torch.arange(k) // rows
    weight = (codes - shift[spread]).double() * scales[spread].double()
    packed = None if zeros is None else naive_zero_points(zeros, bits)
    return naive_tiles(codes, bits), naive_scales(scales), packed, weight.t()


def on_device(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize("shape", ["w4.K128.N64", "w4.K256.N128", "w8.K128.N64", "w8.K256.N128"])
def test_tiles_of_the_real_repack_kernel(shape: str) -> None:
    vectors = load_file(GOLDEN / "marlin_repack.safetensors")
    source, tiles = (vectors[f"marlin_repack.{shape}.{key}"] for key in ("in", "out"))
    bits = int(shape[1])
    n, k = source.shape[1], source.shape[0] * 32 // bits
    # The K-packed source: code i of word (r, n) is the weight (r * f + i, n).
    per = 32 // bits
    codes = torch.stack([source >> (bits * i) & (2**bits - 1) for i in range(per)], dim=1)
    signed = codes.reshape(k, n) - 2 ** (bits - 1)
    weight = marlin_dequantize(tiles, torch.ones(1, n), bits=bits, n=n, k=k, group_size=-1)
    assert torch.equal(weight, signed.t().float())
    x = torch.eye(k, dtype=torch.float16)[: k // 2 : 3].contiguous()
    out = triton.gemm(*on_device(x, tiles, torch.ones(1, n)), bits=bits, n=n, k=k, group_size=-1)
    assert torch.equal(out.cpu().float(), signed[: k // 2 : 3].float())


def test_mxfp4_against_the_real_kernel() -> None:
    vectors = load_file(GOLDEN / "marlin_mxfp4.safetensors")
    v = {key.removeprefix("mxfp4_marlin."): value for key, value in vectors.items()}
    n, k = v["weight_packed"].shape[0], v["weight_packed"].shape[1] * 2
    nibbles = torch.stack([v["weight_packed"] & 15, v["weight_packed"] >> 4], dim=-1).reshape(n, k)
    values = torch.tensor(E2M1)[nibbles.long()]
    scale = torch.exp2(v["weight_scale"].double() - 127).repeat_interleave(32, dim=1)
    dense = values.double() * scale
    weight = tiles_dequantize(v["out_weight"], v["out_scale_u8"], n=n, k=k, **MXFP4)
    assert torch.equal(weight.double(), dense)
    arguments = (v["x"], v["out_weight"], v["out_scale_u8"])
    reference = marlin_tiles_gemm(*arguments, n=n, k=k, **MXFP4)
    # The kernel adds in another order: one bf16 step where a sum is near a rounding boundary.
    assert torch.allclose(reference.float(), v["y"].float(), rtol=2**-7, atol=0)
    kernel = triton.tiles_gemm(*on_device(*arguments), n=n, k=k, **MXFP4).cpu()
    # On a CPU this is Triton's interpreter, which truncates to bf16.
    assert torch.allclose(kernel.float(), v["y"].float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group_size"), [(64, 96, 48), (128, 64, -1), (64, 64, 64)])
@pytest.mark.parametrize("zero_point", [False, True])
def test_reference_equals_the_naive_weight(
    bits: int, n: int, k: int, group_size: int, zero_point: bool
) -> None:
    torch.manual_seed(n + k)
    qweight, scales, qzeros, weight = make(bits, n, k, group_size, zero_point, torch.bfloat16)
    shape = {"bits": bits, "n": n, "k": k, "group_size": group_size}
    assert torch.equal(marlin_dequantize(qweight, scales, qzeros, **shape).double(), weight)
    x, bias = torch.randn(3, 2, k).half(), torch.randn(n).half()
    order = torch.randperm(k).int()
    out = marlin_gemm(x, qweight, scales, qzeros, order, bias, **shape)
    expected = x.double()[..., order.long()] @ weight.t() + bias.double()
    assert out.shape == (3, 2, n)
    assert relative_error(out, expected) < 1e-3


#: Tiles, group size, bits and whether there are zero points. Groups that a step of K holds one of,
#: several of, or parts of, with and without zero points, for either width.
TILED: tuple[tuple[Config | Dense, int, int, bool], ...] = (
    *((SMALL, size, 4, zero) for size, zero in zip(SIZES, (True, False) * 3, strict=True)),
    *((SMALL, size, 8, zero) for size, zero in zip(SIZES, (False, True) * 3, strict=True)),
    (SPLIT, -1, 8, True),
    (SPLIT, 64, 4, False),
    (WIDE, 32, 8, True),
    (WIDE, 64, 4, True),
    (WIDE, 96, 4, False),
    (WIDE, 96, 8, True),
    (Dense(), -1, 4, True),
    (Dense(), 48, 8, False),
)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", range(len(TILED)))
def test_triton_equals_the_reference(case: int) -> None:
    config, group_size, bits, zero_point = TILED[case]
    torch.manual_seed(case)
    n, k = 192, 192  # N is no multiple of 128, K none of 128
    # Each kind of tile meets both dtypes, permuted columns and plain, one tile of rows and two.
    dtype, tolerance = ((torch.float16, 1e-3), (torch.bfloat16, 1e-2))[case % 2]
    m, order = (19, 5)[case // 3 % 2], torch.randperm(k).int() if case // 2 % 2 else None
    qweight, scales, qzeros, weight = make(bits, n, k, group_size, zero_point, torch.float16)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    shape = {"bits": bits, "n": n, "k": k, "group_size": group_size}
    arguments = on_device(x, qweight, scales, qzeros, order, bias)
    out = triton.gemm(*arguments, **shape, config=config)
    columns = torch.arange(k) if order is None else order.long()
    expected = x.double()[:, columns] @ weight.t() + bias.double()
    assert out.dtype == dtype
    assert relative_error(out, expected) < tolerance


#: N, K, group size, zero points, scales' dtype and tiles of the kernel that reads whole fragments.
FRAGMENTS: tuple[tuple[int, int, int, bool, torch.dtype, Fragments], ...] = (
    (192, 256, 64, False, torch.float16, Fragments(FEWEST_ROWS, 2, 64, 4, 2, 3, True)),
    (192, 320, 64, True, torch.bfloat16, Fragments(FEWEST_ROWS, 1, 32, 4, 2, 0, True)),
    (128, 192, 48, True, torch.float32, Fragments(16, 4, 16, 8, 2, 1, True)),
    (192, 256, 64, True, torch.float16, Fragments(16, 2, 64, 4, 3, 5, False)),
    (64, 256, 128, False, torch.bfloat16, Fragments(32, 4, 128, 8, 2, 0, False, True)),
    (320, 96, 32, True, torch.float32, Fragments(16, 1, 32, 4, 2, 2, False)),
    (192, 208, -1, True, torch.bfloat16, Fragments(16, 2, 128, 4, 2, 3, False)),
    (128, 80, -1, False, torch.float32, Fragments(FEWEST_ROWS, 2, 64, 4, 2, 0, True)),
    (192, 256, 64, False, torch.float16, Fragments(32, 2, 64, 4, 3, 2, False, True)),
    # A tile wider than N, a step longer than K.
    (64, 48, -1, False, torch.bfloat16, Fragments(FEWEST_ROWS, 4, 128, 4, 4, 2, True)),
)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("case", range(len(FRAGMENTS)))
def test_fragments_equal_the_reference(case: int, tma: bool) -> None:
    n, k, group_size, zero_point, scale_dtype, config = FRAGMENTS[case]
    torch.manual_seed(case)
    qweight, scales, qzeros, weight = make(4, n, k, group_size, zero_point, scale_dtype)
    m, dtype, tolerance = ((19, torch.float16, 1e-3), (7, torch.bfloat16, 1e-2))[case % 2]
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    out = fragments.gemm(
        *on_device(x, qweight, scales, qzeros, bias),
        n=n,
        group_size=group_size,
        config=config,
        tma=tma,
    )
    assert out.dtype == dtype
    assert relative_error(out, x.double() @ weight.t() + bias.double()) < tolerance


def test_fragments_recover_the_weight_exactly_and_sort() -> None:
    torch.manual_seed(0)
    n, k = 192, 128
    qweight, scales, qzeros, weight = make(4, n, k, 32, True, torch.float16)
    x, order = torch.eye(k, dtype=torch.float16)[5:108:3].contiguous(), torch.randperm(k).int()
    shape = {"bits": 4, "n": n, "k": k, "group_size": 32}
    for rows, scale_sum in ((FEWEST_ROWS, True), (16, True), (32, False)):
        config = Fragments(rows, 2, 32, 4, 2, 2, scale_sum)
        out = triton.gemm(
            *on_device(x, qweight, scales, qzeros, order), None, **shape, config=config
        )
        assert torch.equal(out.cpu(), (x.double()[:, order.long()] @ weight.t()).half())


def test_fragments_chosen_suit_every_shape() -> None:
    groups = (0, 16, 32, 48, 64, 128, 4096)
    for m, (n, k), group, zeros, sms in itertools.product(
        (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 192, 193, 256, 257, 300, 1024, 5000),
        ((64, 4096), (4096, 4096), (28672, 4096), (8192, 8192)),
        groups,
        (False, True),
        (1, 132),
    ):
        config = fragments.select(m, n, k, group, zeros, sms)
        if config is None:
            assert m > (256 if fragments.largest_part(group) > 32 else 128)
            continue
        assert group % config.block_k == 0
        assert config.block_k % 16 == 0
        assert not (config.scale_sum and (zeros or config.overlap))
        assert config.block_m * 64 * config.blocks // config.warps // 32 <= 128
        staged = config.stages * config.block_k * (2 * config.block_m + 32 * config.blocks)
        assert staged + 4096 <= 227 * 1024  # shared memory: x and words, with scales beside them
        assert config.block_m >= min(m, 64)
    assert fragments.select(1024, 4096, 4096, 128, False, 132) is not None
    assert fragments.select(512, 4096, 4096, 128, False, 132) is None


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("m", [3, 12, 30, 70, 150, 300])
def test_chosen_fragments_equal_the_reference(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU of few multiprocessors."""
    chosen = []

    def select(*arguments: Any) -> Fragments | None:
        chosen.append(fragments_select(*arguments[:-1], 2))
        return chosen[-1]

    fragments_select = fragments.select
    monkeypatch.setattr(fragments, "select", select)
    monkeypatch.setattr(triton, "compute_capability", lambda _: 90)
    torch.manual_seed(m)
    n, k, group = 192, 256, (64, 128)[m % 2] if m != 12 else -1
    qweight, scales, qzeros, weight = make(4, n, k, group, m in (30, 300), torch.bfloat16)
    x, bias = torch.randn(m, k).bfloat16(), torch.randn(n).bfloat16()
    arguments = on_device(x, qweight, scales, qzeros, None, bias)
    shape = {"bits": 4, "n": n, "k": k, "group_size": k if group == -1 else group}
    out = triton.gemm(*arguments, **shape)
    assert len(chosen) == 1
    assert (chosen[0] is None) == (m > 256)  # dequantised first
    assert relative_error(out, x.double() @ weight.t() + bias.double()) < 1e-2


@pytest.mark.parametrize("kernel", ["wna16", "marlin"])
def test_tiles_to_try_are_ones_the_kernels_take(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    tune = importlib.import_module("tune_mm")
    for m in tune.TOKENS:
        found = tune.candidates(kernel, m)
        assert len(found) == len(set(found)) > 40
        for config in found:
            if isinstance(config, tune.Dense):
                continue
            assert tune.GROUP % config.block_k == 0
            assert not (config.overlap and (config.scale_sum or getattr(config, "pieces", 1) > 1))
            # Sums and weights of a thread fit in its registers.
            held = config.block_m * 64 * config.blocks // config.warps // 32
            assert held <= 128


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("zero_point", [False, True])
def test_gpu_fragments_beside_the_product_change_no_bit(zero_point: bool) -> None:
    """Unpacking beside the product reads and writes the same registers: a race would show."""
    torch.manual_seed(0)
    m, n, k = 333, 2112, 4096
    qweight = torch.randint(-(2**31), 2**31, (k // 16, n * 2), dtype=torch.int32)
    scales = (torch.rand(k // 128, n) * 0.02 + 0.01).bfloat16()
    qzeros = None
    if zero_point:
        qzeros = torch.randint(-(2**31), 2**31, (k // 128, n // 8), dtype=torch.int32)
    weight = marlin_dequantize(qweight, scales, qzeros, bits=4, n=n, k=k, group_size=128)
    x = torch.randn(m, k).bfloat16()
    arguments = on_device(x, qweight, scales, qzeros, None)
    for tiles in ((128, 4, 64, 8, 3, 1), (256, 2, 64, 8, 3, 1), (64, 2, 128, 4, 3, 2)):
        config = Fragments(*tiles, False)
        wanted = fragments.gemm(*arguments, n=n, group_size=128, config=config)
        assert relative_error(wanted, x.double() @ weight.double().t()) < 5e-3
        for _ in range(5):
            overlapped = config._replace(overlap=True)
            out = fragments.gemm(*arguments, n=n, group_size=128, config=overlapped)
            assert torch.equal(out, wanted)


@pytest.mark.parametrize(("start", "m"), [(1, 40), (2, 3)])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        Fragments(FEWEST_ROWS, 2, 32, 4, 3, 2, True),
        Fragments(64, 2, 32, 4, 4, 2, False, True),
    ],
    ids=["small", "fragments of few rows", "fragments"],
)
def test_tensors_anywhere_in_memory(start: int, m: int, config: Config | Fragments) -> None:
    torch.manual_seed(0)
    n, k, group = 192, 64, 32
    qweight, scales, qzeros, weight = make(4, n, k, group, start == 2, torch.float16)
    x = torch.randn(m, k).half()
    moved = [
        None if t is None else torch.cat([t.new_zeros(start), t.flatten()]).to(DEVICE)
        for t in (x, qweight, scales, qzeros)
    ]
    arguments = [
        None if t is None else t[start:].view(like.shape)
        for t, like in zip(moved, (x, qweight, scales, qzeros), strict=True)
    ]
    out = triton.gemm(*arguments, bits=4, n=n, k=k, group_size=group, config=config)
    assert relative_error(out, x.double() @ weight.t()) < 1e-3


def test_more_words_than_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of fragments indexes words with 32 bits, the other with 64."""

    def reached(kernel: str) -> Any:
        def stop(*_: Any, **__: Any) -> None:
            raise LookupError(kernel)

        return stop

    monkeypatch.setattr(triton, "compute_capability", lambda _: 90)
    monkeypatch.setattr(fragments, "gemm", reached("fragments"))
    monkeypatch.setattr(triton, "_choose", reached("other"))
    k = 1 << 16
    scale = torch.ones(1)
    for n, kernel in ((1 << 17, "fragments"), (1 << 18, "other")):
        words = torch.zeros(1, dtype=torch.int32).expand(k // 16, n * 2)
        with pytest.raises(LookupError, match=kernel):
            triton.gemm(
                torch.zeros(1, k).half(),
                words,
                scale.expand(1, n),
                bits=4,
                n=n,
                k=k,
                group_size=-1,
            )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(192, 96, 48), (64, 192, -1), (128, 272, 16), (64, 384, 128)]
)
def test_triton_dequantises_exactly(bits: int, n: int, k: int, group_size: int) -> None:
    torch.manual_seed(k)
    zero_point = (k > 192) == (bits == 4)
    qweight, scales, qzeros, weight = make(bits, n, k, group_size, zero_point, torch.float16)
    arguments = on_device(qweight, scales, qzeros)
    shape = {"n": n, "k": k, "form": FORMS[f"int{bits}"], "group": group_size}
    exact = triton.dequantize(*arguments, **shape, dtype=torch.float32)
    assert torch.equal(exact.cpu().double(), weight)
    rounded = triton.dequantize(*arguments, **shape, dtype=torch.bfloat16)
    assert torch.equal(rounded.cpu(), weight.bfloat16())


@pytest.mark.usefixtures("poisoned")
def test_triton_dequantises_mxfp4_exactly() -> None:
    torch.manual_seed(0)
    n, k = 128, 160
    words = naive_tiles(torch.randint(0, 16, (k, n)), 4)
    scale = torch.randint(2, 254, (k // 32, n), dtype=torch.uint8)
    shape = {"n": n, "k": k, "form": FORMS["mxfp4"], "group": 32, "dtype": torch.bfloat16}
    made = triton.dequantize(*on_device(words, scale, None), **shape)
    assert torch.equal(made.cpu().float(), tiles_dequantize(words, scale, n=n, k=k, **MXFP4))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("config", [SMALL, SPLIT, WIDE], ids=["small", "split", "wide"])
def test_triton_mxfp4_equals_the_reference(config: Config) -> None:
    torch.manual_seed(0)
    n, k, m = 192, 160, 5
    codes = torch.randint(0, 16, (k, n))
    weight = naive_tiles(codes, 4)
    # In Marlin's order or not: any order will do.
    scale = torch.randint(100, 140, (k // 32, n), dtype=torch.uint8)
    bias = torch.randn(n)
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        # Small weights that f16 could not hold, large activations: the f16 product is exact.
        x = (torch.randn(m, k) * 2.0**8).to(dtype)
        small = scale - 24
        arguments = (x, weight, small)
        expected = marlin_tiles_gemm(*arguments, bias=bias.to(dtype), n=n, k=k, **MXFP4)
        out = triton.tiles_gemm(
            *on_device(*arguments, None, None, bias.to(dtype)), n=n, k=k, **MXFP4, config=config
        )
        assert relative_error(out, expected) < tolerance


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 3])
def test_reads_what_the_converter_writes(bits: int, groups: int) -> None:
    from ctconvert.transforms import marlin as transforms

    torch.manual_seed(groups)
    n, k = 128, 192
    codes = torch.randint(0, 2**bits, (n, k))
    zeros = torch.randint(0, 2**bits, (groups, n), dtype=torch.uint8)
    scales = torch.rand(groups, n).bfloat16()
    order = torch.randperm(k).int()
    tiles = transforms.marlin_pack(pack(codes[:, order.long()], bits), bits)
    arguments = (
        tiles,
        transforms.marlin_permute_scales(scales, channelwise=groups == 1),
        transforms.marlin_pack_zero_points(zeros, bits),
    )
    spread = torch.arange(k) // (k // groups)
    weight = (codes[:, order.long()] - zeros.t()[:, spread].long()).double()
    weight *= scales.t()[:, spread].double()
    shape = {"bits": bits, "n": n, "k": k, "group_size": k // groups}
    assert torch.equal(marlin_dequantize(*arguments, **shape).double(), weight)
    x = torch.randn(2, k).bfloat16()
    out = marlin_gemm(*on_device(x, *arguments, order), **shape)
    assert relative_error(out, x.double()[:, order.long()] @ weight.t()) < 5e-3


def test_mxfp4_reads_what_the_converter_writes() -> None:
    from ctconvert.transforms import marlin as transforms

    torch.manual_seed(0)
    n, k = 128, 96
    codes = torch.randint(0, 16, (n, k))
    scale = torch.randint(120, 130, (n, k // 32), dtype=torch.uint8)
    tiles = transforms.marlin_pack(pack(codes, 4), 4)
    permuted = transforms.marlin_permute_mxfp4_scales(scale.t().contiguous())
    weight = torch.tensor(E2M1).double()[codes]
    weight *= torch.exp2(scale.double() - 127).repeat_interleave(32, dim=1)
    assert torch.equal(tiles_dequantize(tiles, permuted, n=n, k=k, **MXFP4).double(), weight)
    x = torch.randn(2, k).bfloat16()
    for kind in (torch.uint8, torch.float8_e8m0fnu):
        out = marlin_tiles_gemm(*on_device(x, tiles, permuted.view(kind)), n=n, k=k, **MXFP4)
        assert relative_error(out, x.double() @ weight.t()) < 5e-3


def test_many_f16_tokens_meet_weights_too_small_for_f16() -> None:
    """More tokens than a tile has, where a bf16 x would take the dequantised weight."""
    torch.manual_seed(0)
    n, k = 64, 64
    m = triton.DENSE_ROWS + 1
    codes = torch.randint(0, 16, (k, n))
    weight = naive_tiles(codes, 4)
    scale = torch.full((k // 32, n), 127 - 30, dtype=torch.uint8)  # f16 ends at 2**-24
    x = (torch.randn(m, k) * 2.0**13).half()
    out = triton.tiles_gemm(*on_device(x, weight, scale), n=n, k=k, **MXFP4)
    expected = x.double() @ tiles_dequantize(weight, scale, n=n, k=k, **MXFP4).double().t()
    assert float(expected.abs().mean()) > 2.0**-14
    assert relative_error(out, expected) < 5e-3


def test_e8m0_ends() -> None:
    codes = torch.full((32, 64), 1)  # 0.5
    codes[0] = 7
    scale = torch.zeros(1, 64, dtype=torch.uint8)
    scale[0, 5] = 255
    weight = tiles_dequantize(naive_tiles(codes, 4), scale, n=64, k=32, **MXFP4)
    assert weight.isnan().any(dim=1).sum() == 1
    assert (weight[:, 0].nan_to_num(0) != 0).sum() == 63
    assert weight[0, 0] == 6 * 2.0**-127 and weight[0, 1] == 2.0**-128
    x = torch.zeros(1, 32).bfloat16()
    x[0, 0] = 2.0**100
    arguments = on_device(x, naive_tiles(codes, 4), scale)
    out = triton.tiles_gemm(*arguments, n=64, k=32, **MXFP4, config=SMALL).cpu().float()
    assert out.isnan().sum() == 1
    assert torch.equal(out.isnan()[0], weight[:, 0].isnan())
    assert (out[~out.isnan()] == 6 * 2.0**-27).all()


def test_infinite_activations_stay_infinite() -> None:
    weight = naive_tiles(torch.full((32, 64), 2), 4)  # 1.0
    scale = torch.full((1, 64), 127, dtype=torch.uint8)
    x = torch.ones(1, 32).half()
    x[0, 3] = torch.inf
    out = triton.tiles_gemm(*on_device(x, weight, scale), n=64, k=32, **MXFP4, config=SMALL)
    assert (out == torch.inf).all()


@pytest.mark.parametrize("lead", [(0,), (), (2, 0)])
def test_no_or_one_token(lead: tuple[int, ...]) -> None:
    qweight, scales, _, weight = make(4, 64, 64, 32, False, torch.float16)
    x = torch.randn(*lead, 64).half()
    out = marlin_gemm(*on_device(x, qweight, scales), bits=4, n=64, k=64, group_size=32)
    assert out.shape == (*lead, 64)
    if out.numel():
        assert relative_error(out, x.double() @ weight.t()) < 1e-3


def test_bad_arguments_are_named() -> None:
    n, k = 128, 64
    qweight, scales, qzeros, _ = make(4, n, k, 32, True, torch.float16)
    good = {
        "x": torch.randn(2, k).half(),
        "qweight": qweight,
        "scales": scales,
        "qzeros": qzeros,
        "g_idx_sort_indices": torch.arange(k).int(),
        "bias": torch.zeros(n).half(),
        "bits": 4,
        "n": n,
        "k": k,
        "group_size": 32,
    }
    marlin_gemm(**good)
    for change, error, message in (
        ({"x": torch.randn(2, k)}, TypeError, "x must be float16 or bfloat16"),
        ({"x": torch.randn(2, 32).half()}, ValueError, r"x must have shape \[\.\.\., 64\]"),
        ({"x": torch.randn(k, 2).half().t()}, ValueError, "x must be contiguous"),
        ({"qweight": qweight.float()}, TypeError, "qweight must be int32"),
        ({"qweight": qweight.t().contiguous()}, ValueError, r"qweight must have shape \[4, 256\]"),
        ({"scales": scales[:1]}, ValueError, r"scales must have shape \[2, 128\]"),
        ({"scales": scales.double()}, TypeError, "scales must be"),
        ({"qzeros": qzeros[:, :8]}, ValueError, r"qzeros must have shape \[2, 16\]"),
        ({"g_idx_sort_indices": torch.arange(k)}, TypeError, "g_idx_sort_indices must be int32"),
        ({"bias": torch.zeros(n)}, TypeError, "bias must be float16"),
        ({"bias": torch.zeros(1).half()}, ValueError, "bias must have shape"),
        ({"bits": 2}, ValueError, "bits must be 4 or 8"),
        ({"n": 96}, ValueError, "n must be a positive multiple of 64"),
        ({"k": 40}, ValueError, "k must be a positive multiple of 16"),
        ({"group_size": 24}, ValueError, "group_size must be -1"),
        ({"scales": scales.to("meta")}, ValueError, "scales is on meta"),
    ):
        with pytest.raises(error, match=message):
            marlin_gemm(**{**good, **change})
    weight, scale = naive_tiles(torch.zeros(k, n), 4), torch.zeros(2, n, dtype=torch.uint8)
    for change, error, message in (
        ({"scale": scale.half()}, TypeError, "scale must be uint8"),
        ({"scale": scale[:1]}, ValueError, r"scale must have shape \[2, 128\]"),
        ({"weight": weight[:2]}, ValueError, r"weight must have shape \[4, 256\]"),
        ({"k": 48}, ValueError, "k must be a multiple of 32"),
    ):
        arguments = {"x": good["x"], "weight": weight, "scale": scale, "n": n, "k": k, **MXFP4}
        with pytest.raises(error, match=message):
            marlin_tiles_gemm(**{**arguments, **change})


def test_the_custom_ops_are_sound() -> None:
    n, k = 64, 64
    qweight, scales, qzeros, _ = make(4, n, k, 32, True, torch.float16)
    x = torch.randn(2, k).half()
    order = torch.arange(k).int()
    ops = torch.ops.ctconvert
    options = {"bits": 4, "n": n, "k": k, "group_size": 32}
    torch.library.opcheck(ops.marlin_gemm.default, (x, qweight, scales, qzeros, order), options)
    scale = torch.full((2, n), 127, dtype=torch.uint8)
    torch.library.opcheck(
        ops.marlin_tiles_gemm.default, (x, qweight, scale), {"n": n, "k": k, **MXFP4}
    )
    compiled = torch.compile(marlin_gemm, backend="aot_eager", fullgraph=True)
    shape = {"bits": 4, "n": n, "k": k, "group_size": 32}
    expected = marlin_gemm(x, qweight, scales, **shape)
    assert torch.equal(compiled(x, qweight, scales, **shape), expected)


def random_words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [(1088, 2048, 128), (4096, 1088, 32), (512, 1536, -1), (576, 1024, 256)],
)
def test_gpu_gemm(bits: int, n: int, k: int, group_size: int) -> None:
    torch.manual_seed(n)
    rows = k if group_size == -1 else group_size
    shape = {"bits": bits, "n": n, "k": k, "group_size": group_size}
    qweight = random_words(k // 16, n * bits // 2)
    scales = (torch.rand(k // rows, n, device="cuda") * 0.02).bfloat16()
    order = torch.randperm(k, device="cuda").int()
    # A pair of zero points and dtype is a compilation of every tile: each width meets all four,
    # each group size two.
    first = (n > 1024) == (bits == 4)
    for zero_point, dtype, tokens in (
        (first, torch.bfloat16, (1, 50, 700)),
        (not first, torch.float16, (17, 100, 256)),
    ):
        qzeros = random_words(k // rows, n * bits // 32) if zero_point else None
        weight = marlin_dequantize(qweight, scales, qzeros, **shape).double()
        for m in tokens:
            x = torch.randn(m, k, device="cuda").to(dtype)
            bias = torch.randn(n, device="cuda").to(dtype)
            out = marlin_gemm(x, qweight, scales, qzeros, order, bias, **shape)
            expected = x.double()[:, order.long()] @ weight.t() + bias.double()
            limit = 5e-3 if dtype == torch.bfloat16 else 1e-3
            assert relative_error(out, expected) < limit, (m, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_mxfp4(dtype: torch.dtype) -> None:
    n, k = 1088, 1056
    weight = random_words(k // 16, n * 2)
    scale = torch.randint(115, 130, (k // 32, n), dtype=torch.uint8, device="cuda")
    dense = tiles_dequantize(weight, scale, n=n, k=k, **MXFP4).double()
    for m in (1, 50, 300):
        x = torch.randn(m, k, device="cuda").to(dtype)
        out = marlin_tiles_gemm(x, weight, scale, n=n, k=k, **MXFP4)
        assert relative_error(out, x.double() @ dense.t()) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 300])
def test_gpu_graph_and_compile(m: int) -> None:
    n, k = 512, 1024
    qweight = random_words(k // 16, n * 2)
    scales = torch.rand(k // 128, n, device="cuda").bfloat16()
    x = torch.randn(m, k, device="cuda").bfloat16()
    shape = {"bits": 4, "n": n, "k": k, "group_size": 128}
    compiled = torch.compile(marlin_gemm, fullgraph=True)
    eager = marlin_gemm(x, qweight, scales, **shape)
    assert torch.equal(compiled(x, qweight, scales, **shape), eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = marlin_gemm(x, qweight, scales, **shape)
    x.copy_(torch.randn(m, k))
    graph.replay()
    assert torch.equal(out, marlin_gemm(x, qweight, scales, **shape))
