"""INT packing transforms against compressed-tensors' own helpers and per-code references."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ctconvert.transforms import threads
from ctconvert.transforms.packed import (
    codes_per_word,
    cpu,
    pack,
    pack_int8,
    row_words,
    transpose_packed,
    unpack,
    unpack_int8,
)

WIDTHS = (2, 4, 8)
ALL_WIDTHS = tuple(range(1, 9))
#: Every width in every packing; widths that divide 32 are packed alike in both.
PACKINGS = [*((bits, "dense") for bits in ALL_WIDTHS), *((bits, "padded") for bits in (3, 5, 6, 7))]

pytestmark = pytest.mark.usefixtures("poisoned")


def random_codes(n: int, k: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * bits + n + k)
    return torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=generator)


def random_words(n: int, words: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + n + words)
    return torch.randint(-(2**31), 2**31, (n, words), dtype=torch.int32, generator=generator)


def words_of(rows: list[list[int]], bits: int, packing: str) -> torch.Tensor:
    """Packs code by code, straight from the definition, in Python integers."""
    packed_rows = []
    for row in rows:
        per_word = 32 // bits
        if packing == "dense":
            string = sum(code << (bits * k) for k, code in enumerate(row))
            count = -(-len(row) * bits // 32)
        else:
            string = sum(
                code << (32 * (k // per_word) + bits * (k % per_word)) for k, code in enumerate(row)
            )
            count = -(-len(row) // per_word)
        packed_rows.append([(string >> (32 * word)) & 0xFFFFFFFF for word in range(count)])
    words = torch.tensor(packed_rows, dtype=torch.int64).view(len(rows), -1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def transpose_reference(
    words: torch.Tensor, bits: int, columns: int, pad_rows: bool = False
) -> torch.Tensor:
    """Code by code: out[c, r // f] holds the code of (r, c) at bit b * (r % f)."""
    f = 32 // bits
    rows = words.tolist()
    codes = [
        [(row[c // f] >> (bits * (c % f))) & ((1 << bits) - 1) for row in rows]
        for c in range(columns)
    ]
    if pad_rows:
        codes = [row + [0] * (-len(row) % f) for row in codes]
    return words_of(codes, bits, "padded")


# ------------------------------------------------------------------------------ sizes


def test_row_words() -> None:
    assert [codes_per_word(b) for b in ALL_WIDTHS] == [32, 16, 10, 8, 6, 5, 4, 4]
    assert [row_words(100, b) for b in ALL_WIDTHS] == [4, 7, 10, 13, 16, 19, 22, 25]
    assert [row_words(100, b, "padded") for b in ALL_WIDTHS] == [4, 7, 10, 13, 17, 20, 25, 25]
    assert row_words(0, 3) == 0


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        row_words(8, bits)


def test_unknown_packing() -> None:
    with pytest.raises(ValueError, match="packing must be"):
        row_words(8, 4, "tight")


# ------------------------------------------------------------------------------ pack, unpack


@pytest.mark.parametrize("bits", ALL_WIDTHS)
@pytest.mark.parametrize("shape", [(3, 1), (5, 37), (4, 96)])
def test_dense_equals_compressed_tensors(bits: int, shape: tuple[int, int]) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import (
        pack_to_int32,
        unpack_from_int32,
    )

    codes = random_codes(*shape, bits)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    theirs = pack_to_int32(signed, bits)
    assert torch.equal(pack(codes, bits), theirs)
    assert torch.equal(unpack(theirs, bits, shape[1]), codes)
    assert torch.equal(unpack_from_int32(pack(codes, bits), bits, torch.Size(shape)), signed)


def check_codes(shape: tuple[int, int], bits: int, packing: str) -> None:
    codes = random_codes(*shape, bits)
    words = words_of(codes.tolist(), bits, packing)
    assert words.shape == (shape[0], row_words(shape[1], bits, packing))
    assert torch.equal(pack(codes, bits, packing), words)
    assert torch.equal(unpack(words, bits, shape[1], packing), codes)


@pytest.mark.parametrize(("bits", "packing"), PACKINGS)
def test_codes_equal_the_definition(path: str, bits: int, packing: str) -> None:
    """Rows that end in a word, in four codes, in neither; the kernels have a branch for each."""
    for shape in ((3, 36), (3, 37), *([(3, 64)] if bits in WIDTHS else [])):
        check_codes(shape, bits, packing)


@pytest.mark.parametrize(("bits", "shape"), [(8, (2, 4100)), (4, (1, 2052)), (3, (9, 2052))])
def test_codes_of_several_programs(path: str, bits: int, shape: tuple[int, int]) -> None:
    check_codes(shape, bits, "dense")


def test_packings_differ_only_where_codes_straddle() -> None:
    for bits in ALL_WIDTHS:
        codes = torch.full((1, 40), (1 << bits) - 1, dtype=torch.uint8)
        same = torch.equal(pack(codes, bits), pack(codes, bits, "padded"))
        assert same == (bits in (1, 2, 4, 8))


@pytest.mark.parametrize(("bits", "packing"), [(3, "dense"), *PACKINGS[8:]])
def test_unpack_ignores_the_unused_bits(path: str, bits: int, packing: str) -> None:
    words = random_words(3, row_words(37, bits, packing))
    used = words & words_of([[(1 << bits) - 1] * 37] * 3, bits, packing)
    assert not torch.equal(used, words)
    codes = unpack(words, bits, 37, packing)
    assert torch.equal(words_of(codes.tolist(), bits, packing), used)


def in_small_blocks(monkeypatch: pytest.MonkeyPatch, grain: int) -> None:
    """Blocks of a few rows, shared by three threads."""
    monkeypatch.setattr(cpu, "GRAIN", grain)
    monkeypatch.setattr(threads, "THREADED_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


@pytest.mark.parametrize(("bits", "packing"), PACKINGS)
def test_codes_in_blocks(monkeypatch: pytest.MonkeyPatch, bits: int, packing: str) -> None:
    in_small_blocks(monkeypatch, 64)
    for k in (64, 45):
        check_codes((23, k), bits, packing)


@pytest.mark.parametrize(("bits", "packing"), [case for case in PACKINGS if case[0] < 8])
def test_pack_names_the_first_code_that_does_not_fit(path: str, bits: int, packing: str) -> None:
    for k, column, code in ((37, 36, 1 << bits), (36, 0, 255), (64, 35, 1 << bits)):
        if k == 64 and bits not in WIDTHS:
            continue  # as 36
        codes = torch.zeros(4, k, dtype=torch.uint8)
        codes[2, column] = code
        codes[3] = 255
        with pytest.raises(ValueError, match=f"row 2, column {column}: {code} is outside"):
            pack(codes, bits, packing)


def test_the_first_of_several_threads_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_blocks(monkeypatch, 64)
    for bits in (3, 4):
        codes = torch.zeros(40, 45, dtype=torch.uint8)
        codes[17, 44] = codes[39, 0] = 77
        codes[2, 40] = 70
        with pytest.raises(ValueError, match="row 2, column 40: 70 is outside"):
            pack(codes, bits)


def test_wrong_inputs() -> None:
    with pytest.raises(ValueError, match=r"codes must be a 2-D torch\.uint8"):
        pack(torch.zeros(4, 4, dtype=torch.int8), 4)
    with pytest.raises(ValueError, match=r"words must be a 2-D torch\.int32"):
        unpack(torch.zeros(4, dtype=torch.int32), 4, 8)
    with pytest.raises(ValueError, match="takes 2 words; the tensor has 3"):
        unpack(torch.zeros(4, 3, dtype=torch.int32), 3, 20)


@pytest.mark.parametrize("bits", [3, 4])
def test_empty(path: str, bits: int) -> None:
    for n, k in ((0, 8), (3, 0)):
        words = pack(torch.zeros(n, k, dtype=torch.uint8), bits)
        assert words.shape == (n, row_words(k, bits))
        assert unpack(words, bits, k).shape == (n, k)


# ------------------------------------------------------------------------------ int8


def signed_codes(n: int, k: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """i8 values and their words."""
    codes = random_codes(n, k, bits)
    q = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    return q, words_of(codes.tolist(), bits, "dense")


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(3, 37), (3, 100), (7, 64)])
def test_int8_equals_the_definition(path: str, bits: int, shape: tuple[int, int]) -> None:
    q, words = signed_codes(*shape, bits)
    assert torch.equal(pack_int8(q, bits), words)
    assert torch.equal(unpack_int8(words, bits, shape[1]), q)


@pytest.mark.parametrize("bits", WIDTHS)
def test_int8_in_blocks(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    in_small_blocks(monkeypatch, 64)
    for k in (96, 45):
        q, words = signed_codes(23, k, bits)
        assert torch.equal(pack_int8(q, bits), words)
        assert torch.equal(unpack_int8(words, bits, k), q)


@pytest.mark.parametrize("k", [64, 62])
def test_int8_of_strided_and_unaligned_inputs(path: str, k: int) -> None:
    for bits in WIDTHS if path == "cpu" else (4,):
        q, words = signed_codes(4, k, bits)
        unaligned = torch.cat([torch.zeros(3, dtype=torch.int8), q.flatten()])[3:].view(4, k)
        strided = torch.cat([q, q], dim=1)[:, k:]
        transposed = q.t().contiguous().t()
        for given in (unaligned, strided, transposed):
            assert torch.equal(pack_int8(given, bits), words)
        assert torch.equal(unpack_int8(words.t().contiguous().t(), bits, k), q)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("k", [64, 36, 37])
def test_int8_names_the_first_value_out_of_range(path: str, bits: int, k: int) -> None:
    high = (1 << (bits - 1)) - 1
    for value in (high + 1, -high - 2) if k == 37 else (high + 1, -high - 2, 127, -128):
        q = torch.full((4, k), -1, dtype=torch.int8)
        q[2, k - 1] = q[3, 1] = value
        with pytest.raises(ValueError, match=f"row 2, column {k - 1}: {value} is outside"):
            pack_int8(q, bits)


def test_int8_takes_2_4_and_8_bits_only() -> None:
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8"):
        pack_int8(torch.zeros(2, 8, dtype=torch.int8), 3)
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8"):
        unpack_int8(torch.zeros(2, 8, dtype=torch.int32), 5, 8)


# ------------------------------------------------------------------------------ transpose


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("words", [(1, 1), (2, 5), (9, 3)])
def test_transpose_equals_the_definition(bits: int, words: tuple[int, int]) -> None:
    f = 32 // bits
    source = random_words(words[0] * f, words[1])
    expected = transpose_reference(source, bits, words[1] * f)
    found = transpose_packed(source, bits)
    assert found.shape == (words[1] * f, words[0])
    assert torch.equal(found, expected)
    assert torch.equal(transpose_packed(found, bits), source)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(1, 1), (21, 35)])
def test_transpose_of_ragged_shapes(path: str, bits: int, shape: tuple[int, int]) -> None:
    r, c = shape
    source = random_words(r, row_words(c, bits))  # what lies behind column c is noise
    expected = transpose_reference(source, bits, c, pad_rows=True)
    found = transpose_packed(source, bits, c, pad_rows=True)
    assert found.shape == (c, row_words(r, bits))
    assert torch.equal(found, expected)
    back = transpose_reference(expected, bits, r, pad_rows=True)
    assert torch.equal(transpose_packed(found, bits, r, pad_rows=True), back)


@pytest.mark.parametrize("bits", WIDTHS)
def test_transpose_of_several_programs(path: str, bits: int) -> None:
    """Of the kernel: its tiles are 16 or 32 words of R by 32 or 64 words of C."""
    f = 32 // bits
    r, c = (33 * f - 3, 65 * f - 1) if bits == 8 else (17 * f - 3, 65 * f - 1)
    source = random_words(r, row_words(c, bits))
    found = transpose_packed(source, bits, c, pad_rows=True)
    assert torch.equal(found, transpose_reference(source, bits, c, pad_rows=True))


@pytest.mark.parametrize("bits", WIDTHS)
def test_transpose_in_blocks(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    f = 32 // bits
    source = random_words(5 * f + 3, 11)
    expected = transpose_reference(source, bits, 11 * f - 1, pad_rows=True)
    monkeypatch.setattr(cpu, "_ROWS", 2 * f)
    in_small_blocks(monkeypatch, 3 * f)  # 3 or 6 words wide, the last block narrower
    assert torch.equal(transpose_packed(source, bits, 11 * f - 1, pad_rows=True), expected)


def test_transpose_from_several_threads() -> None:
    sources = [random_words(1032, 35, seed) for seed in range(4)]
    expected = [transpose_packed(source, 4) for source in sources]
    assert torch.equal(expected[1], transpose_by_codes(sources[1], 4, 280))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda source: transpose_packed(source, 4), sources * 2))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 2, strict=True))


