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

CPU tensors take the torch code of this file, CUDA and XPU tensors the Triton kernels of
:mod:`ctconvert.transforms.packed_triton`; the results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

#: Widths whose codes fill a word without a rest and never straddle two, which have fast paths.
WORD_BITS = (2, 4, 8)

# Elements of one operation for each of torch's threads. The temporaries, a few such operands, stay
# near the core, and an operation is long beside its launch and beside the threads' barrier.
_ELEMENTS = 1 << 17
_MAX_THREADS = 16  # more gain nothing, but the temporaries grow with them
# Codes of one block of the plain path: on an accelerator launches, not bytes, are what it spends.
_BLOCK_CODES = 4 << 20
_DEVICE_BLOCK_CODES = 64 << 20
_ROWS = 1024  # rows of one transposed block: runs of 512 bytes of output for b = 4


def codes_per_word(bits: int) -> int:
    """Whole codes in a 32-bit word: ``floor(32/bits)``; ValueError unless bits is 1 to 8."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, not {bits}")
    return 32 // bits


def row_words(k: int, bits: int, packing: str = "dense") -> int:
    """Words that a row of ``k`` codes takes: ``ceil(k*bits/32)`` dense, ``ceil(k/f)`` padded.

    Raises ValueError for bits outside 1..8 or an unknown packing.
    """
    f = codes_per_word(bits)
    if packing == "dense":
        return -(-k * bits // 32)
    if packing == "padded":
        return -(-k // f)
    raise ValueError(f"packing must be 'dense' or 'padded', not {packing!r}")


def pack(codes: torch.Tensor, bits: int, packing: str = "dense") -> torch.Tensor:
    """Packs u8 [N, K] unsigned codes to i32 [N, row_words(K, bits, packing)].

    Runs on any device. Raises ValueError for another dtype or rank, bits outside 1..8, an unknown
    packing, or a code of 2**bits or more (naming the first one's row and column).
    """
    _check(codes, torch.uint8, "codes")
    n, k = codes.shape
    words = row_words(k, bits, packing)
    if _has_kernels(codes) or bits in WORD_BITS:
        return _pack_words(codes, bits, packing)
    out = torch.empty((n, words), dtype=torch.int32, device=codes.device)
    if out.numel() == 0:
        return out
    period = _period(bits, packing)
    periods = -(-k // period.codes)
    for rows in _plain_blocks(codes, k):
        block = codes[rows]
        if int(block.max()) >> bits:
            _raise_out_of_range(block, rows.start, 0, (1 << bits) - 1, bits)
        if k != periods * period.codes:
            block = torch.nn.functional.pad(block, (0, periods * period.codes - k))
        block = block.unflatten(1, (periods, period.codes))
        packed = block.new_zeros((block.shape[0], periods, period.words), dtype=torch.int32)
        for part in period.parts:
            code = block[..., part.code].to(torch.int32)
            code = code << part.shift if part.shift >= 0 else code >> -part.shift
            packed[..., part.word].bitwise_or_(code)
        # The last period may be partial: its missing words would hold zeros only.
        out[rows] = packed.flatten(1)[:, :words]
    return out


def unpack(words: torch.Tensor, bits: int, k: int, packing: str = "dense") -> torch.Tensor:
    """Inverse of :func:`pack`: i32 [N, row_words(k, bits, packing)] to u8 [N, k].

    Runs on any device. Raises ValueError for another dtype, rank or number of words, bits outside
    1..8, or an unknown packing.
    """
    _check(words, torch.int32, "words")
    n, found = words.shape
    _check_row_words(found, row_words(k, bits, packing), bits, k)
    if _has_kernels(words) or bits in WORD_BITS:
        return _unpack_words(words, bits, k, torch.uint8, packing)
    out = torch.empty((n, k), dtype=torch.uint8, device=words.device)
    if out.numel() == 0:
        return out
    period = _period(bits, packing)
    periods = -(-k // period.codes)
    for rows in _plain_blocks(words, k):
        block = words[rows]
        if found != periods * period.words:
            block = torch.nn.functional.pad(block, (0, periods * period.words - found))
        block = block.unflatten(1, (periods, period.words))
        codes = block.new_zeros((block.shape[0], periods, period.codes), dtype=torch.uint8)
        for part in period.parts:
            word = block[..., part.word]
            # The mask removes the copies of the sign bit that the arithmetic shift brings in.
            if part.shift >= 0:
                code = (word >> part.shift) & part.mask
            else:
                code = (word & part.mask) << -part.shift
            codes[..., part.code].bitwise_or_(code.to(torch.uint8))
        out[rows] = codes.flatten(1)[:, :k]
    return out


def pack_int8(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs i8 [N, K] signed values to i32 [N, ceil(K/f)]: codes ``q + 2**(bits-1)`` along K.

    ``bits`` is 2, 4 or 8; the codes that a partial last word lacks are zero bits. Raises ValueError
    for another dtype, rank or width, and for a value outside ``[-2**(bits-1), 2**(bits-1) - 1]``,
    naming the row, the column and the value of the first one.
    """
    _check(q, torch.int8, "q")
    _check_word_bits(bits)
    return _pack_words(q, bits)


def unpack_int8(words: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Inverse of :func:`pack_int8`: i32 [N, ceil(k/f)] to i8 [N, k], ``code - 2**(bits-1)``.

    ``bits`` is 2, 4 or 8. Raises ValueError for another dtype, rank, width or number of words.
    """
    _check(words, torch.int32, "words")
    _check_word_bits(bits)
    _check_row_words(words.shape[1], row_words(k, bits), bits, k)
    return _unpack_words(words, bits, k, torch.int8)


def transpose_packed(
    words: torch.Tensor, bits: int, columns: int | None = None, pad_rows: bool = False
) -> torch.Tensor:
    """Transposes a packed code matrix: i32 [R, W] to i32 [C, R/f], ``f = 32/bits``.

    The code matrix [R, C], packed along C, becomes [C, R], packed along R; C is ``columns`` or
    ``W*f``. Trailing padding columns (``columns < W*f``) are dropped. With ``pad_rows`` R need not
    be a multiple of f: the rows that the last word lacks are zero codes ([C, ceil(R/f)] words). So
    ``transpose_packed(transpose_packed(words, b, K), b, N, pad_rows=True)`` is ``words`` for a
    [N, ceil(K/f)] weight whose trailing bits are zero.

    ``bits`` is 2, 4 or 8. Safe to call from several threads. On the CPU every operation runs on
    ``torch.get_num_threads()`` threads; callers that are themselves parallel set that lower. Beside
    input and output it needs 1.5 MiB for each of them, 6 MiB at most where the edges are ragged.

    The algorithm is the recursive block-swap transpose of Warren, "Hacker's Delight", section 7-3,
    over fields of b, 2b, .. 8 bits, then a strided copy of 16-bit elements.

    Raises ValueError for another dtype, rank or width, a ``columns`` that does not go with W, or
    R % f != 0 without ``pad_rows``.
    """
    _check(words, torch.int32, "words")
    _check_word_bits(bits)
    f = codes_per_word(bits)
    r, w = words.shape
    c = w * f if columns is None else columns
    _check_row_words(w, row_words(c, bits), bits, c)
    if r % f and not pad_rows:
        raise ValueError(f"{r} rows are not a multiple of the {f} codes of a word ({bits} bits)")
    if _has_kernels(words):
        from ctconvert.transforms import packed_triton

        return packed_triton.transpose_packed_triton(words, bits, c, pad_rows)
    return _transpose(words, bits, c)


# ---------------------------------------------------------------------------------- checks


def _has_kernels(tensor: torch.Tensor) -> bool:
    return tensor.device.type in ("cuda", "xpu")


def _check(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    if tensor.dtype != dtype or tensor.dim() != 2:
        raise ValueError(
            f"{name} must be a 2-D {dtype} tensor, not {tensor.dtype} {list(tensor.shape)}"
        )


def _with_plain_strides(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor with the strides of its shape.

    A dimension of one element may have any stride, and views of another dtype look at it.
    """
    return tensor.reshape(-1).view(tensor.shape)


def _check_word_bits(bits: int) -> None:
    if bits not in WORD_BITS:
        raise ValueError(f"bits must be 2, 4 or 8, not {bits}")


def _check_row_words(found: int, expected: int, bits: int, k: int) -> None:
    if found != expected:
        raise ValueError(
            f"a row of {k} codes of {bits} bits takes {expected} words; the tensor has {found}"
        )


def _raise_out_of_range(
    block: torch.Tensor, first_row: int, low: int, high: int, bits: int
) -> None:
    """Names the first value of ``block`` outside [low, high]; the block has at least one."""
    for rows in _plain_blocks(block, block.shape[1]):
        part = block[rows]
        bad = part > high if low == 0 else (part < low) | (part > high)
        if bool(bad.any()):
            row, column = divmod(int(bad.flatten().to(torch.uint8).argmax()), part.shape[1])
            raise ValueError(
                f"row {first_row + rows.start + row}, column {column}: {int(part[row, column])} is "
                f"outside {low}..{high}, the range of a {bits}-bit code"
            )


# ---------------------------------------------------------------------------------- blocks


def _slices(n: int, length: int) -> Iterator[slice]:
    length = max(length, 1)
    for start in range(0, n, length):
        yield slice(start, min(start + length, n))


def _plain_blocks(tensor: torch.Tensor, k: int) -> Iterator[slice]:
    codes = _BLOCK_CODES if tensor.device.type == "cpu" else _DEVICE_BLOCK_CODES
    return _slices(tensor.shape[0], codes // max(k, 1))


def _block_elements() -> int:
    return _ELEMENTS * min(torch.get_num_threads(), _MAX_THREADS)


# ------------------------------------------------------------------------ plain path, any width


class _Part(NamedTuple):
    """Bits of one code in one word: ``code << shift``, or ``code >> -shift`` where negative."""

    word: int
    code: int
    shift: int
    mask: int  # as many one bits as the word holds of the code


class _Period(NamedTuple):
    """The shortest run of codes that ends on a word's edge, and where its codes lie."""

    codes: int
    words: int
    parts: tuple[_Part, ...]


@cache
def _period(bits: int, packing: str) -> _Period:
    if packing == "padded":
        f = codes_per_word(bits)
        mask = (1 << bits) - 1
        return _Period(f, 1, tuple(_Part(0, i, i * bits, mask) for i in range(f)))
    codes = next(count for count in (4, 8, 16, 32) if count * bits % 32 == 0)
    parts = []
    for code in range(codes):
        first, last = code * bits, code * bits + bits  # bits of the period
        for word in range(first // 32, (last - 1) // 32 + 1):
            held = min(last, 32 * word + 32) - max(first, 32 * word)
            parts.append(_Part(word, code, first - 32 * word, (1 << held) - 1))
    return _Period(codes, codes * bits // 32, tuple(parts))


# ------------------------------ kernels; 2, 4 and 8 bits on the CPU, several bytes an operation

# The integer that holds the codes of one byte of a word, a byte each; for 8 bits, of a whole word.
_ELEMENT = {2: torch.int32, 4: torch.int16, 8: torch.int32}


def _signed(value: int, bits: int = 32) -> int:
    """The two's complement number with these bits: what torch takes for a signed integer dtype."""
    return value - (1 << bits) if value >> (bits - 1) else value


def _pack_words(values: torch.Tensor, bits: int, packing: str = "dense") -> torch.Tensor:
    """i8 (signed) or u8 (codes) [N, K] to i32 [N, words]; ValueError where out of range."""
    signed = values.dtype == torch.int8
    low = -(1 << (bits - 1)) if signed else 0
    high = low + (1 << bits) - 1
    if _has_kernels(values):
        from ctconvert.transforms import packed_triton

        out, in_range = packed_triton.pack_triton(values, bits, packing)
        if not in_range:
            _raise_out_of_range(values, 0, low, high, bits)
        return out
    if bits < 8 and values.numel():
        least, most = torch.aminmax(values)
        if int(least) < low or int(most) > high:
            _raise_out_of_range(values, 0, low, high, bits)
    return _pack_bytes(values, bits, offset=-low)


def _unpack_words(
    words: torch.Tensor, bits: int, k: int, dtype: torch.dtype, packing: str = "dense"
) -> torch.Tensor:
    """i32 [N, words] to i8 [N, k], ``code - 2**(b-1)``, or u8, the codes."""
    if _has_kernels(words):
        from ctconvert.transforms import packed_triton

        return packed_triton.unpack_triton(words, bits, k, packing, dtype)
    out = torch.empty((words.shape[0], k), dtype=dtype, device=words.device)
    _unpack_bytes(words, bits, out, offset=1 << (bits - 1) if dtype == torch.int8 else 0)
    return out


def _pack_bytes(values: torch.Tensor, bits: int, offset: int) -> torch.Tensor:
    """i8 or u8 [N, K] to i32 [N, ceil(K/f)] with codes ``value + offset``, in blocks of rows."""
    n, k = values.shape
    words = row_words(k, bits)
    out = torch.empty((n, words), dtype=torch.int32, device=values.device)
    if out.numel() == 0:
        return out
    padded = words * codes_per_word(bits)
    aligned = k == padded and values.is_contiguous() and values.data_ptr() % 4 == 0
    if aligned:
        values = _with_plain_strides(values)
    wide = _ELEMENT[bits]
    # Adding half the range to a two's complement code flips its top bit.
    flip = _signed(offset * (0xFFFFFFFF // ((1 << bits) - 1)))

    height = min(n, max(_block_elements() * wide.itemsize // padded, 1))
    scratch = torch.empty((height, padded // wide.itemsize), dtype=wide, device=out.device)
    for rows in _slices(n, height):
        block = values[rows]
        if not aligned:  # the value of code 0 fills the last word
            block = torch.nn.functional.pad(block, (0, padded - k), value=-offset).contiguous()
        x, target = block.view(wide), out[rows]
        if bits < 8:
            y = scratch[: x.shape[0]]
            # Codes come together in the top byte of the product, lowest first; no two terms share
            # a bit. The copy keeps the low byte of what is shifted down.
            if bits == 4:
                torch.bitwise_and(x, 0x0F0F, out=y)
                y.mul_(1 << 8 | 1 << 4).bitwise_right_shift_(8)
            else:
                torch.bitwise_and(x, 0x03030303, out=y)
                y.mul_(1 << 24 | 1 << 18 | 1 << 12 | 1 << 6).bitwise_right_shift_(24)
            target.view(torch.uint8).copy_(y)
            x = target
        if flip or bits == 8:
            torch.bitwise_xor(x, flip, out=target)
    return out


def _unpack_bytes(words: torch.Tensor, bits: int, out: torch.Tensor, offset: int) -> None:
    """i32 [N, ceil(K/f)] into ``out`` (i8 or u8, [N, K]): ``code - offset``, in blocks of rows."""
    n, k = out.shape
    if out.numel() == 0:
        return
    padded = words.shape[1] * codes_per_word(bits)
    words = _with_plain_strides(words.contiguous())
    wide = _ELEMENT[bits]
    every_byte = (1 << 8 * wide.itemsize) // 255
    flip = _signed(128 * every_byte, 8 * wide.itemsize) if offset else 0

    height = min(n, max(_block_elements() * wide.itemsize // padded, 1))
    shape = height, padded // wide.itemsize
    scratch = [torch.empty(shape, dtype=wide, device=out.device) for _ in range(2)]
    for rows in _slices(n, height):
        block = words[rows]
        x, y = (t[: block.shape[0]] for t in scratch)
        if bits == 8:
            x = block
        elif bits == 4:
            x.copy_(block.view(torch.uint8))
            torch.bitwise_left_shift(x, 4, out=y)
            x.bitwise_or_(y).bitwise_and_(0x0F0F)
        else:
            x.copy_(block.view(torch.uint8))
            x.mul_(1 << 12 | 1).bitwise_and_(0x000F000F)
            x.mul_(1 << 6 | 1).bitwise_and_(0x03030303)
        # code - offset in every byte is (code + 128 - offset) ^ 128: no carry between bytes.
        if 0 < offset < 128:
            x.add_((128 - offset) * every_byte)
        whole = out[rows].view(wide) if k == padded else y
        torch.bitwise_xor(x, flip, out=whole)
        if k != padded:
            out[rows].copy_(whole.view(out.dtype)[:, :k])


# ------------------------------------------------------------------------- transpose on the CPU


class _Transposer:
    """Scratch and views to transpose blocks of ``rows`` x ``width`` words.

    A group of p = 16/b rows is a p x p matrix of codes in every 16-bit half word. Each step swaps
    fields of s bits between rows whose numbers differ in one bit, so that after the steps row j of
    the group holds the codes that belong to column j; the rest is a transpose of 16-bit elements.
    """

    def __init__(self, bits: int, rows: int, width: int, device: torch.device) -> None:
        self.group = group = 16 // bits
        half, n = group // 2, rows // group
        planes = torch.empty((group, n, width), dtype=torch.int32, device=device)
        swap = torch.empty((half, n, width), dtype=torch.int32, device=device)
        self.first = swap, planes[:half], planes[half:]
        self.steps = []  # (shift, mask, rows with the bit clear, rows with it set, scratch)
        for level, shift in enumerate(s for s in (4, 2) if s >= bits):
            pairs = planes.unflatten(0, (2 << level, 2, -1))
            clear, set_ = pairs[:, 0], pairs[:, 1]
            mask = {4: 0x0F0F0F0F, 2: 0x33333333}[shift]
            self.steps.append((shift, mask, clear, set_, swap.view(clear.shape)))
        self.planes = planes.view(torch.int16).transpose(1, 2)  # [plane, half word of a row, row]

    def run(self, words: torch.Tensor, out: torch.Tensor) -> None:
        """i32 [rows, width] into ``out``, i16 [2*width, 16/b, rows*b/16]."""
        x = words.unflatten(0, (-1, self.group)).transpose(0, 1)
        clear, set_ = x[: self.group // 2], x[self.group // 2 :]
        swap, low, high = self.first
        # Shifts are arithmetic; the masks are zero where they bring in copies of the sign.
        torch.bitwise_right_shift(clear, 8, out=swap)
        swap.bitwise_xor_(set_).bitwise_and_(0x00FF00FF)
        torch.bitwise_xor(set_, swap, out=high)
        torch.bitwise_xor(clear, swap.bitwise_left_shift_(8), out=low)
        for shift, mask, clear, set_, swap in self.steps:
            torch.bitwise_right_shift(clear, shift, out=swap)
            swap.bitwise_xor_(set_).bitwise_and_(mask)
            set_.bitwise_xor_(swap)
            clear.bitwise_xor_(swap.bitwise_left_shift_(shift))
        for plane, elements in enumerate(self.planes):
            out[:, plane].copy_(elements)


def _transpose(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    f, group = codes_per_word(bits), 16 // bits
    r, w = words.shape
    out = torch.empty((columns, -(-r // f)), dtype=torch.int32, device=words.device)
    if out.numel() == 0:
        return out
    whole_r, whole_w = r - r % f, columns // f
    half_block = _block_elements()
    # Twice the height where the block is four times as large, so that its shape stays.
    doublings = ((half_block // _ELEMENTS).bit_length() - 1) // 2
    height = min(_ROWS << doublings, max(whole_r, f))
    # An odd number of 64-byte lines: rows a power of two apart would share the L1 cache's sets.
    width = max(2 * half_block // height, 1)
    width = (width // 16 - 1 | 1) * 16 if width >= 16 else width

    def halves(tensor: torch.Tensor) -> torch.Tensor:
        # [columns, row words] as [half words of a source row, column in it, 16-bit row elements]
        return tensor.view(torch.int16).unflatten(0, (-1, group))

    def run(source: torch.Tensor, target: torch.Tensor) -> None:
        n, count = source.shape
        made: dict[tuple[int, int], _Transposer] = {}
        # Columns outermost: the pages of an output row are filled while they are in the cache.
        for columns in _slices(count, width):
            for rows in _slices(n, height):
                size = rows.stop - rows.start, columns.stop - columns.start
                if size not in made:
                    made[size] = _Transposer(bits, *size, words.device)
                made[size].run(
                    source[rows, columns],
                    target[
                        2 * columns.start : 2 * columns.stop,
                        :,
                        rows.start // group : rows.stop // group,
                    ],
                )

    def run_rows(source: torch.Tensor, target: torch.Tensor) -> None:
        whole = halves(target)
        run(source[:whole_r], whole[:, :, : whole_r // group])
        if whole_r < r:
            last = source.new_zeros((f, source.shape[1]))
            last[: r - whole_r] = source[whole_r:]
            run(last, whole[:, :, whole_r // group :])

    if whole_w:
        run_rows(words[:, :whole_w], out[: whole_w * f])
    if whole_w < w:  # a last word with padding columns
        last = torch.empty((f, out.shape[1]), dtype=torch.int32, device=words.device)
        run_rows(words[:, whole_w:], last)
        out[whole_w * f :] = last[: columns - whole_w * f]
    return out
