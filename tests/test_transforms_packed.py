"""INT packing transforms against compressed-tensors' own helpers and per-code references."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import GPU

from ctconvert.transforms import packed
from ctconvert.transforms.packed import (
    codes_per_word,
    pack,
    pack_int8,
    row_words,
    transpose_packed,
    unpack,
    unpack_int8,
)

WIDTHS = (2, 4, 8)
ALL_WIDTHS = tuple(range(1, 9))


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


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what ``torch.empty`` returns, so that an element nobody wrote shows."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs).fill_(0x5B)

    monkeypatch.setattr(torch, "empty", filled)


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

SHAPES = [(3, 1), (1, 5), (5, 37), (7, 64), (2, 100), (4, 96)]


@pytest.mark.parametrize("bits", ALL_WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
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


@pytest.mark.parametrize("packing", ["dense", "padded"])
@pytest.mark.parametrize("bits", ALL_WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_equals_the_definition(shape: tuple[int, int], bits: int, packing: str) -> None:
    codes = random_codes(*shape, bits)
    words = words_of(codes.tolist(), bits, packing)
    assert words.shape == (shape[0], row_words(shape[1], bits, packing))
    assert torch.equal(pack(codes, bits, packing), words)
    assert torch.equal(unpack(words, bits, shape[1], packing), codes)


def test_packings_differ_only_where_codes_straddle() -> None:
    for bits in ALL_WIDTHS:
        codes = torch.full((1, 40), (1 << bits) - 1, dtype=torch.uint8)
        same = torch.equal(pack(codes, bits), pack(codes, bits, "padded"))
        assert same == (bits in (1, 2, 4, 8))


def test_plain_path_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(23, 45, 3)
    monkeypatch.setattr(packed, "_BLOCK_CODES", 4 * 45 + 1)  # 4 rows a block, 3 in the last
    words = pack(codes, 3)
    assert torch.equal(words, words_of(codes.tolist(), 3, "dense"))
    assert torch.equal(unpack(words, 3, 45), codes)


def test_fast_path_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_ELEMENTS", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for bits in WIDTHS:
        for k in (48, 45):
            codes = random_codes(23, k, bits)
            words = words_of(codes.tolist(), bits, "dense")
            assert torch.equal(pack(codes, bits), words)
            assert torch.equal(unpack(words, bits, k), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_pack_names_a_code_that_does_not_fit(bits: int) -> None:
    codes = random_codes(5, 40, bits)
    codes[3, 7] = 1 << bits
    codes[4, 2] = 255
    with pytest.raises(ValueError, match=f"row 3, column 7: {1 << bits} is outside"):
        pack(codes, bits)


def test_wrong_inputs() -> None:
    with pytest.raises(ValueError, match=r"codes must be a 2-D torch\.uint8"):
        pack(torch.zeros(4, 4, dtype=torch.int8), 4)
    with pytest.raises(ValueError, match=r"words must be a 2-D torch\.int32"):
        unpack(torch.zeros(4, dtype=torch.int32), 4, 8)
    with pytest.raises(ValueError, match="takes 2 words; the tensor has 3"):
        unpack(torch.zeros(4, 3, dtype=torch.int32), 3, 20)


@pytest.mark.parametrize("bits", [3, 4])
def test_empty(bits: int) -> None:
    for n, k in ((0, 8), (3, 0)):
        words = pack(torch.zeros(n, k, dtype=torch.uint8), bits)
        assert words.shape == (n, row_words(k, bits))
        assert unpack(words, bits, k).shape == (n, k)


# ------------------------------------------------------------------------------ int8


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(3, 1), (1, 5), (5, 37), (7, 64), (33, 96)])
def test_int8_equals_the_definition(bits: int, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape, bits)
    q = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    words = words_of(codes.tolist(), bits, "dense")
    assert torch.equal(pack_int8(q, bits), words)
    assert torch.equal(unpack_int8(words, bits, shape[1]), q)


@pytest.mark.parametrize("bits", WIDTHS)
def test_int8_of_strided_and_unaligned_inputs(bits: int) -> None:
    codes = random_codes(9, 64, bits)
    q = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    words = words_of(codes.tolist(), bits, "dense")
    unaligned = torch.cat([torch.zeros(3, dtype=torch.int8), q.flatten()])[3:].view(9, 64)
    strided = torch.cat([q, q], dim=1)[:, 64:]
    transposed = q.t().contiguous().t()
    for given in (unaligned, strided, transposed):
        assert torch.equal(pack_int8(given, bits), words)
    assert torch.equal(unpack_int8(words.t().contiguous().t(), bits, 64), q)


@pytest.mark.parametrize("bits", [2, 4])
def test_int8_names_the_first_value_out_of_range(bits: int) -> None:
    high = (1 << (bits - 1)) - 1
    for value in (high + 1, -high - 2, 127, -128):
        q = torch.zeros(40, 24, dtype=torch.int8)
        q[12, 5] = value
        q[30, 1] = value
        with pytest.raises(ValueError, match=f"row 12, column 5: {value} is outside"):
            pack_int8(q, bits)


def test_int8_takes_2_4_and_8_bits_only() -> None:
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8"):
        pack_int8(torch.zeros(2, 8, dtype=torch.int8), 3)
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8"):
        unpack_int8(torch.zeros(2, 8, dtype=torch.int32), 5, 8)


# ------------------------------------------------------------------------------ transpose


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("words", [(1, 1), (2, 5), (5, 2), (9, 17)])
def test_transpose_equals_the_definition(bits: int, words: tuple[int, int]) -> None:
    f = 32 // bits
    source = random_words(words[0] * f, words[1])
    expected = transpose_reference(source, bits, words[1] * f)
    found = transpose_packed(source, bits)
    assert found.shape == (words[1] * f, words[0])
    assert torch.equal(found, expected)
    assert torch.equal(transpose_packed(found, bits), source)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (41, 5), (53, 67)])
def test_transpose_of_ragged_shapes(bits: int, shape: tuple[int, int]) -> None:
    r, c = shape
    source = random_words(r, row_words(c, bits))  # what lies behind column c is noise
    expected = transpose_reference(source, bits, c, pad_rows=True)
    found = transpose_packed(source, bits, c, pad_rows=True)
    assert found.shape == (c, row_words(r, bits))
    assert torch.equal(found, expected)
    codes = unpack(source, bits, c)
    assert torch.equal(transpose_packed(found, bits, r, pad_rows=True), pack(codes, bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_transpose_in_blocks(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    f = 32 // bits
    source = random_words(5 * f + 3, 11)
    expected = transpose_reference(source, bits, 11 * f - 1, pad_rows=True)
    monkeypatch.setattr(packed, "_ROWS", 2 * f)
    monkeypatch.setattr(packed, "_ELEMENTS", f)  # 3 words wide, the last block narrower
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(transpose_packed(source, bits, 11 * f - 1, pad_rows=True), expected)


def test_transpose_from_several_threads() -> None:
    sources = [random_words(2064, 70, seed) for seed in range(4)]
    expected = [transpose_packed(source, 4) for source in sources]
    assert torch.equal(expected[1], transpose_by_codes(sources[1], 4, 560))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda source: transpose_packed(source, 4), sources * 4))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 4, strict=True))


def transpose_by_codes(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The reference for larger sizes: unpack, transpose, pack."""
    return pack(unpack(words, bits, columns).t().contiguous(), bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_transpose_of_more_than_one_full_block(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    f = 32 // bits
    words = 2 * packed._ELEMENTS // packed._ROWS + 5
    source = random_words(packed._ROWS + 2 * f, words)
    found = transpose_packed(source, bits)
    assert torch.equal(found, transpose_by_codes(source, bits, words * f))


def test_transpose_of_strided_input() -> None:
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


def test_transpose_of_nothing() -> None:
    assert transpose_packed(torch.zeros(0, 3, dtype=torch.int32), 4).shape == (24, 0)
    assert transpose_packed(torch.zeros(16, 0, dtype=torch.int32), 4).shape == (0, 2)


# ------------------------------------------------------------------------------ Triton

needs_interpreter = pytest.mark.skipif(GPU, reason="the kernels are compiled here")


@needs_interpreter
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(1, 1), (64, 96), (83, 70), (300, 600)])
def test_transpose_kernel_interpreted(bits: int, shape: tuple[int, int]) -> None:
    from ctconvert.transforms import packed_triton

    r, c = shape
    source = random_words(r, row_words(c, bits))
    expected = transpose_packed(source, bits, c, pad_rows=True)
    assert torch.equal(packed_triton.transpose_packed_triton(source, bits, c, True), expected)
    if shape == (83, 70):
        assert torch.equal(expected, transpose_reference(source, bits, c, pad_rows=True))


