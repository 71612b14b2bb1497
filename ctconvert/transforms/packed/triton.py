"""Triton kernels of :mod:`ctconvert.transforms.packed`.

``transpose_packed``: i32 [R, W], the code matrix [R, C] packed along C, to i32 [C, ceil(R/f)],
the matrix [C, R] packed along R. One pass: every word is read once and written once.

``pack`` / ``unpack``: u8 [N, K], codes of b bits, to i32 [N, words] and back; i8 [N, K] with codes
``q + 2**(b-1)``. Two pairs of kernels:

- for whole words of 2, 4 or 8 bits (K % f == 0): the matrix is one run of words;
- for every width 1 to 8, either packing and any K: word w of a row is bits ``width*w`` and on of
  the row's dense bit string, where ``width`` is 32 or, padded, the bits that a word uses.

f = 32/b codes a word; code i of a word at bit ``b*i``. The launchers take CPU tensors as well where
Triton's interpreter is on.
"""

# In a kernel a name may hold tuples of several lengths, one after the other.
# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ctconvert.transforms.device import on_device
from ctconvert.transforms.shapes import WORD_BITS, codes_per_word, row_words
from ctconvert.transforms.words import as_words

# By code width: words of N (written) and of K (read) in one program, which transposes f times
# their product, and its warps. Of some ten tried each, these were within 3 % of the
# quickest at 28672 x 8192 and at 4096 x 4096 on an H200.
_TILES = {2: (16, 32, 8), 4: (16, 64, 8), 8: (32, 64, 8)}
# Words of packed codes in one program of the two kernels of whole words.
_FLAT = 1024
# Rows, and words (packing) or four codes (unpacking), in one program of the two kernels of rows.
_PACK_ROWS = (4, 256)
_UNPACK_ROWS = (4, 512)


