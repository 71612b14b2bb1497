"""The torch path of :mod:`ctconvert.transforms.packed`, which describes the forms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, NoReturn

import torch

from ctconvert.transforms.dtypes import empty
from ctconvert.transforms.shapes import codes_per_word, row_words
from ctconvert.transforms.threads import GRAIN, slices, spread
from ctconvert.transforms.words import as_words, exchange, signed

_ROWS = 512  # rows of one transposed block: runs of 256 bytes of output for b = 4
# Values searched at a time for the one that is out of range, on a device too.
_SEARCHED = 4 << 20


def _lowest(dtype: torch.dtype, bits: int) -> int:
    """The value whose code is 0: of i8, signed values, or u8, codes."""
    return -(1 << (bits - 1)) if dtype == torch.int8 else 0


def raise_out_of_range(values: torch.Tensor, bits: int) -> NoReturn:
    """Raises ValueError for the first of i8 or u8 [N, K] that has no code of so many bits."""
    low = _lowest(values.dtype, bits)
    high = low + (1 << bits) - 1
    for rows in slices(values.shape[0], _SEARCHED // values.shape[1]):
        part = values[rows]
        bad = (part < low) | (part > high) if low else part > high
        if bool(bad.any()):
            row, column = divmod(int(bad.flatten().to(torch.uint8).argmax()), part.shape[1])
            raise ValueError(
                f"row {rows.start + row}, column {column}: {int(part[row, column])} is "
                f"outside {low}..{high}, the range of a {bits}-bit code"
            )
    raise AssertionError("every value has a code")


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


def pack_plain(codes: torch.Tensor, bits: int, packing: str) -> torch.Tensor:
    """u8 codes [N, K] of any width to i32 [N, words]; ValueError where out of range."""
    n, k = codes.shape
    words = row_words(k, bits, packing)
    out = empty((n, words), torch.int32, codes.device)
    if out.numel() == 0:
        return out
    period = _period(bits, packing)

    def run(source: torch.Tensor, target: torch.Tensor) -> None:
        source = source.unflatten(1, (-1, period.codes))
        target = target.unflatten(1, (-1, period.words))

        def work(share: Sequence[slice]) -> None:
            for rows in share:
                x, y = source[rows], target[rows]
                seen = torch.zeros(x.shape[:2], dtype=torch.uint8, device=x.device)
                for word, parts in itertools.groupby(period.parts, lambda part: part.word):
                    packed = torch.zeros_like(seen, dtype=torch.int32)
                    for part in parts:
                        code = x[..., part.code]
                        seen.bitwise_or_(code)
                        packed.bitwise_or_(_placed(code, part))
                    y[..., word].copy_(packed)
                if int(seen.max()) >> bits:
                    raise_out_of_range(codes, bits)

        spread(work, slices(n, GRAIN // source.shape[1]), source.nbytes)

    whole = k // period.codes
    if whole:
        run(codes[:, : whole * period.codes], out[:, : whole * period.words])
    if rest := k - whole * period.codes:
        last = torch.empty((n, period.words), dtype=torch.int32, device=out.device)
        run(torch.nn.functional.pad(codes[:, k - rest :], (0, period.codes - rest)), last)
        out[:, whole * period.words :] = last[:, : words - whole * period.words]
    return out


def unpack_plain(words: torch.Tensor, bits: int, k: int, packing: str) -> torch.Tensor:
    """The inverse of :func:`pack_plain`: i32 [N, words] to u8 codes [N, k]."""
    n = words.shape[0]
    out = empty((n, k), torch.uint8, words.device)
    if out.numel() == 0:
        return out
    period = _period(bits, packing)

    def run(source: torch.Tensor, target: torch.Tensor) -> None:
        source = source.unflatten(1, (-1, period.words))
        target = target.unflatten(1, (-1, period.codes))

        def work(share: Sequence[slice]) -> None:
            for rows in share:
                x, y = source[rows], target[rows]
                for code, parts in itertools.groupby(period.parts, lambda part: part.code):
                    first, *second = (_bits_of(x[..., part.word], part) for part in parts)
                    y[..., code].copy_(first.bitwise_or_(*second) if second else first)

        spread(work, slices(n, GRAIN // source.shape[1]), target.nbytes)

    whole = k // period.codes
    if whole:
        run(words[:, : whole * period.words], out[:, : whole * period.codes])
    if rest := k - whole * period.codes:
        source = words[:, whole * period.words :]
        last = torch.empty((n, period.codes), dtype=torch.uint8, device=out.device)
        run(torch.nn.functional.pad(source, (0, period.words - source.shape[1])), last)
        out[:, k - rest :] = last[:, :rest]
    return out


def _placed(code: torch.Tensor, part: _Part) -> torch.Tensor:
    """The bits of a code that a word holds, in their place in the word."""
    word = code.to(torch.int32)
    if part.shift >= 0:
        return word.bitwise_left_shift_(part.shift)
    return word.bitwise_right_shift_(-part.shift)


def _bits_of(word: torch.Tensor, part: _Part) -> torch.Tensor:
    """The bits of a code that a word holds, in their place in the code."""
    # The mask removes the copies of the sign bit that the arithmetic shift brings in.
    if part.shift >= 0:
        return (word >> part.shift).bitwise_and_(part.mask)
    return (word & part.mask).bitwise_left_shift_(-part.shift)


# ------------------------------------------- 2, 4 and 8 bits, the codes of a byte an operation

# The integer that holds the codes of one byte of a word, a byte each; for 8 bits, of a whole word.
_ELEMENT = {2: torch.int32, 4: torch.int16, 8: torch.int32}


def pack_bytes(values: torch.Tensor, bits: int) -> torch.Tensor:
    """i8 (signed) or u8 (codes) [N, K] to i32 [N, ceil(K/f)]; ValueError where out of range."""
    n, k = values.shape
    words = row_words(k, bits)
    out = empty((n, words), torch.int32, values.device)
    if out.numel() == 0:
        return out
    low = _lowest(values.dtype, bits)
    padded = words * codes_per_word(bits)
    wide = _ELEMENT[bits]
    # Adding half the range to a two's complement code flips its top bit.
    flip = signed(-low * (0xFFFFFFFF // ((1 << bits) - 1)))
    # Bits of a byte that a code in range leaves clear or, signed, equal to the one below them.
    every_byte = (1 << 8 * wide.itemsize) // 255
    high = signed((256 - (1 << bits)) * every_byte, 8 * wide.itemsize)
    height = max(GRAIN * wide.itemsize // padded, 1)
    shape = min(height, n), padded // wide.itemsize
    whole = k == padded and values.is_contiguous() and values.data_ptr() % wide.itemsize == 0
    source = as_words(values, wide) if whole else values

    def work(share: Sequence[slice]) -> None:
        scratch = torch.empty(shape, dtype=wide, device=out.device)
        seen = torch.zeros(shape, dtype=wide, device=out.device)
        for rows in share:
            x, target = source[rows], out[rows]
            if k != padded:  # the value of code 0 fills the last word
                x = torch.nn.functional.pad(x, (0, padded - k), value=low)
            if not whole:
                x = as_words(x, wide)
            if bits < 8:
                y = scratch[: x.shape[0]]
                if low:  # a bit that is not the one below it
                    torch.bitwise_left_shift(x, 1, out=y)
                    seen[: x.shape[0]].bitwise_or_(y.bitwise_xor_(x))
                else:
                    seen[: x.shape[0]].bitwise_or_(x)
                # Codes come together in the top byte of the product, lowest first; no two terms
                # share a bit. The copy keeps the low byte of what is shifted down.
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
        if any(int(extreme) for extreme in seen.bitwise_and_(high).aminmax()):
            raise_out_of_range(values, bits)

    spread(work, slices(n, height), values.nbytes)
    return out


def unpack_bytes(words: torch.Tensor, bits: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of :func:`pack_bytes`: i32 [N, ceil(k/f)] to i8 or u8 [N, k]."""
    n = words.shape[0]
    out = empty((n, k), dtype, words.device)
    if out.numel() == 0:
        return out
    offset = -_lowest(dtype, bits)
    padded = words.shape[1] * codes_per_word(bits)
    words = as_words(words, torch.int32)
    wide = _ELEMENT[bits]
    every_byte = (1 << 8 * wide.itemsize) // 255
    flip = signed(128 * every_byte, 8 * wide.itemsize) if offset else 0
    height = max(GRAIN * wide.itemsize // padded, 1)

    def work(share: Sequence[slice]) -> None:
        shape = height, padded // wide.itemsize
        scratch = [torch.empty(shape, dtype=wide, device=out.device) for _ in range(2)]
        for rows in share:
            block, target = words[rows], out[rows]
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
            whole = target.view(wide) if k == padded else y
            torch.bitwise_xor(x, flip, out=whole)
            if k != padded:
                target.copy_(whole.view(dtype)[:, :k])

    spread(work, slices(n, height), out.nbytes)
    return out


# ------------------------------------------------------------------------------------ transpose


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
        self.steps = []  # arguments of exchange: rows with the bit clear, rows with it set
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
        # As exchange does, from the words into the planes.
        torch.bitwise_right_shift(clear, 8, out=swap)
        swap.bitwise_xor_(set_).bitwise_and_(0x00FF00FF)
        torch.bitwise_xor(set_, swap, out=high)
        torch.bitwise_xor(clear, swap.bitwise_left_shift_(8), out=low)
        for step in self.steps:
            exchange(*step)
        for plane, elements in enumerate(self.planes):
            out[:, plane].copy_(elements)


def transpose(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """i32 [R, W], ``columns`` codes a row, to i32 [columns, ceil(R/f)]; missing rows are zeros."""
    f, group = codes_per_word(bits), 16 // bits
    r, w = words.shape
    out = empty((columns, -(-r // f)), torch.int32, words.device)
    if out.numel() == 0:
        return out
    whole_r, whole_w = r - r % f, columns // f
    height = min(_ROWS, max(whole_r, f))
    # Operations take half the words of a block; with 8 bits a copy takes as many half words.
    width = max(GRAIN * (1 if bits == 8 else 2) // height, 1)
    # An odd number of 64-byte lines: rows a power of two apart would share the L1 cache's sets.
    width = (width // 16 - 1 | 1) * 16 if width >= 16 else width

    def halves(tensor: torch.Tensor) -> torch.Tensor:
        # [columns, row words] as [half words of a source row, column in it, 16-bit row elements]
        return tensor.view(torch.int16).unflatten(0, (-1, group))

    def run(source: torch.Tensor, target: torch.Tensor) -> None:
        def work(share: Sequence[tuple[slice, slice]]) -> None:
            made: dict[tuple[int, int], _Transposer] = {}
            for columns, rows in share:
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

        n, count = source.shape
        # Columns outermost: the pages of an output row are filled while they are in the cache.
        blocks = [(columns, rows) for columns in slices(count, width) for rows in slices(n, height)]
        spread(work, blocks, source.nbytes)

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