@needs_interpreter
def test_transpose_kernel_refuses_ragged_rows() -> None:
    from ctconvert.transforms import packed_triton

    with pytest.raises(ValueError, match="12 rows are not a multiple"):
        packed_triton.transpose_packed_triton(random_words(12, 4), 4, 32)


@needs_interpreter
def test_transpose_kernel_takes_rows_in_an_order() -> None:
    from ctconvert.transforms import packed_triton

    source = random_words(83, row_words(70, 4))
    order = torch.randperm(83, generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    expected = transpose_reference(source[order.long()], 4, 70, pad_rows=True)
    out = torch.full_like(expected, 0x5B)
    found = packed_triton.transpose_packed_triton(source, 4, 70, True, order=order, out=out)
    assert found is out
    assert torch.equal(out, expected)


@needs_interpreter
@pytest.mark.parametrize("packing", ["dense", "padded"])
@pytest.mark.parametrize("bits", ALL_WIDTHS)
@pytest.mark.parametrize("shape", [(3, 1), (5, 37), (1, 1100), (9, 64), (2, 100)])
def test_pack_kernels_interpreted(shape: tuple[int, int], bits: int, packing: str) -> None:
    from ctconvert.transforms import packed_triton

    codes = random_codes(*shape, bits)
    words = words_of(codes.tolist(), bits, packing)
    found, in_range = packed_triton.pack_triton(codes, bits, packing)
    assert in_range
    assert torch.equal(found, words)
    assert torch.equal(packed_triton.unpack_triton(words, bits, shape[1], packing), codes)


@needs_interpreter
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_unpack_kernel_ignores_the_unused_bits(bits: int) -> None:
    from ctconvert.transforms import packed_triton

    words = random_words(5, row_words(37, bits, "padded"))
    codes = unpack(words, bits, 37, "padded")
    assert torch.equal(packed_triton.unpack_triton(words, bits, 37, "padded"), codes)


@needs_interpreter
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(70, 160), (3, 1), (7, 37), (5, 100), (2, 4100)])
def test_int8_kernels_interpreted(bits: int, shape: tuple[int, int]) -> None:
    from ctconvert.transforms import packed_triton

    codes = random_codes(*shape, bits)
    q = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    words = words_of(codes.tolist(), bits, "dense")
    unaligned = torch.cat([q.new_zeros(1), q.flatten()])[1:].view(shape)
    for given in (q, codes, unaligned, q.t().contiguous().t()):
        found, in_range = packed_triton.pack_triton(given, bits)
        assert in_range
        assert torch.equal(found, words)
    assert torch.equal(packed_triton.unpack_triton(words, bits, shape[1], dtype=torch.int8), q)
    assert torch.equal(packed_triton.unpack_triton(words, bits, shape[1]), codes)