@triton.jit
def swap_fields(low, high, BITS: tl.constexpr):
    """Swaps the odd fields of BITS bits of ``low`` with the even ones of ``high``."""
    # The mask is zero where the arithmetic shift brings in copies of the sign.
    fields = ((low >> BITS) ^ high) & (0xFFFFFFFF // ((1 << BITS) + 1))
    return low ^ (fields << BITS), high ^ fields


@triton.jit
def _transpose_kernel(
    src,
    dst,
    order,  # the rows to take, or None: as they are
    R,
    W,
    C,
    RW,
    src_stride,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,  # log2(32 / BITS)
    BC: tl.constexpr,
    BW: tl.constexpr,
):
    """BC*f rows of BW words, as f tiles [BC, BW]: tile j holds the rows that are j modulo f."""
    F: tl.constexpr = 1 << LEVELS
    pid = tl.program_id(0)
    # Programs that follow one another write side by side.
    tiles = tl.cdiv(RW, BC)
    pid_c = pid % tiles
    pid_w = pid // tiles
    c = pid_c * BC + tl.arange(0, BC)
    w = pid_w * BW + tl.arange(0, BW)

    rows = ()
    for j in tl.static_range(F):
        n = c * F + j
        inside = (n < R)[:, None] & (w < W)[None, :]
        if order is not None:
            n = tl.load(order + n, mask=n < R, other=0)
        at = src + n.to(tl.int64)[:, None] * src_stride + w[None, :]
        rows += (tl.load(at, mask=inside, other=0),)

    # Transposes the f x f codes of f words by swapping ever wider fields between words whose
    # numbers differ in one bit (Warren, "Hacker's Delight", section 7-3). Tile i ends up with the
    # words of column w*f + i.
    for level in tl.static_range(LEVELS):
        swapped = ()
        for i in tl.static_range(F):
            low = rows[i & ~(1 << level)]
            high = rows[i | (1 << level)]
            swapped += (swap_fields(low, high, BITS << level)[(i >> level) & 1],)
        rows = swapped

    # Joined, the most significant bit of i first, and transposed: [BW*f, BC], column by column.
    for level in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(F >> (level + 1)):
            joined += (tl.join(rows[i], rows[i + (F >> (level + 1))]),)
        rows = joined
    out = tl.trans(tl.reshape(rows[0], (BC, BW * F)))

    k = pid_w * (BW * F) + tl.arange(0, BW * F)
    inside = (k < C)[:, None] & (c < RW)[None, :]
    tl.store(dst + k.to(tl.int64)[:, None] * RW + c[None, :], out, mask=inside)


@triton.jit
def _outside(x, BITS: tl.constexpr, SIGNED: tl.constexpr):
    """Not zero where one of the four bytes of ``x`` is no code, or, signed, no value, of BITS."""
    # Bits of a byte that a code in range leaves clear or, signed, equal to the one below them.
    HIGH: tl.constexpr = ~(((1 << BITS) - 1) * 0x01010101)
    return ((x ^ (x << 1)) if SIGNED else x) & HIGH


@triton.jit
def _joined(x, BITS: tl.constexpr, SIGNED: tl.constexpr):
    """Four bytes, a code or a signed value each, to the four codes side by side, 4*BITS bits."""
    if SIGNED:  # adding half the range to a two's complement code flips its top bit
        x = x ^ ((1 << (BITS - 1)) * 0x01010101 - (BITS // 8 << 32))
    if BITS < 8:
        EVEN: tl.constexpr = ((1 << BITS) - 1) * 0x00010001
        LOW: tl.constexpr = (1 << (2 * BITS)) - 1
        # Shifts are arithmetic; the masks are zero where they bring in copies of the sign.
        x = (x & EVEN) | ((x >> (8 - BITS)) & (EVEN << BITS))
        x = (x & LOW) | ((x >> (16 - 2 * BITS)) & (LOW << (2 * BITS)))
    return x


@triton.jit
def _spread(x, BITS: tl.constexpr, SIGNED: tl.constexpr):
    """The inverse of :func:`_joined`; bits of ``x`` over the lowest 4*BITS may be anything."""
    if BITS < 8:
        EVEN: tl.constexpr = ((1 << BITS) - 1) * 0x00010001
        LOW: tl.constexpr = (1 << (2 * BITS)) - 1
        x = (x & LOW) | ((x & (LOW << (2 * BITS))) << (16 - 2 * BITS))
        x = (x & EVEN) | ((x & (EVEN << BITS)) << (8 - BITS))
    if SIGNED:
        # code - 2**(b-1) in every byte, without a carry: (code + 128 - 2**(b-1)) ^ 128.
        x = (x + (128 - (1 << (BITS - 1))) * 0x01010101) ^ ~0x7F7F7F7F
    return x


@triton.jit
def _pack_kernel(
    src, dst, bad, words, BITS: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """f/4 source words (four bytes each) to one word of codes; ``bad`` becomes 1 where any is not
    in range.
    """
    PARTS: tl.constexpr = 8 // BITS
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK * PARTS)
    inside = offset < (words - start) * PARTS
    x = tl.load(src + start * PARTS + offset, mask=inside, other=0)
    if BITS < 8:
        outside = _outside(x, BITS, SIGNED) != 0
        tl.store(bad, 1, mask=tl.max(outside.to(tl.int32), 0) != 0)
    x = _joined(x, BITS, SIGNED)
    if BITS == 4:
        low, high = tl.split(tl.reshape(x, (BLOCK, 2)))
        x = low | (high << 16)
    elif BITS == 2:
        even, odd = tl.split(tl.reshape(x, (BLOCK, 2, 2)))
        low, high = tl.split(even | (odd << 8))
        x = low | (high << 16)
    at = tl.arange(0, BLOCK)
    tl.store(dst + start + at, x, mask=at < words - start)


@triton.jit
def _unpack_kernel(src, dst, words, BITS: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """One word of codes to f/4 words of four bytes each."""
    PARTS: tl.constexpr = 8 // BITS
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    x = tl.load(src + start + at, mask=at < words - start, other=0)
    if BITS == 4:
        x = tl.reshape(tl.join(x, x >> 16), (BLOCK * 2,))
    elif BITS == 2:
        x = tl.join(x, x >> 16)
        x = tl.reshape(tl.join(x, x >> 8), (BLOCK * 4,))
    x = _spread(x, BITS, SIGNED)
    offset = tl.arange(0, BLOCK * PARTS)
    tl.store(dst + start * PARTS + offset, x, mask=offset < (words - start) * PARTS)


# In the two kernels below a row is one bit string. ``four`` numbers its runs of four codes
# (4*BITS bits, four bytes), ``word`` its words (WIDTH bits). What one lane writes lies in a few
# neighbours of the other kind, which it loads, joins in 64 bits and shifts; the lanes beside it
# load the same ones, from the L1 cache. Sizes are not specialised: lanes that store 16 bytes each
# would load far from one another.


@triton.jit(do_not_specialize=["k", "words"])
def _pack_rows_kernel(
    src,  # i32, four bytes each, where WHOLE (K % 4 == 0), else i8 or u8
    dst,
    bad,
    n,
    k,
    words,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,  # runs of four codes that a word may touch
    SIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    # The value of code 0, in one byte and in every byte of a word.
    FILL: tl.constexpr = -(1 << (BITS - 1)) if SIGNED else 0
    FILLS: tl.constexpr = (FILL & 0xFF) * 0x01010101 - ((1 << 32) if SIGNED else 0)
    tiles = tl.cdiv(words, COLS)
    pid = tl.program_id(0)
    word = pid % tiles * COLS + tl.arange(0, COLS)
    first = word * WIDTH // (4 * BITS)
    shift = word * WIDTH % (4 * BITS)
    outside = tl.zeros([COLS], tl.int32)
    for r in tl.static_range(ROWS):
        row = (pid // tiles).to(tl.int64) + r * tl.cdiv(n, ROWS)
        inside = word < tl.where(row < n, words, 0)
        value = tl.zeros([COLS], tl.int64)
        for i in tl.static_range(SPAN):
            four = first + i
            if WHOLE:
                at = src + row * (k // 4) + four
                x = tl.load(at, mask=inside & (four < k // 4), other=FILLS)
            else:
                x = tl.zeros([COLS], tl.int32)
                for j in tl.static_range(4):
                    column = four * 4 + j
                    at = src + row * k + column
                    byte = tl.load(at, mask=inside & (column < k), other=FILL)
                    x |= (byte.to(tl.int32) & 0xFF) << (8 * j)
            if BITS < 8:
                outside |= _outside(x, BITS, SIGNED)
            value |= _joined(x, BITS, SIGNED).to(tl.int64) << (4 * BITS * i)
        out = (value >> shift).to(tl.int32)
        if WIDTH < 32:
            out &= (1 << WIDTH) - 1
        tl.store(dst + row * words + word, out, mask=inside)
    if BITS < 8:
        tl.store(bad + tl.zeros_like(outside), 1, mask=outside != 0)


@triton.jit(do_not_specialize=["k", "words"])
def _unpack_rows_kernel(
    src,
    dst,  # as the source above
    n,
    k,
    words,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,  # words that a run of four codes may touch
    SIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    tiles = tl.cdiv(k, 4 * COLS)
    pid = tl.program_id(0)
    four = pid % tiles * COLS + tl.arange(0, COLS)
    first = four * (4 * BITS) // WIDTH
    shift = four * (4 * BITS) % WIDTH
    for r in tl.static_range(ROWS):
        row = (pid // tiles).to(tl.int64) + r * tl.cdiv(n, ROWS)
        inside = four * 4 < tl.where(row < n, k, 0)
        value = tl.zeros([COLS], tl.int64)
        for i in tl.static_range(SPAN):
            word = first + i
            x = tl.load(src + row * words + word, mask=inside & (word < words), other=0)
            value |= (x.to(tl.int64) & ((1 << WIDTH) - 1)) << (WIDTH * i)
        x = _spread((value >> shift).to(tl.int32), BITS, SIGNED)
        if WHOLE:
            tl.store(dst + row * (k // 4) + four, x, mask=inside)
        else:
            for j in tl.static_range(4):
                column = four * 4 + j
                tl.store(dst + row * k + column, x >> (8 * j), mask=inside & (column < k))


def transpose_packed_triton(
    words: torch.Tensor,
    bits: int,
    columns: int,
    order: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`~ctconvert.transforms.packed.transpose_packed`: i32 [R, W] to [columns, ceil(R/f)].

    With ``order``, i32 [R], row order[r] of the input stands for row r. ``out``, contiguous, is
    written where given. The caller checks what it gives.
    """
    f = 32 // bits
    r, w = words.shape
    words_out = -(-r // f)
    if out is None:
        out = torch.empty((columns, words_out), dtype=torch.int32, device=words.device)
    if out.numel() == 0:
        return out
    if words.stride(1) != 1:
        words = words.contiguous()
    bc, bw, warps = _TILES[bits]
    grid = (triton.cdiv(words_out, bc) * triton.cdiv(w, bw),)
    with on_device(words.device):
        _transpose_kernel[grid](
            words,
            out,
            order,
            r,
            w,
            columns,
            words_out,
            words.stride(0),
            BITS=bits,
            LEVELS=f.bit_length() - 1,
            BC=bc,
            BW=bw,
            num_warps=warps,
        )
    return out


def pack_triton(
    values: torch.Tensor, bits: int, packing: str = "dense"
) -> tuple[torch.Tensor, bool]:
    """i8 (signed) or u8 (codes) [N, K] to i32 [N, words] and whether all were in range.

    Where one was not, the words are not to be used. Waits for the device unless ``bits`` is 8.
    """
    n, k = values.shape
    words = row_words(k, bits, packing)
    out = torch.empty((n, words), dtype=torch.int32, device=values.device)
    if out.numel() == 0:
        return out, True
    signed = values.dtype == torch.int8
    bad = out if bits == 8 else new_flag(values.device)  # nothing is out of 8 bits' range
    with on_device(values.device):
        if _is_flat(bits, k):
            _pack_kernel[(triton.cdiv(out.numel(), _FLAT),)](
                as_words(values, torch.int32),
                out,
                bad,
                out.numel(),
                BITS=bits,
                SIGNED=signed,
                BLOCK=_FLAT,
            )
        else:
            width, span, _ = _spans(bits, packing)
            rows, cols = _PACK_ROWS
            _pack_rows_kernel[(triton.cdiv(n, rows) * triton.cdiv(words, cols),)](
                values.contiguous() if k % 4 else as_words(values, torch.int32),
                out,
                bad,
                n,
                k,
                words,
                BITS=bits,
                WIDTH=width,
                SPAN=span,
                SIGNED=signed,
                WHOLE=k % 4 == 0,
                ROWS=rows,
                COLS=cols,
            )
    return out, bits == 8 or not is_set(bad, values.device)


def unpack_triton(
    words: torch.Tensor,
    bits: int,
    k: int,
    packing: str = "dense",
    dtype: torch.dtype = torch.uint8,
) -> torch.Tensor:
    """i32 [N, words] to u8 [N, k], the codes, or to i8, ``code - 2**(b-1)``."""
    n = words.shape[0]
    out = torch.empty((n, k), dtype=dtype, device=words.device)
    if out.numel() == 0:
        return out
    words = words.contiguous()
    target = out if k % 4 else as_words(out, torch.int32)
    signed = dtype == torch.int8
    with on_device(words.device):
        if _is_flat(bits, k):
            _unpack_kernel[(triton.cdiv(words.numel(), _FLAT),)](
                words, target, words.numel(), BITS=bits, SIGNED=signed, BLOCK=_FLAT
            )
        else:
            width, _, span = _spans(bits, packing)
            rows, cols = _UNPACK_ROWS
            _unpack_rows_kernel[(triton.cdiv(n, rows) * triton.cdiv(k, 4 * cols),)](
                words,
                target,
                n,
                k,
                words.shape[1],
                BITS=bits,
                WIDTH=width,
                SPAN=span,
                SIGNED=signed,
                WHOLE=k % 4 == 0,
                ROWS=rows,
                COLS=cols,
            )
    return out


def _is_flat(bits: int, k: int) -> bool:
    return bits in WORD_BITS and k % (32 // bits) == 0


def _spans(bits: int, packing: str) -> tuple[int, int, int]:
    """Bits that a word uses, runs of four codes that one may touch, words that a run may touch."""
    width = 32 if packing == "dense" else codes_per_word(bits) * bits
    four = 4 * bits
    step = math.gcd(width, four)  # one begins at a multiple of this in the other
    return width, -(-(four - step + width) // four), -(-(width - step + four) // width)


def new_flag(device: torch.device) -> torch.Tensor:
    """i32 [1], 0, that a kernel on ``device`` may set and :func:`is_set` reads."""
    if device.type == "cuda":
        # In the host's memory: no kernel to clear it, no copy to read it.
        return torch.zeros(1, dtype=torch.int32, pin_memory=True)
    return torch.zeros(1, dtype=torch.int32, device=device)


def is_set(flag: torch.Tensor, device: torch.device) -> bool:
    """Whether a kernel of ``device``'s current stream set the flag; waits for that stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return bool(flag.item())
