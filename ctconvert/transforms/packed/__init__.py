"""INT packing: codes to words and back, and the repack that changes which dimension is packed.

Before: codes of b bits, [N, K] (u8 unsigned, or i8 signed ``q`` whose code is ``q + 2**(b-1)``).
After: ``weight_packed`` i32 [N, words], packed along K; words are little-endian, so the code at
bit p of a word is ``(word >> p) & (2**b - 1)``. Two packings exist:

- ``dense`` (compressed-tensors 0.18 and newer): code k of a row starts at bit ``b*k`` of the row's
  bit string and may straddle two words; ``ceil(K*b/32)`` words a row;
- ``padded`` (0.17 and older): ``f = floor(32/b)`` codes a word, code i of a word at bit ``b*i``,
  the top bits of each word unused; ``ceil(K/f)`` words a row.

They are the same bytes for b = 1, 2, 4, 8. Trailing bits of a row are zero.

:func:`transpose_packed` takes a code matrix [R, C] packed along C to [C, R] packed along R: the
``weight_packed`` [N, K/f] of a checkpoint to the N-packed [K, N/f] that a weight-only GEMM reads.

All of them are safe to call from several threads. On the CPU the main thread uses up to
``torch.get_num_threads()`` threads for 8 MiB and more, another thread itself alone, with about
1 MiB each beside input and output.
"""

from __future__ import annotations

import torch

from ctconvert.transforms import compiled, dispatch
from ctconvert.transforms.packed import cpu
from ctconvert.transforms.shapes import WORD_BITS, codes_per_word, row_words

__all__ = [
    "codes_per_word",
    "pack",
    "pack_int8",
    "row_words",
    "transpose_packed",
    "unpack",
    "unpack_int8",
]


def pack(codes: torch.Tensor, bits: int, packing: str = "dense") -> torch.Tensor:
    """Packs u8 [N, K] unsigned codes to i32 [N, row_words(K, bits, packing)].

    Runs on any device. Raises ValueError for another dtype or rank, bits outside 1..8, an unknown
    packing, or a code of 2**bits or more (naming the first one's row and column).
    """
    _check(codes, torch.uint8, "codes")
    row_words(codes.shape[1], bits, packing)  # raises for bits and packing
    return _pack(codes, bits, packing)


def unpack(words: torch.Tensor, bits: int, k: int, packing: str = "dense") -> torch.Tensor:
    """Inverse of :func:`pack`: i32 [N, row_words(k, bits, packing)] to u8 [N, k].

    Runs on any device. Raises ValueError for another dtype, rank or number of words, bits outside
    1..8, or an unknown packing.
    """
    _check(words, torch.int32, "words")
    _check_row_words(words.shape[1], row_words(k, bits, packing), bits, k)
    return _unpack(words, bits, k, packing, torch.uint8)


def pack_int8(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs i8 [N, K] signed values to i32 [N, ceil(K/f)]: codes ``q + 2**(bits-1)`` along K.

    ``bits`` is 2, 4 or 8; the codes that a partial last word lacks are zero bits. Raises ValueError
    for another dtype, rank or width, and for a value outside ``[-2**(bits-1), 2**(bits-1) - 1]``,
    naming the row, the column and the value of the first one.
    """
    _check(q, torch.int8, "q")
    _check_word_bits(bits)
    return _pack(q, bits, "dense")


def unpack_int8(words: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Inverse of :func:`pack_int8`: i32 [N, ceil(k/f)] to i8 [N, k], ``code - 2**(bits-1)``.

    ``bits`` is 2, 4 or 8. Raises ValueError for another dtype, rank, width or number of words.
    """
    _check(words, torch.int32, "words")
    _check_word_bits(bits)
    _check_row_words(words.shape[1], row_words(k, bits), bits, k)
    return _unpack(words, bits, k, "dense", torch.int8)


def transpose_packed(
    words: torch.Tensor, bits: int, columns: int | None = None, pad_rows: bool = False
) -> torch.Tensor:
    """Transposes a packed code matrix: i32 [R, W] to i32 [C, R/f], ``f = 32/bits``.

    The code matrix [R, C], packed along C, becomes [C, R], packed along R; C is ``columns`` or
    ``W*f``. Trailing padding columns (``columns < W*f``) are dropped. With ``pad_rows`` R need not
    be a multiple of f: the rows that the last word lacks are zero codes ([C, ceil(R/f)] words). So
    ``transpose_packed(transpose_packed(words, b, K), b, N, pad_rows=True)`` is ``words`` for a
    [N, ceil(K/f)] weight whose trailing bits are zero.

    The algorithm is the recursive block-swap transpose of Warren, "Hacker's Delight", section 7-3,
    over fields of b, 2b, .. 8 bits, then a strided copy of 16-bit elements.

    Raises ValueError for another dtype or rank, bits other than 2, 4 and 8, a ``columns`` that does
    not go with W, or R % f != 0 without ``pad_rows``.
    """
    _check(words, torch.int32, "words")
    _check_word_bits(bits)
    f = codes_per_word(bits)
    r, w = words.shape
    c = w * f if columns is None else columns
    _check_row_words(w, row_words(c, bits), bits, c)
    if r % f and not pad_rows:
        raise ValueError(f"{r} rows are not a multiple of the {f} codes of a word ({bits} bits)")
    if dispatch.has_kernels(words):
        from ctconvert.transforms.packed.triton import transpose_packed_triton

        return transpose_packed_triton(words, bits, c)
    made = compiled.transpose(words, bits, c)
    return cpu.transpose(words, bits, c) if made is None else made


def _pack(values: torch.Tensor, bits: int, packing: str) -> torch.Tensor:
    """i8 (signed) or u8 (codes) [N, K] to i32 [N, words]; ValueError where out of range."""
    if dispatch.has_kernels(values):
        from ctconvert.transforms.packed.triton import pack_triton

        out, in_range = pack_triton(values, bits, packing)
        if not in_range:
            cpu.raise_out_of_range(values, bits)
        return out
    if bits in WORD_BITS:
        return cpu.pack_bytes(values, bits)
    return cpu.pack_plain(values, bits, packing)


def _unpack(
    words: torch.Tensor, bits: int, k: int, packing: str, dtype: torch.dtype
) -> torch.Tensor:
    """i32 [N, words] to i8 [N, k], ``code - 2**(b-1)``, or u8, the codes."""
    if dispatch.has_kernels(words):
        from ctconvert.transforms.packed.triton import unpack_triton

        return unpack_triton(words, bits, k, packing, dtype)
    if bits in WORD_BITS:
        return cpu.unpack_bytes(words, bits, k, dtype)
    return cpu.unpack_plain(words, bits, k, packing)


def _check(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    if tensor.dtype != dtype or tensor.dim() != 2:
        raise ValueError(
            f"{name} must be a 2-D {dtype} tensor, not {tensor.dtype} {list(tensor.shape)}"
        )


def _check_word_bits(bits: int) -> None:
    if bits not in WORD_BITS:
        raise ValueError(f"bits must be 2, 4 or 8, not {bits}")


def _check_row_words(found: int, expected: int, bits: int, k: int) -> None:
    if found != expected:
        raise ValueError(
            f"a row of {k} codes of {bits} bits takes {expected} words; the tensor has {found}"
        )