@needs_interpreter
@pytest.mark.parametrize("k", [160, 157])
@pytest.mark.parametrize("bits", [2, 4])
def test_int8_kernel_sees_values_out_of_range(bits: int, k: int) -> None:
    from ctconvert.transforms import packed_triton

    high = (1 << (bits - 1)) - 1
    for value in (high + 1, -high - 2, 127, -128):
        q = torch.full((3, k), -1, dtype=torch.int8)
        q[2, k - 3] = value
        assert not packed_triton.pack_triton(q, bits)[1]


@needs_interpreter
@pytest.mark.parametrize("packing", ["dense", "padded"])
@pytest.mark.parametrize("bits", range(1, 8))
def test_pack_kernel_sees_codes_out_of_range(bits: int, packing: str) -> None:
    from ctconvert.transforms import packed_triton

    for k in (160, 157):
        for column in (0, 2, k - 1):
            for value in (1 << bits, 255):
                codes = torch.zeros(3, k, dtype=torch.uint8)
                codes[2, column] = value
                assert not packed_triton.pack_triton(codes, bits, packing)[1]


def test_device_path_names_a_code_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    if GPU:
        pytest.skip("the kernels are compiled here")
    monkeypatch.setattr(packed, "_has_kernels", lambda tensor: True)
    for packing in ("dense", "padded"):
        codes = random_codes(5, 40, 3)
        words = pack(codes, 3, packing)
        assert torch.equal(words, words_of(codes.tolist(), 3, packing))
        assert torch.equal(unpack(words, 3, 40, packing), codes)
        codes[3, 7] = 8
        codes[4, 2] = 255
        with pytest.raises(ValueError, match="row 3, column 7: 8 is outside"):
            pack(codes, 3, packing)
    q = torch.zeros(5, 37, dtype=torch.int8)
    q[4, 36] = 8
    with pytest.raises(ValueError, match="row 4, column 36: 8 is outside"):
        pack_int8(q, 4)