def transpose_by_codes(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The reference for larger sizes: unpack, transpose, pack."""
    return pack(unpack(words, bits, columns).t().contiguous(), bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_transpose_of_more_than_one_full_block(bits: int) -> None:
    f = 32 // bits
    words = 2 * threads.GRAIN // cpu._ROWS + 5
    source = random_words(cpu._ROWS + 2 * f, words)
    found = transpose_packed(source, bits)
    assert torch.equal(found, transpose_by_codes(source, bits, words * f))


def test_transpose_of_strided_input(path: str) -> None:
    source = random_words(16, 9)
    expected = transpose_reference(source, 4, 72)
    assert torch.equal(transpose_packed(torch.cat([source, source], 1)[:, 9:], 4), expected)
    assert torch.equal(transpose_packed(source.t().contiguous().t(), 4), expected)


def test_transpose_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="12 rows are not a multiple of the 8 codes"):
        transpose_packed(random_words(12, 4), 4)
    for columns in (24, 33):
        with pytest.raises(ValueError, match=f"a row of {columns} codes of 4 bits takes"):
            transpose_packed(random_words(16, 4), 4, columns)
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8"):
        transpose_packed(random_words(32, 4), 3)
    with pytest.raises(ValueError, match=r"words must be a 2-D torch\.int32"):
        transpose_packed(random_words(32, 4).to(torch.int64), 4)


def test_transpose_of_nothing(path: str) -> None:
    assert transpose_packed(torch.zeros(0, 3, dtype=torch.int32), 4).shape == (24, 0)
    assert transpose_packed(torch.zeros(16, 0, dtype=torch.int32), 4).shape == (0, 2)


# ------------------------------------------------------------------------------ Triton


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_transpose_kernel_takes_rows_in_an_order() -> None:
    from ctconvert.transforms.packed.triton import transpose_packed_triton

    source = random_words(83, row_words(70, 4))
    order = torch.randperm(83, generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    expected = transpose_reference(source[order.long()], 4, 70, pad_rows=True)
    out = torch.full_like(expected, 0x5B)
    found = transpose_packed_triton(source, 4, 70, order=order, out=out)
    assert found is out
    assert torch.equal(out, expected)


# A shape whose sizes Triton does not specialise, and one whose sizes are multiples of 16.
GPU_SHAPES = [(1003, 4098), (28672, 8192)]


@pytest.mark.gpu
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(1, 1), *GPU_SHAPES])
def test_transpose_on_the_gpu(bits: int, shape: tuple[int, int]) -> None:
    r, c = shape
    source = random_words(r, row_words(c, bits))
    expected = transpose_packed(source, bits, c, pad_rows=True)
    found = transpose_packed(source.cuda(), bits, c, pad_rows=True)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "packing"), PACKINGS)
def test_codes_on_the_gpu(bits: int, packing: str) -> None:
    for shape in ((7, 101), (1003, 4098), (4096, 8192)):
        codes = random_codes(*shape, bits)
        words = pack(codes, bits, packing)
        assert torch.equal(pack(codes.cuda(), bits, packing).cpu(), words)
        assert torch.equal(unpack(words.cuda(), bits, shape[1], packing).cpu(), codes)
        if bits < 8:
            codes[5, 3] = 255
            with pytest.raises(ValueError, match="row 5, column 3: 255 is outside"):
                pack(codes.cuda(), bits, packing)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(7, 101), *GPU_SHAPES])
def test_int8_on_the_gpu(bits: int, shape: tuple[int, int]) -> None:
    q = random_codes(*shape, bits).sub_(1 << (bits - 1)).view(torch.int8)
    words = pack_int8(q, bits)
    assert torch.equal(pack_int8(q.cuda(), bits).cpu(), words)
    assert torch.equal(unpack_int8(words.cuda(), bits, shape[1]).cpu(), q)
    if bits < 8:
        q[5, 3] = 100
        with pytest.raises(ValueError, match="row 5, column 3: 100 is outside"):
            pack_int8(q.cuda(), bits)
