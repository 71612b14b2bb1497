"""2:4 transforms against CUTLASS's own output and against per-element references."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.paths import ROOT
from torch import Tensor

from ctconvert.transforms import sparse24, threads
from ctconvert.transforms.sparse24 import cpu

GOLDEN = ROOT / "tests" / "golden" / "cutlass_sparse24.safetensors"
DTYPES = [torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
KEPT_PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]

pytestmark = pytest.mark.usefixtures("poisoned")


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers of its element size: NaN and -0.0 compare as bits."""
    if tensor.dtype == torch.uint8:
        return tensor
    return tensor.contiguous().view(torch.int8 if tensor.element_size() == 1 else torch.int16)


def same(actual: Tensor, expected: Tensor) -> bool:
    return (
        actual.dtype == expected.dtype
        and actual.shape == expected.shape
        and torch.equal(bits(actual).cpu(), bits(expected).cpu())
    )


def from_bits(rows: list[list[int]], dtype: torch.dtype) -> Tensor:
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.tensor(rows, dtype=torch.int8 if size == 1 else torch.int16).view(dtype)


def random_weight(
    n: int, k: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """dense, bitmask and compressed, element by element; kept values are often 0 or -0.0."""
    rng = random.Random(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    top = 1 << (8 * size - 1)
    dense, masks, kept = [], [], []
    for _ in range(n):
        row = [0] * k
        mask = [0] * -(-k // 8)
        values = []
        for column in range(0, k, 4):
            for p in rng.choice(KEPT_PAIRS):
                value = rng.choice([0, -top, *(rng.randint(1 - top, top - 1) for _ in range(6))])
                row[column + p] = value
                mask[(column + p) // 8] |= 1 << (column + p) % 8
                values.append(value)
        dense.append(row)
        masks.append(mask)
        kept.append(values)
    bitmask = torch.tensor(masks, dtype=torch.uint8)
    return from_bits(dense, dtype), bitmask, from_bits(kept, dtype)


def nibble_position(n: int, row: int, column: int, size: int) -> int:
    """Number of a group's nibble in the metadata, by the layout's formula."""
    padded_n = -(-n // 64) * 64
    r, c = row % 64, column % 128
    if size == 1:
        inner = r * 128 + c
    else:
        inner = c % 16 + 16 * (r // 8 % 2) + 32 * (c // 32) + 128 * (r % 8)
        inner += 1024 * (c // 16 % 2) + 2048 * (r // 16)
    return (row // 64 * 64 * 128 + column // 128 * padded_n * 128 + inner) // 4


def reference_compress(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Values and metadata from the formulas, one group at a time."""
    n, k = dense.shape
    size = dense.element_size()
    padded_n, padded_k = -(-n // 64) * 64, -(-k // 128) * 128
    values = [[0] * (k // 2) for _ in range(n)]
    meta = [0] * (padded_n * padded_k // 8)
    rows = bits(dense).tolist()
    for m in range(n):
        for column in range(0, k, 4):
            group = rows[m][column : column + 4]
            if size == 2:
                group = [0 if value == -0x8000 else value for value in group]
            nonzero = [p for p in range(4) if group[p] != 0]
            if len(nonzero) == 2:
                i0, i1 = nonzero
                pair = [group[i0], group[i1]]
            elif nonzero == [3]:
                i0, i1 = 0, 3
                pair = [0, group[3]]
            elif len(nonzero) == 1:
                i0, i1 = nonzero[0], 3
                pair = [group[i0], 0]
            else:
                i0, i1 = 0, 0
                pair = [0, 0]
            values[m][column // 2 : column // 2 + 2] = pair
            position = nibble_position(n, m, column, size)
            meta[position // 2] |= (i0 | i1 << 2) << 4 * (position % 2)
    packed = torch.tensor(meta, dtype=torch.uint8).view(padded_n, padded_k // 8)
    return from_bits(values, dense.dtype), packed


def plus_zero(dense: Tensor) -> Tensor:
    """What decompression gives back: 16-bit floats without -0.0."""
    raw = bits(dense).clone()
    if dense.element_size() == 2:
        raw[raw == -0x8000] = 0
    return raw.view(dense.dtype)


def every_group(dtype: torch.dtype) -> Tensor:
    """One row with every choice of 0, 1 or 2 nonzero positions, its other elements 0 or -0.0."""
    zeros = [0, -0x8000] if torch.empty(0, dtype=dtype).element_size() == 2 else [0]
    row = []
    for nonzero in [(), (0,), (1,), (2,), (3,), *KEPT_PAIRS]:
        for zero in zeros:
            row += [17 + p if p in nonzero else zero for p in range(4)]
    row += [0] * (-len(row) % 8)
    return from_bits([row, row[::-1]], dtype)


def golden_cases() -> list[str]:
    with safe_open(GOLDEN, "pt") as file:
        keys = list(file.keys())
    return sorted(key.removesuffix(".dense") for key in keys if key.endswith(".dense"))


def golden(case: str) -> tuple[Tensor, Tensor, Tensor]:
    with safe_open(GOLDEN, "pt") as file:
        return tuple(file.get_tensor(f"{case}.{part}") for part in ("dense", "nzs", "meta"))


#: Rows of whole bytes of bitmask or not, of whole blocks of 64 x 128 or not, several programs.
SHAPES = [(1, 4), (5, 24), (3, 140), (66, 160), (64, 256)]
#: Both sizes of an element in every shape; the dtypes of a size differ in nothing but their name.
CASES = [
    *((dtype, shape) for dtype in (torch.float16, torch.int8) for shape in SHAPES),
    *((dtype, (66, 160)) for dtype in (torch.bfloat16, torch.float8_e4m3fn)),
]


@pytest.mark.parametrize("case", golden_cases())
def test_sm90_equals_cutlass(path: str, case: str) -> None:
    dense, expected_values, expected_meta = golden(case)
    values, meta = sparse24.sm90_compress(dense)
    assert same(values, expected_values)
    assert same(meta, expected_meta)
    assert same(
        sparse24.sm90_decompress(expected_values, expected_meta, *dense.shape), plus_zero(dense)
    )


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_every_transform_equals_its_formula(
    path: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    n, k = shape
    dense, bitmask, compressed = random_weight(n, k, dtype)
    values, meta = reference_compress(dense)
    assert same(sparse24.bitmask_decompress(compressed, bitmask, k), dense)
    assert same(sparse24.bitmask_compress(dense, bitmask), compressed)
    actual = sparse24.sm90_compress(dense)
    assert same(actual[0], values)
    assert same(actual[1], meta)
    assert same(sparse24.sm90_decompress(values, meta, n, k), plus_zero(dense))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_one_and_two_nonzeros_everywhere(path: str, dtype: torch.dtype) -> None:
    dense = every_group(dtype)
    k = dense.shape[1]
    values, meta = reference_compress(dense)
    actual = sparse24.sm90_compress(dense)
    assert same(actual[0], values)
    assert same(actual[1], meta)
    assert same(sparse24.sm90_decompress(values, meta, 2, k), plus_zero(dense))

    # The mask keeps all nonzeros, then the lowest zero columns.
    expected = []
    for row in bits(plus_zero(dense)).tolist():
        packed = [0] * -(-k // 8)
        for column in range(0, k, 4):
            kept = [p for p in range(4) if row[column + p] != 0]
            kept += [p for p in range(4) if p not in kept][: 2 - len(kept)]
            for p in kept:
                packed[(column + p) // 8] |= 1 << (column + p) % 8
        expected.append(packed)
    bitmask = sparse24.bitmask_of(dense)
    assert same(bitmask, torch.tensor(expected, dtype=torch.uint8))
    compressed = sparse24.bitmask_compress(dense, bitmask)
    assert same(plus_zero(sparse24.bitmask_decompress(compressed, bitmask, k)), plus_zero(dense))


def test_mask_error_names_the_first_group(path: str) -> None:
    dense, bitmask, compressed = random_weight(7, 40, torch.int8)
    bitmask[2, 3] = (bitmask[2, 3] & 0x0F) | 0x70
    bitmask[2, 4] = 0
    bitmask[5, 0] = 0xFF
    message = "row 2, column 28: the bitmask keeps 3 of 4 columns"
    with pytest.raises(ValueError, match=message):
        sparse24.bitmask_decompress(compressed, bitmask, 40)
    with pytest.raises(ValueError, match=message):
        sparse24.bitmask_compress(dense, bitmask)


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_mask_error_names_the_count(path: str, count: int) -> None:
    _, bitmask, compressed = random_weight(3, 12, torch.float16)
    bitmask[1, 0] = (bitmask[1, 0] & 0xF0) | ((1 << count) - 1)
    message = f"row 1, column 0: the bitmask keeps {count} of 4 columns"
    with pytest.raises(ValueError, match=message):
        sparse24.bitmask_decompress(compressed, bitmask, 12)


def test_mask_bits_past_the_last_column(path: str) -> None:
    dense, bitmask, compressed = random_weight(3, 12, torch.float16)
    bitmask[1, 1] |= 0x30
    message = "row 1, column 12: the bitmask keeps 2 of 4 columns, but the weight has only 12"
    with pytest.raises(ValueError, match=message):
        sparse24.bitmask_decompress(compressed, bitmask, 12)
    with pytest.raises(ValueError, match=message):
        sparse24.bitmask_compress(dense, bitmask)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_dense_error_names_the_first_group(path: str, dtype: torch.dtype) -> None:
    dense = random_weight(70, 152, dtype)[0]
    raw = bits(dense)
    raw[66, 132:136] = 1
    raw[66, 148:151] = 1
    raw[69, 0:4] = 1
    for function in (sparse24.sm90_compress, sparse24.bitmask_of):
        with pytest.raises(ValueError, match="row 66, column 132: 4 of 4 columns are nonzero"):
            function(dense)


def test_three_nonzeros_in_any_position(path: str) -> None:
    for spared in range(4):
        dense = torch.ones(1, 4, dtype=torch.int8)
        dense[0, spared] = 0
        for function in (sparse24.sm90_compress, sparse24.bitmask_of):
            with pytest.raises(ValueError, match="row 0, column 0: 3 of 4"):
                function(dense)


def test_minus_zero_of_float8_is_a_nonzero(path: str) -> None:
    dense = torch.tensor([[-0.0, 1.0, 2.0, 0.0]]).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="3 of 4"):
        sparse24.sm90_compress(dense)
    values, _ = sparse24.sm90_compress(dense.to(torch.float16))
    assert values.tolist() == [[1.0, 2.0]]


def test_bitmask_compress_refuses_to_drop_a_nonzero(path: str) -> None:
    for dtype in (torch.int8, torch.bfloat16):
        dense, bitmask, _ = random_weight(6, 24, dtype)
        column = next(c for c in range(8, 12) if not int(bitmask[4, 1]) >> c % 8 & 1)
        bits(dense)[4, column] = 5
        with pytest.raises(ValueError, match=f"row 4, column {column}: nonzero, but the bitmask"):
            sparse24.bitmask_compress(dense, bitmask)


def test_bitmask_compress_takes_a_dropped_minus_zero_for_zero(path: str) -> None:
    dense = torch.tensor([[-0.0, 1.0, -0.0, -0.0, -0.0, 0.0, 3.0, -0.0]], dtype=torch.float16)
    bitmask = torch.tensor([[0b0110_0110]], dtype=torch.uint8)
    expected = torch.tensor([[1.0, -0.0, 0.0, 3.0]], dtype=torch.float16)
    assert same(sparse24.bitmask_compress(dense, bitmask), expected)


def set_nibble(meta: Tensor, position: int, nibble: int) -> None:
    flat = meta.view(-1)
    old = int(flat[position // 2])
    shift = 4 * (position % 2)
    flat[position // 2] = (old & ~(15 << shift)) | nibble << shift


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16], ids=str)
def test_sm90_decompress_checks_the_index_pairs(path: str, dtype: torch.dtype) -> None:
    n, k = 67, 136
    values = torch.full((n, k // 2), 3, dtype=torch.int32).to(dtype)
    size = values.element_size()
    good = torch.zeros(sparse24.sm90_meta_shape(n, k), dtype=torch.uint8)
    for row in range(n):
        for column in range(0, k, 4):
            set_nibble(good, nibble_position(n, row, column, size), 0b0100)
    valid = {i0 | i1 << 2 for i0, i1 in KEPT_PAIRS}
    for nibble in range(1, 16) if path == "cpu" else (2, 5, 9):
        meta = good.clone()
        set_nibble(meta, nibble_position(n, 65, 132, size), nibble)
        if nibble in valid:
            assert sparse24.sm90_decompress(values, meta, n, k).shape == (n, k)
            continue
        pair = rf"\({nibble & 3}, {nibble >> 2}\)"
        with pytest.raises(ValueError, match=f"row 65, column 132: {pair} is no index pair"):
            sparse24.sm90_decompress(values, meta, n, k)

    meta = good.clone()
    set_nibble(meta, nibble_position(n, 8, 20, size), 0)
    with pytest.raises(ValueError, match=r"row 8, column 20: the index pair is \(0, 0\)"):
        sparse24.sm90_decompress(values, meta, n, k)
    values[8, 10:12] = 0
    assert not bool(bits(sparse24.sm90_decompress(values, meta, n, k))[8, 20:24].any())

    for row, column in ((67, 0), (3, 136), (127, 252)):
        meta = good.clone()
        set_nibble(meta, nibble_position(n, row, column, size), 0b0100)
        with pytest.raises(ValueError, match=f"row {row}, column {column}: padding"):
            sparse24.sm90_decompress(values, meta, n, k)


def test_sm90_decompress_checks_half_a_byte_of_padding(path: str) -> None:
    values, meta = sparse24.sm90_compress(torch.zeros(2, 12, dtype=torch.int8))
    set_nibble(meta, nibble_position(2, 1, 12, 1), 0b0100)
    with pytest.raises(ValueError, match="row 1, column 12: padding"):
        sparse24.sm90_decompress(values, meta, 2, 12)


def test_an_error_leaves_nothing_behind(path: str) -> None:
    """A call after a failed one starts from a clean error word."""
    good, bitmask, compressed = random_weight(3, 16, torch.int8)
    bad = torch.ones(3, 16, dtype=torch.int8)
    for _ in range(2):
        with pytest.raises(ValueError, match="row 0, column 0"):
            sparse24.sm90_compress(bad)
        assert same(sparse24.bitmask_decompress(compressed, bitmask, 16), good)


def test_wrong_arguments() -> None:
    dense, bitmask, compressed = random_weight(4, 16, torch.float16)
    values, meta = sparse24.sm90_compress(dense)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: sparse24.sm90_compress(dense[:, :14]), "multiple of 4"),
        (lambda: sparse24.sm90_compress(dense.float()), "float32"),
        (lambda: sparse24.sm90_compress(dense[0]), "two dimensions"),
        (lambda: sparse24.bitmask_of(dense[:, :15]), "multiple of 4"),
        (lambda: sparse24.bitmask_compress(dense, bitmask[:, :1]), "bitmask has shape"),
        (lambda: sparse24.bitmask_compress(dense, bitmask.char()), "torch.int8"),
        (lambda: sparse24.bitmask_decompress(compressed, bitmask, 24), "compressed has shape"),
        (lambda: sparse24.bitmask_decompress(compressed, bitmask[:3], 16), "bitmask has shape"),
        (lambda: sparse24.bitmask_decompress(compressed, bitmask, 18), "multiple of 4"),
        (lambda: sparse24.sm90_decompress(values, meta[:32], 4, 16), "meta has shape"),
        (lambda: sparse24.sm90_decompress(values, meta, 5, 16), "values has shape"),
        (lambda: sparse24.bitmask_compress(dense, bitmask.to("meta")), "is on meta"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_strided_and_unaligned_inputs(path: str) -> None:
    for dtype in (torch.int8, torch.bfloat16):
        dense, bitmask, compressed = random_weight(6, 24, dtype)
        values, meta = reference_compress(dense)

        def moved(tensor: Tensor) -> Iterator[Tensor]:
            yield bits(tensor).t().contiguous().t().view(tensor.dtype)
            raw = torch.zeros(tensor.numel() + 3, dtype=bits(tensor).dtype)
            raw[3:] = bits(tensor).flatten()
            yield raw[3:].view(tensor.shape).view(tensor.dtype)

        for d, m, c, v in zip(*map(moved, (dense, bitmask, compressed, values)), strict=True):
            assert same(sparse24.bitmask_decompress(c, m, 24), dense)
            assert same(sparse24.bitmask_compress(d, m), compressed)
            assert same(sparse24.sm90_compress(d)[1], meta)
            assert same(sparse24.sm90_decompress(v, meta, 6, 24), plus_zero(dense))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(path: str, dtype: torch.dtype) -> None:
    compressed = torch.zeros(0, 8, dtype=dtype)
    bitmask = torch.zeros(0, 2, dtype=torch.uint8)
    assert sparse24.bitmask_decompress(compressed, bitmask, 16).shape == (0, 16)
    values, meta = sparse24.sm90_compress(torch.zeros(0, 16, dtype=dtype))
    assert values.shape == (0, 8)
    assert meta.shape == (0, 16)


def large_weight(
    n: int, k: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """dense, bitmask and compressed by torch's own masked assignment; some values are 0 or -0.0."""
    generator = torch.Generator(device=device).manual_seed(n + k)
    nibbles = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8, device=device)
    choice = torch.randint(0, 6, (n, k // 4), device=device, generator=generator)
    columns = torch.arange(4, dtype=torch.uint8, device=device)
    kept = ((nibbles[choice][..., None] >> columns) & 1).bool().view(n, k)
    top = 0x80 if torch.zeros(0, dtype=dtype).element_size() == 1 else 0x8000
    integer = torch.int8 if top == 0x80 else torch.int16
    raw = torch.randint(-top, top, (n, k // 2), device=device, generator=generator)
    rare = torch.randint(0, 50, (n, k // 2), device=device, generator=generator)
    raw = raw.masked_fill(rare == 0, 0).masked_fill(rare == 1, -top).to(integer)
    dense = torch.zeros(n, k, dtype=integer, device=device)
    dense[kept] = raw.flatten()
    weights = 1 << torch.arange(8, dtype=torch.int32, device=device)
    padded = torch.nn.functional.pad(kept, (0, -k % 8)).unflatten(1, (-1, 8))
    bitmask = (padded * weights).sum(2).to(torch.uint8)
    return dense.view(dtype), bitmask, raw.view(dtype)


@pytest.mark.parametrize("k", [1024, 1020])
def test_many_blocks_on_several_threads(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    monkeypatch.setattr(threads, "THREADED_BYTES", 1)
    monkeypatch.setattr(cpu, "GRAIN", 2048)  # 8 rows a block
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for dtype in (torch.int8, torch.float16):
        dense, bitmask, compressed = large_weight(140, k, dtype)
        assert same(sparse24.bitmask_decompress(compressed, bitmask, k), dense)
        assert same(sparse24.bitmask_compress(dense, bitmask), compressed)
        values, meta = sparse24.sm90_compress(dense)
        # The first 64 rows and the last 12 stand for themselves in the metadata.
        for rows in (slice(0, 64), slice(128, 140)):
            part = reference_compress(dense[rows])
            assert same(values[rows], part[0])
            blocks = meta.view(k // 128 + (k % 128 > 0), 3, 1024)
            assert torch.equal(blocks[:, rows.start // 64].flatten(), part[1].flatten())
        assert same(sparse24.sm90_decompress(values, meta, 140, k), plus_zero(dense))

        raw = bits(dense)
        raw[40, 400:404] = 1
        raw[139, 0:4] = 1
        with pytest.raises(ValueError, match="row 40, column 400"):
            sparse24.sm90_compress(dense)


def test_callers_may_be_threads() -> None:
    weights = [large_weight(70, 256, dtype) for dtype in (torch.int8, torch.float16)]
    references = [reference_compress(dense) for dense, _, _ in weights]

    def work(weight: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
        dense, bitmask, compressed = weight
        actual = sparse24.sm90_compress(sparse24.bitmask_decompress(compressed, bitmask, 256))
        return all(same(a, b) for a, b in zip(actual, expected, strict=True)) and same(
            sparse24.bitmask_decompress(compressed, bitmask, 256), dense
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, weights * 4, references * 4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4096, 8192), (1000, 2052), (130, 584)], ids=str)
def test_gpu_equals_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, k = shape
    dense, bitmask, compressed = large_weight(n, k, dtype, "cuda")
    assert same(sparse24.bitmask_decompress(compressed, bitmask, k), dense)
    assert same(sparse24.bitmask_compress(dense, bitmask), compressed)
    assert same(sparse24.bitmask_of(dense), sparse24.bitmask_of(dense.cpu()))
    expected = sparse24.sm90_compress(dense.cpu())
    actual = sparse24.sm90_compress(dense)
    assert same(actual[0], expected[0])
    assert same(actual[1], expected[1])
    back = sparse24.sm90_decompress(*actual, n, k)
    assert back.device.type == "cuda"
    assert same(back, plus_zero(dense))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_gpu_equals_the_formulas(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    dense = random_weight(*shape, dtype)[0]
    expected = reference_compress(dense)
    actual = sparse24.sm90_compress(dense.cuda())
    for side in range(2):
        assert same(actual[side], expected[side])


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_pairs_are_the_formulas(path: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    dense, bitmask, compressed = random_weight(*shape, dtype)
    want, meta = reference_compress(dense)
    values, pairs = sparse24.pairs_of_bitmask(compressed, bitmask, shape[1])
    assert same(values, want) and same(sparse24.sm90_meta(values, pairs, shape[1]), meta)
    assert same(sparse24.pairs_of_sm90(want, meta, *shape)[1], pairs)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_gpu_makes_the_cpus_pairs(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    _, bitmask, compressed = random_weight(*shape, dtype)
    k = shape[1]
    values, pairs = sparse24.pairs_of_bitmask(compressed, bitmask, k)
    meta = sparse24.sm90_meta(values, pairs, k)
    made = sparse24.pairs_of_bitmask(compressed.cuda(), bitmask.cuda(), k)
    assert same(made[0], values) and same(made[1], pairs)
    assert same(sparse24.sm90_meta(*made, k), meta)
    back = sparse24.pairs_of_sm90(values.cuda(), meta.cuda(), shape[0], k)
    assert same(back[0], values) and same(back[1], pairs)
    expected = sparse24.bitmask_of_pairs(values, pairs, k)
    again = sparse24.bitmask_of_pairs(*made, k)
    assert same(again[0], expected[0]) and same(again[1], expected[1])
    assert same(sparse24.dense_of_pairs(*made, k), sparse24.dense_of_pairs(values, pairs, k))


@pytest.mark.gpu
def test_gpu_raises_what_the_cpu_raises() -> None:
    dense, bitmask, compressed = large_weight(200, 1032, torch.float16)
    values, meta = sparse24.sm90_compress(dense)
    bits(dense)[77, 516:519] = 1
    bits(dense)[199, 0:4] = 1
    bitmask[150, 128] = 0x07
    meta[70, 3] = 0xFF
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (sparse24.sm90_compress, (dense,)),
        (sparse24.bitmask_of, (dense,)),
        (sparse24.bitmask_compress, (dense, bitmask)),
        (sparse24.bitmask_decompress, (compressed, bitmask, 1032)),
        (sparse24.sm90_decompress, (values, meta, 200, 1032)),
    ]
    for function, arguments in calls:
        with pytest.raises(ValueError) as on_cpu:
            function(*arguments)
        with pytest.raises(ValueError) as on_gpu:
            function(*(a.cuda() if isinstance(a, Tensor) else a for a in arguments))
        assert str(on_gpu.value) == str(on_cpu.value)
