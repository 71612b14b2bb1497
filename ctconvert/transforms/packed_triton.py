"""Triton kernels of :mod:`ctconvert.transforms.packed`.

``transpose_packed``: i32 [R, W], the code matrix [R, C] packed along C, to i32 [C, ceil(R/f)],
the matrix [C, R] packed along R. One pass: every word is read once and written once.

``pack_int8`` / ``unpack_int8``: i8 [N, K] to i32 [N, K/f] with codes ``q + 2**(b-1)``, and back;
with u8 instead of i8 the bytes are the codes themselves.

f = 32/b codes a word, b = 2, 4 or 8; code i of a word at bit ``b*i``. The launchers take CPU
tensors as well where Triton's interpreter is on.
"""

# In a kernel a name may hold tuples of several lengths, one after the other.
# mypy: disable-error-code="assignment,misc,var-annotated"

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

# By code width: words of N (written) and of K (read) in one program, which transposes f times
# their product, and its warps. Of some ten tried each, these were within 3 % of the
# quickest at 28672 x 8192 and at 4096 x 4096 on an H200.
_TILES = {2: (16, 32, 8), 4: (16, 64, 8), 8: (32, 64, 8)}
# Words of packed codes in one program of the two elementwise kernels.
_FLAT = 1024


@triton.jit
def _swap(low, high, BITS: tl.constexpr):
    """Swaps the odd fields of BITS bits of ``low`` with the even ones of ``high``."""
    # The mask is zero where the arithmetic shift brings in copies of the sign.
    fields = ((low >> BITS) ^ high) & (0xFFFFFFFF // ((1 << BITS) + 1))
    return low ^ (fields << BITS), high ^ fields


@triton.jit
def _transpose_kernel(
    src,
    dst,
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
            swapped += (_swap(low, high, BITS << level)[(i >> level) & 1],)
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
    if BITS == 8:
        out = x
    else:
        # Bits of a byte that a code in range leaves clear or, signed, equal to the one below them.
        HIGH: tl.constexpr = ~(((1 << BITS) - 1) * 0x01010101)
        outside = ((x ^ (x << 1)) if SIGNED else x) & HIGH
        tl.store(bad, 1, mask=tl.max((outside != 0).to(tl.int32), 0) != 0)
        if BITS == 4:
            x = x & 0x0F0F0F0F
            x = (x | (x >> 4)) & 0x00FF00FF
            x = (x | (x >> 8)) & 0xFFFF
            low, high = tl.split(tl.reshape(x, (BLOCK, 2)))
        else:
            # The product's top byte holds the four codes, lowest first: no two terms share a bit.
            x = (((x & 0x03030303) * 0x01041040) >> 24) & 0xFF
            even, odd = tl.split(tl.reshape(x, (BLOCK, 2, 2)))
            low, high = tl.split(even | (odd << 8))
        out = low | (high << 16)
    if SIGNED:  # adding half the range to a two's complement code flips its top bit
        # Every top bit: the word of ones over the ones of a field, times the field's top bit.
        out = out ^ ~(0xFFFFFFFF - (0xFFFFFFFF // ((1 << BITS) - 1) << (BITS - 1)))
    at = tl.arange(0, BLOCK)
    tl.store(dst + start + at, out, mask=at < words - start)


@triton.jit
def _unpack_kernel(src, dst, words, BITS: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """One word of codes to f/4 words of four bytes each."""
    PARTS: tl.constexpr = 8 // BITS
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    x = tl.load(src + start + at, mask=at < words - start, other=0)
    if BITS == 4:
        x = tl.reshape(tl.join(x & 0xFFFF, (x >> 16) & 0xFFFF), (BLOCK * 2,))
        x = (x | (x << 8)) & 0x00FF00FF
        x = (x | (x << 4)) & 0x0F0F0F0F
    elif BITS == 2:
        x = tl.join(x & 0xFFFF, (x >> 16) & 0xFFFF)
        x = tl.reshape(tl.join(x & 0xFF, x >> 8), (BLOCK * 4,))
        x = (x | (x << 12)) & 0x000F000F
        x = (x | (x << 6)) & 0x03030303
    if SIGNED:
        # code - 2**(b-1) in every byte, without a carry: (code + 128 - 2**(b-1)) ^ 128.
        x = (x + (128 - (1 << (BITS - 1))) * 0x01010101) ^ ~0x7F7F7F7F
    offset = tl.arange(0, BLOCK * PARTS)
    tl.store(dst + start * PARTS + offset, x, mask=offset < (words - start) * PARTS)


def transpose_packed_triton(
    words: torch.Tensor, bits: int, columns: int, pad_rows: bool = False
) -> torch.Tensor:
    """:func:`~ctconvert.transforms.packed.transpose_packed`: i32 [R, W] to [columns, ceil(R/f)].

    Raises ValueError where R % f != 0 without ``pad_rows``. The caller checks the rest.
    """
    f = 32 // bits
    r, w = words.shape
    if r % f and not pad_rows:
        raise ValueError(f"{r} rows are not a multiple of the {f} codes of a word ({bits} bits)")
    row_words = -(-r // f)
    out = torch.empty((columns, row_words), dtype=torch.int32, device=words.device)
    if out.numel() == 0:
        return out
    if words.stride(1) != 1:
        words = words.contiguous()
    bc, bw, warps = _TILES[bits]
    grid = (triton.cdiv(row_words, bc) * triton.cdiv(w, bw),)
    with _on(words.device):
        _transpose_kernel[grid](
            words,
            out,
            r,
            w,
            columns,
            row_words,
            words.stride(0),
            BITS=bits,
            LEVELS=f.bit_length() - 1,
            BC=bc,
            BW=bw,
            num_warps=warps,
        )
    return out


def pack_int8_triton(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, bool]:
    """i8 (signed) or u8 (codes) [N, K], K % f == 0, to i32 [N, K/f] and whether all were in range.

    Where one was not, the words are not to be used. Waits for the device.
    """
    f = 32 // bits
    n, k = values.shape
    if k % f:
        raise ValueError(f"rows of {k} values are not a multiple of {f}")
    out = torch.empty((n, k // f), dtype=torch.int32, device=values.device)
    if out.numel() == 0:
        return out, True
    bad = torch.zeros(1, dtype=torch.int32, device=values.device)
    with _on(values.device):
        _pack_kernel[(triton.cdiv(out.numel(), _FLAT),)](
            _as_words(values),
            out,
            bad,
            out.numel(),
            BITS=bits,
            SIGNED=values.dtype == torch.int8,
            BLOCK=_FLAT,
        )
    return out, bits == 8 or not bool(bad.item())


def unpack_int8_triton(
    words: torch.Tensor, bits: int, dtype: torch.dtype = torch.int8
) -> torch.Tensor:
    """i32 [N, W] to i8 [N, W*f], ``code - 2**(b-1)``, or to u8, the codes."""
    n, w = words.shape
    out = torch.empty((n, w * (32 // bits)), dtype=dtype, device=words.device)
    if out.numel() == 0:
        return out
    with _on(words.device):
        _unpack_kernel[(triton.cdiv(words.numel(), _FLAT),)](
            words.contiguous(),
            _as_words(out),
            words.numel(),
            BITS=bits,
            SIGNED=dtype == torch.int8,
            BLOCK=_FLAT,
        )
    return out


def _as_words(tensor: torch.Tensor) -> torch.Tensor:
    """An i8 or u8 tensor as i32 [numel/4], without a copy where it is contiguous and aligned."""
    flat = tensor.contiguous().view(-1)
    if flat.storage_offset() % 4:
        flat = flat.clone()
    return flat.view(torch.int32)


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Makes the tensor's device current: Triton launches on the current one."""
    if device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[None] = torch.get_device_module(device).device(device)
    return context
