"""Marlin transforms: golden vectors, references written from the layout's definition, kernels."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from support.paths import ROOT

from ctconvert.transforms import compiled, threads
from ctconvert.transforms.marlin import (
    cpu,
    marlin_pack,
    marlin_pack_zero_points,
    marlin_padded_shape,
    marlin_permute_mxfp4_scales,
    marlin_permute_scales,
    marlin_unpack,
    marlin_unpack_zero_points,
    marlin_unpermute_mxfp4_scales,
    marlin_unpermute_scales,
    pad_words,
    sort_columns,
    unsort_columns,
)

GOLDEN = ROOT / "tests" / "golden"
SIZES = ((64, 128), (128, 256))  # N, K of the golden vectors
INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
GROUPED = [i + 8 * j for i in range(8) for j in range(8)]
CHANNELWISE = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]

pytestmark = pytest.mark.usefixtures("poisoned")


def random_words(n: int, k: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (n, -(-k * bits // 32))
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator, dtype=torch.int32)


# ------------------------------------------------------------------- references, per element


def codes_of(words: torch.Tensor, bits: int) -> list[list[int]]:
    f, mask = 32 // bits, (1 << bits) - 1
    rows = words.tolist()
    return [[row[k // f] >> bits * (k % f) & mask for k in range(len(row) * f)] for row in rows]


def words_of(codes: list[list[int]], bits: int) -> torch.Tensor:
    f = 32 // bits
    rows = []
    for row in codes:
        words = [sum(row[w * f + i] << bits * i for i in range(f)) for w in range(len(row) // f)]
        rows.append([w - (1 << 32) if w >> 31 else w for w in words])
    return torch.tensor(rows, dtype=torch.int32)


def weight_permutation(bits: int) -> list[int]:
    positions = []
    for i in range(32):
        entry = [
            16 * r + i // 4 + 8 * blk
            for blk in (0, 1)
            for r in (2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4) + 8, 2 * (i % 4) + 9)
        ]
        for j in range(4):
            positions += [p + 256 * j for p in entry]
    order = INTERLEAVE[bits]
    return [positions[at + p] for at in range(0, 1024, len(order)) for p in order]


def naive_pack(words: torch.Tensor, bits: int) -> torch.Tensor:
    codes = codes_of(words, bits)
    n, k = len(codes), len(codes[0])
    permutation = weight_permutation(bits)
    rows = []
    for t in range(k // 16):
        flat = [
            codes[16 * block + column][16 * t + row]
            for block in range(n // 16)
            for row in range(16)
            for column in range(16)
        ]
        rows.append([flat[at + p] for at in range(0, len(flat), 1024) for p in permutation])
    return words_of(rows, bits)


def indexed_pack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The definition in torch, for larger weights; checked against :func:`naive_pack` below."""
    n, f = words.shape[0], 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words[:, :, None] >> shifts & (1 << bits) - 1).to(torch.uint8).flatten(1)
    flat = codes.view(n // 16, 16, -1, 16).permute(2, 0, 3, 1).reshape(-1, 1024)
    flat = flat[:, weight_permutation(bits)].view(-1, n * 16 // f, f)
    return sum((flat[..., i].to(torch.int32) << bits * i for i in range(f)), start=torch.tensor(0))


# --------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_golden_repack(path: str, bits: int, n: int, k: int) -> None:
    golden = load_file(GOLDEN / "marlin_repack.safetensors")
    words = golden[f"marlin_repack.w{bits}.K{k}.N{n}.in"].t().contiguous()
    tiles = golden[f"marlin_repack.w{bits}.K{k}.N{n}.out"]
    assert torch.equal(marlin_pack(words, bits), tiles)
    assert torch.equal(marlin_unpack(tiles, bits, n, k), words)


def test_golden_mxfp4(path: str) -> None:
    golden = load_file(GOLDEN / "marlin_mxfp4.safetensors")
    words = golden["mxfp4_marlin.weight_packed"].view(torch.int32)
    tiles = golden["mxfp4_marlin.out_weight"]
    assert torch.equal(marlin_pack(words, 4), tiles)
    assert torch.equal(marlin_unpack(tiles, 4, 128, 256), words)
    scales = golden["mxfp4_marlin.weight_scale"].t()
    permuted = golden["mxfp4_marlin.out_scale_u8"]
    assert torch.equal(marlin_permute_mxfp4_scales(scales), permuted)
    assert torch.equal(marlin_unpermute_mxfp4_scales(permuted), scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(64, 16), (192, 80)])
def test_pack_is_the_definition(path: str, bits: int, n: int, k: int) -> None:
    words = random_words(n, k, bits)
    tiles = naive_pack(words, bits)
    assert torch.equal(indexed_pack(words, bits), tiles)
    assert torch.equal(marlin_pack(words, bits), tiles)
    assert torch.equal(marlin_unpack(tiles, bits, n, k), words)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("n", "k"),
    [
        (64 * 5, 16 * 300),  # partial blocks both ways
        (64 * 19, 16),  # one K tile: blocks of the greatest height
        (64, 16 * 500),  # one run
    ],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_blocks_of_every_size(
    monkeypatch: pytest.MonkeyPatch, workers: int, bits: int, n: int, k: int
) -> None:
    monkeypatch.setattr(threads, "THREADED_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: workers)
    words = random_words(n, k, bits)
    tiles = indexed_pack(words, bits)
    assert torch.equal(marlin_pack(words, bits), tiles)
    assert torch.equal(marlin_unpack(tiles, bits, n, k), words)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tiles", [1, 30, 256, 730, 896])
def test_no_op_wakes_other_threads(monkeypatch: pytest.MonkeyPatch, bits: int, tiles: int) -> None:
    """Torch spreads an op of more than 32768 elements over threads; the blocks stay under it."""
    sizes = set()

    class Recorded(cpu._Block):
        def __init__(self, bits: int, runs: int, tiles: int) -> None:
            super().__init__(bits, runs, tiles)
            sizes.add(self.steps[0][-1].numel())
            sizes.update(self.columns[chunk].numel() for chunk in self.chunks)

    monkeypatch.setattr(cpu, "_Block", Recorded)
    monkeypatch.setattr(compiled, "_loops", lambda source: None)  # the torch path is meant
    marlin_pack(torch.zeros((64 * 19, tiles * bits // 2), dtype=torch.int32), bits)
    assert 0 < max(sizes) <= threads.GRAIN == 32768


@pytest.mark.parametrize("bits", [4, 8])
def test_several_threads_at_once(bits: int) -> None:
    words = [random_words(64 * (2 + i), 16 * (70 + i), bits, seed=i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        packed = list(pool.map(lambda w: marlin_pack(w, bits), words))
    for source, tiles in zip(words, packed, strict=True):
        assert torch.equal(tiles, indexed_pack(source, bits))


@pytest.mark.parametrize("bits", [4, 8])
def test_any_view_of_memory(path: str, bits: int) -> None:
    n, k = 128, 64
    words = random_words(n, k, bits)
    tiles = naive_pack(words, bits)
    shifted = torch.zeros(words.numel() + 1, dtype=torch.int32)
    odd = shifted[1:].view(words.shape).copy_(words)  # no multiple of 8 bytes from the start
    assert torch.equal(marlin_pack(odd, bits), tiles)
    assert torch.equal(marlin_pack(words.t().contiguous().t(), bits), tiles)
    odd = torch.zeros(tiles.numel() + 1, dtype=torch.int32)[1:].view(tiles.shape).copy_(tiles)
    assert torch.equal(marlin_unpack(odd, bits, n, k), words)
    assert torch.equal(marlin_unpack(tiles.t().contiguous().t(), bits, n, k), words)
    # One row of tiles whose stride no view of 64-bit units could have.
    single = torch.zeros((2, n * bits // 2 + 1), dtype=torch.int32)[:1, :-1].copy_(tiles[:1])
    assert torch.equal(marlin_unpack(single, bits, n, 16), words[:, : bits // 2])


@pytest.mark.parametrize(("n", "k"), [(0, 64), (64, 0)])
def test_empty_weights(path: str, n: int, k: int) -> None:
    tiles = marlin_pack(torch.empty((n, k // 8), dtype=torch.int32), 4)
    assert tiles.shape == (k // 16, n * 2)
    assert marlin_unpack(tiles, 4, n, k).shape == (n, k // 8)


@pytest.mark.parametrize(
    ("words", "bits", "message"),
    [
        (torch.zeros((64, 8), dtype=torch.int32), 2, "bits must be 4 or 8, not 2"),
        (torch.zeros((64, 8), dtype=torch.int64), 4, "2-D torch.int32"),
        (torch.zeros((64, 8, 1), dtype=torch.int32), 4, "2-D torch.int32"),
        (torch.zeros((96, 8), dtype=torch.int32), 4, "N = 96, K = 64"),
        (torch.zeros((64, 3), dtype=torch.int32), 4, "N = 64, K = 24"),
        (torch.zeros((64, 5), dtype=torch.int32), 8, "N = 64, K = 20"),
    ],
)
def test_pack_refuses(words: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        marlin_pack(words, bits)


def test_unpack_refuses() -> None:
    tiles = torch.zeros((4, 128), dtype=torch.int32)
    assert marlin_unpack(tiles, 4, 64, 64).shape == (64, 8)
    for n, k, bits, message in (
        (128, 64, 4, r"are i32 \[4, 256\], not \[4, 128\]"),
        (64, 64, 8, r"are i32 \[4, 256\], not"),
        (32, 128, 4, "N = 32"),
        (64, 64, 5, "bits must be"),
    ):
        with pytest.raises(ValueError, match=message):
            marlin_unpack(tiles, bits, n, k)
    with pytest.raises(ValueError, match=r"tiles must be a 2-D torch\.int32"):
        marlin_unpack(tiles.to(torch.uint8), 4, 64, 64)


# ---------------------------------------------------------------------------------- scales


def gathered(rows: list[list[int]], order: list[int] | tuple[int, ...]) -> list[list[int]]:
    """Every run of len(order) of each row: position p takes what was at order[p]."""
    return [[row[at + p] for at in range(0, len(row), len(order)) for p in order] for row in rows]


@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e8m0fnu]
)
def test_scales(path: str, dtype: torch.dtype, channelwise: bool) -> None:
    groups, n = (1, 192) if channelwise else (5, 192)
    generator = torch.Generator().manual_seed(1)
    raw = torch.randint(0, 256, (groups, n, dtype.itemsize), generator=generator).to(torch.uint8)
    scales = raw.view(dtype).view(groups, n)
    index = [list(range(n))] * groups
    order = gathered(index, CHANNELWISE if channelwise else GROUPED)
    expected = torch.stack([raw[g, order[g]] for g in range(groups)])
    permuted = marlin_permute_scales(scales, channelwise)
    assert permuted.dtype == dtype
    assert permuted.is_contiguous()
    assert torch.equal(permuted.view(torch.uint8).view(raw.shape), expected)
    back = marlin_unpermute_scales(permuted, channelwise)
    assert torch.equal(back.view(torch.uint8).view(raw.shape), raw)


def test_scales_from_a_transposed_view(path: str) -> None:
    scales = torch.randn(192, 3)
    expected = marlin_permute_scales(scales.t().contiguous(), channelwise=False)
    assert torch.equal(marlin_permute_scales(scales.t(), channelwise=False), expected)


@pytest.mark.parametrize("n", [192, 64 * 67])  # one program of the kernel, and no whole ones
def test_mxfp4_scales(path: str, n: int) -> None:
    scales = torch.randint(0, 256, (3, n), generator=torch.Generator().manual_seed(2))
    expected = gathered(gathered(scales.tolist(), GROUPED), (0, 2, 1, 3))
    scales = scales.to(torch.uint8)
    permuted = marlin_permute_mxfp4_scales(scales)
    assert permuted.tolist() == expected
    assert torch.equal(marlin_unpermute_mxfp4_scales(permuted), scales)


def test_scales_refused() -> None:
    for permute in (marlin_permute_scales, marlin_unpermute_scales):
        for channelwise in (False, True):
            with pytest.raises(ValueError, match="multiple of 64"):
                permute(torch.zeros(2, 96), channelwise)
            with pytest.raises(ValueError, match="multiple of 64"):
                permute(torch.zeros(64), channelwise)
    for permute_bytes in (marlin_permute_mxfp4_scales, marlin_unpermute_mxfp4_scales):
        with pytest.raises(ValueError, match=r"torch\.uint8"):
            permute_bytes(torch.zeros(2, 64))
        with pytest.raises(ValueError, match="multiple of 64"):
            permute_bytes(torch.zeros((2, 32), dtype=torch.uint8))


# ----------------------------------------------------------------------------- zero points


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("groups", "n"), [(1, 192), (5, 192), (3, 64 * 67)])
def test_zero_points(path: str, bits: int, groups: int, n: int) -> None:
    """With one group too the order is that of 64, not the channel-wise scales' of 32."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (groups, n), generator=generator)
    rows = gathered(gathered(codes.tolist(), GROUPED), INTERLEAVE[bits])
    packed = marlin_pack_zero_points(codes.to(torch.uint8), bits)
    assert torch.equal(packed, words_of(rows, bits))
    assert torch.equal(marlin_unpack_zero_points(packed, bits), codes.to(torch.uint8))


def test_zero_points_pinned(path: str) -> None:
    """Word 0 of a row: columns 0, 16, 32, 48, 8, 24, 40, 56, lowest bits first."""
    codes = torch.zeros((1, 64), dtype=torch.uint8)
    for code, column in enumerate((0, 16, 32, 48, 8, 24, 40, 56)):
        codes[0, column] = code
    assert marlin_pack_zero_points(codes, 4)[0].tolist() == [0x76543210] + [0] * 7


def test_zero_points_refused(path: str) -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        marlin_pack_zero_points(torch.zeros((1, 32), dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        marlin_pack_zero_points(torch.zeros((1, 64), dtype=torch.int8), 4)
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        marlin_pack_zero_points(torch.zeros((1, 64), dtype=torch.uint8), 2)
    for column in (0, 63, 127):
        codes = torch.zeros((2, 128), dtype=torch.uint8)
        codes[1, column] = 16
        with pytest.raises(ValueError, match=r"row 1, column \d+: 16 is outside"):
            marlin_pack_zero_points(codes, 4)
    with pytest.raises(ValueError, match="multiple of 64"):
        marlin_unpack_zero_points(torch.zeros((1, 4), dtype=torch.int32), 4)


# ------------------------------------------------------------------------------- act-order


def act_order(k: int, groups: int) -> list[int]:
    g_idx = [k_ * groups // k for k_ in range(k)]
    random.Random(k).shuffle(g_idx)
    return g_idx


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(1, 8), (17, 104)])
def test_sort_columns(
    monkeypatch: pytest.MonkeyPatch, path: str, bits: int, n: int, k: int
) -> None:
    monkeypatch.setattr(cpu, "_SORT_CODES", 3 * k)  # blocks of three rows
    monkeypatch.setattr(cpu, "GRAIN", 2 * k)
    monkeypatch.setattr(threads, "THREADED_BYTES", 1)
    words, g_idx = random_words(n, k, bits), act_order(k, 4)
    order = sorted(range(k), key=lambda column: (g_idx[column], column))
    expected = words_of([[row[column] for column in order] for row in codes_of(words, bits)], bits)
    result, perm = sort_columns(words, torch.tensor(g_idx, dtype=torch.int32), bits)
    assert perm.dtype == torch.int32
    assert perm.tolist() == order
    assert torch.equal(result, expected)
    assert torch.equal(unsort_columns(result, perm, bits), words)


def test_columns_refused() -> None:
    words = random_words(4, 32, 4)
    for g_idx in (
        torch.zeros(31, dtype=torch.int32),
        torch.zeros(32, dtype=torch.int64),
        torch.zeros((32, 1), dtype=torch.int32),
    ):
        with pytest.raises(ValueError, match=r"must be torch\.int32 \[32\]"):
            sort_columns(words, g_idx, 4)
        with pytest.raises(ValueError, match=r"must be torch\.int32 \[32\]"):
            unsort_columns(words, g_idx, 4)
    for perm in (torch.zeros(32), torch.arange(1, 33), torch.arange(-1, 31)):
        with pytest.raises(ValueError, match=r"not a permutation of 0 \.\. 31"):
            unsort_columns(words, perm.to(torch.int32), 4)
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        sort_columns(words, torch.zeros(32, dtype=torch.int32), 3)


# --------------------------------------------------------------------------------- padding


def test_padded_shape_is_the_smallest() -> None:
    def runs(n: int, k: int) -> bool:
        return (k % 128 == 0 and n % 64 == 0) or (k % 64 == 0 and n % 128 == 0)

    sizes = [1, 16, 63, 64, 65, 100, 128, 129, 192, 200, 320]
    for n in sizes:
        for k in sizes:
            fitting = [
                (rows * columns, rows, columns)
                for rows in range(n, 513)
                for columns in range(-(-k // 64) * 64, 513, 64)
                if runs(rows, columns)
            ]
            assert marlin_padded_shape(n, k) == min(fitting)[1:], (n, k)
    assert marlin_padded_shape(64, 64) == (64, 128)  # as few elements as (128, 64)
    assert marlin_padded_shape(4096, 14336) == (4096, 14336)
    with pytest.raises(ValueError, match="0 x 64"):
        marlin_padded_shape(0, 64)


@pytest.mark.parametrize(("bits", "fill"), [(4, 0), (4, 9), (4, 15), (8, 128), (8, 255)])
@pytest.mark.parametrize(
    ("n", "k", "n_padded", "k_padded"),
    [(70, 80, 128, 128), (3, 77, 5, 104), (7, 79, 7, 80), (6, 64, 6, 64)],
)
def test_pad_words(
    path: str, bits: int, fill: int, n: int, k: int, n_padded: int, k_padded: int
) -> None:
    words = random_words(n, k, bits)  # the last word's unused codes hold anything
    codes = [row[:k] + [fill] * (k_padded - k) for row in codes_of(words, bits)]
    codes += [[fill] * k_padded] * (n_padded - n)
    before = words.clone()
    padded = pad_words(words, bits, n, k, n_padded, k_padded, fill)
    assert torch.equal(padded, words_of(codes, bits))
    assert torch.equal(words, before)
    assert padded.data_ptr() != words.data_ptr()


def test_pad_words_refuses() -> None:
    words = random_words(6, 60, 4)
    for n, k, n_padded, k_padded, fill, message in (
        (6, 48, 64, 64, 0, "are words"),
        (5, 60, 64, 64, 0, "are words"),
        (6, 60, 5, 64, 0, "cannot be padded"),
        (6, 60, 64, 56, 0, "cannot be padded"),
        (6, 60, 64, 68, 0, "cannot be padded"),
        (6, 60, 64, 64, 16, r"outside 0\.\.15"),
        (6, 60, 64, 64, -1, r"outside 0\.\.15"),
    ):
        with pytest.raises(ValueError, match=message):
            pad_words(words, 4, n, k, n_padded, k_padded, fill)


# ------------------------------------------------------------------------------ the kernels


@pytest.mark.parametrize("path", ["triton"], indirect=True)
@pytest.mark.parametrize(("bits", "n", "k"), [(4, 128, 528), (8, 128, 272)])
def test_weights_of_several_programs(path: str, bits: int, n: int, k: int) -> None:
    words = random_words(n, k, bits)
    tiles = indexed_pack(words, bits)
    assert torch.equal(marlin_pack(words, bits), tiles)
    assert torch.equal(marlin_unpack(tiles, bits, n, k), words)


@pytest.mark.parametrize("path", ["triton"], indirect=True)
@pytest.mark.parametrize("bits", [4, 8])
def test_columns_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch, path: str, bits: int) -> None:
    from ctconvert.transforms.marlin import triton as kernels

    monkeypatch.setattr(kernels, "_SCRATCH_BYTES", 1)  # 128 rows a block
    words = random_words(131, 40, bits)
    perm = torch.randperm(40, generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    codes = [[row[column] for column in perm.tolist()] for row in codes_of(words, bits)]
    assert torch.equal(kernels.take_columns_triton(words, perm, bits), words_of(codes, bits))


def test_nothing(path: str) -> None:
    assert marlin_permute_scales(torch.zeros((0, 64)), channelwise=False).shape == (0, 64)
    zeros = marlin_pack_zero_points(torch.zeros((3, 0), dtype=torch.uint8), 4)
    assert zeros.shape == (3, 0)
    assert marlin_unpack_zero_points(zeros, 4).shape == (3, 0)
    padded = pad_words(torch.zeros((0, 0), dtype=torch.int32), 4, 0, 0, 2, 8, 3)
    assert padded.tolist() == [[0x33333333]] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(64, 16), (192, 272), (28672, 8192)])
def test_gpu_weights(bits: int, n: int, k: int) -> None:
    words = random_words(n, k, bits)
    tiles = marlin_pack(words, bits)
    assert torch.equal(marlin_pack(words.cuda(), bits).cpu(), tiles)
    assert torch.equal(marlin_unpack(tiles.cuda(), bits, n, k).cpu(), words)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(5, 40), (1030, 14336)])
def test_gpu_columns(bits: int, n: int, k: int) -> None:
    words, g_idx = random_words(n, k, bits), torch.tensor(act_order(k, 8), dtype=torch.int32)
    expected, order = sort_columns(words, g_idx, bits)
    result, perm = sort_columns(words.cuda(), g_idx.cuda(), bits)
    assert torch.equal(perm.cpu(), order)
    assert torch.equal(result.cpu(), expected)
    assert torch.equal(unsort_columns(result, perm, bits).cpu(), words)


@pytest.mark.gpu
@pytest.mark.parametrize(("groups", "n"), [(1, 64), (3, 192), (2048, 20480)])
def test_gpu_side_tensors(groups: int, n: int) -> None:
    def same(transform: Callable[..., torch.Tensor], tensor: torch.Tensor, *arguments: int) -> None:
        expected = transform(tensor, *arguments)
        assert torch.equal(transform(tensor.cuda(), *arguments).cpu(), expected)

    raw = torch.randint(0, 256, (groups, n), dtype=torch.uint8)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        scales = raw.to(dtype) * 3 + 1
        for channelwise in (False, True):
            same(marlin_permute_scales, scales, channelwise)
            same(marlin_unpermute_scales, scales, channelwise)
    same(marlin_permute_mxfp4_scales, raw)
    same(marlin_unpermute_mxfp4_scales, raw)
    for bits in (4, 8):
        codes = raw & ((1 << bits) - 1)
        same(marlin_pack_zero_points, codes, bits)
        same(marlin_unpack_zero_points, marlin_pack_zero_points(codes, bits), bits)
        words = random_words(groups, n, bits)
        same(pad_words, words, bits, groups, n, groups + 64, n + 128, 7)
        same(pad_words, words, bits, groups, n - 1, groups, n, 5)
    codes = raw & 15
    codes[-1, 7] = 16
    with pytest.raises(ValueError, match=rf"row {groups - 1}, column \d+: 16 is outside"):
        marlin_pack_zero_points(codes.cuda(), 4)


@pytest.mark.gpu
def test_gpu_offsets_of_64_bits() -> None:
    """2**31 words and one run more: the last offsets do not fit 32 bits."""
    n, k, bits = (1 << 18) + 64, 1 << 16, 4
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of free GPU memory")
    torch.use_deterministic_algorithms(False)  # filling every output would take the memory again
    words = torch.empty((n, k // 8), dtype=torch.int32, device="cuda").random_()
    tiles = marlin_pack(words, bits)
    for rows in (slice(0, 64), slice(n - 64, n)):
        run = slice(rows.start * 2, rows.stop * 2)
        assert torch.equal(tiles[:, run].cpu(), marlin_pack(words[rows].cpu(), bits))
    assert torch.equal(marlin_unpack(tiles, bits, n, k), words)