GPU_SHAPES = [(96, 160), (1000, 776), (4096, 4096), (28672, 8192)]


@pytest.mark.gpu
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_transpose_on_the_gpu(bits: int, shape: tuple[int, int]) -> None:
    r, c = shape
    source = random_words(r, row_words(c, bits))
    expected = transpose_packed(source, bits, c, pad_rows=True)
    found = transpose_packed(source.cuda(), bits, c, pad_rows=True)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", WIDTHS)
def test_ragged_transpose_on_the_gpu(bits: int) -> None:
    for r, c in ((1, 1), (83, 70), (1001, 1531)):
        source = random_words(r, row_words(c, bits))
        expected = transpose_packed(source, bits, c, pad_rows=True)
        found = transpose_packed(source.cuda(), bits, c, pad_rows=True)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", ALL_WIDTHS)
@pytest.mark.parametrize("shape", [(7, 101), (1003, 4098), *GPU_SHAPES[1:3], (8192, 9216)])
def test_pack_and_unpack_on_the_gpu(bits: int, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape, bits)
    for packing in ("dense", "padded"):
        words = pack(codes, bits, packing)
        assert torch.equal(pack(codes.cuda(), bits, packing).cpu(), words)
        assert torch.equal(unpack(words.cuda(), bits, shape[1], packing).cpu(), codes)
    if bits < 8:
        found = codes.cuda()
        found[5, 3] = 255
        with pytest.raises(ValueError, match="row 5, column 3: 255 is outside"):
            pack(found, bits)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(7, 101), *GPU_SHAPES])
def test_int8_on_the_gpu(bits: int, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape, bits)
    q = codes.sub_(1 << (bits - 1)).view(torch.int8)
    words = pack_int8(q, bits)
    assert torch.equal(pack_int8(q.cuda(), bits).cpu(), words)
    assert torch.equal(unpack_int8(words.cuda(), bits, shape[1]).cpu(), q)
    if bits < 8:
        q = q.cuda()
        q[5, 3] = 100
        with pytest.raises(ValueError, match="row 5, column 3: 100 is outside"):
            pack_int8(q, bits)
