"""Triton kernels of the quantised embedding look-up; the layout is in ``kernel.py``.

Before: a row of packed words, its scales and its zero points. After: the row's H values.

Two kernels. Where every code lies inside one word and a power of two fit in it (2, 4 and 8
bits, and 7 bits padded), a program loads each word once and writes its codes side by side.
Otherwise each code is fetched from the one or two words it lies in.

An id outside the table reads nothing and gives a row of NaN.
"""

import torch
import triton
import triton.language as tl

from ctconvert.runtime.kernels.gather.reference import check_range
from ctconvert.transforms.device import on_device


@triton.jit
def _row(ids_ptr, rows):
    """The program's row of the result, its id (0 where that is outside the table), whether not."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids_ptr + row).to(tl.int64)
    known = (token >= 0) & (token < rows)
    return row, tl.where(known, token, 0), known


@triton.jit
def _value(code, at, inside, scale_ptr, zero_ptr, BITS: tl.constexpr, HAS_ZERO: tl.constexpr):
    """(code - zero) * scale in f32 with the scale and zero point ``at``; NaN if not ``inside``."""
    scale = tl.load(scale_ptr + at, mask=inside, other=float("nan")).to(tl.float32)
    if HAS_ZERO:
        code -= tl.load(zero_ptr + at, mask=inside, other=0).to(tl.int32)
    else:
        code -= 1 << (BITS - 1)
    return code.to(tl.float32) * scale


@triton.jit
def _gather_words(
    ids_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    rows,
    hidden,
    words,
    groups,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,  # codes in a group
    CODES: tl.constexpr,  # codes in a word
    CHANNEL: tl.constexpr,  # one scale for the row
    WORD_SCALE: tl.constexpr,  # a word's codes share a group
    HAS_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,  # words
):
    row, token, known = _row(ids_ptr, rows)
    readable = tl.where(known, words, 0)
    w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = w[:, None] * CODES + tl.arange(0, CODES)[None, :]
    packed = tl.load(packed_ptr + token * words + w, mask=w < readable, other=0)
    code = (packed[:, None] >> (BITS * tl.arange(0, CODES))[None, :]) & ((1 << BITS) - 1)

    # One scale for the row, for each word, or for each code: the fewest loads that serve.
    if CHANNEL:
        group = tl.zeros([1, 1], tl.int32)
        inside = group < readable
    elif WORD_SCALE:
        group = (w * CODES // SIZE)[:, None]
        inside = (w < readable)[:, None]
    else:
        group = k // SIZE
        inside = (k < hidden) & (w < readable)[:, None]
    at = token * groups + group
    value = _value(code, at, inside, scale_ptr, zero_ptr, BITS, HAS_ZERO)
    tl.store(out_ptr + row * hidden + k, value.to(out_ptr.dtype.element_ty), mask=k < hidden)


@triton.jit
def _gather_codes(
    ids_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    rows,
    hidden,
    words,
    groups,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    DENSE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,  # codes
):
    row, token, known = _row(ids_ptr, rows)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < tl.where(known, hidden, 0)
    if DENSE:
        word = BITS * k // 32
        shift = BITS * k % 32
    else:
        word = k // (32 // BITS)
        shift = BITS * (k % (32 // BITS))
    at = packed_ptr + token * words + word
    code = tl.load(at, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift
    if DENSE:
        high = tl.load(at + 1, mask=inside & (shift + BITS > 32), other=0)
        code |= high.to(tl.uint32, bitcast=True) << (32 - tl.maximum(shift, 1))
    code = (code & ((1 << BITS) - 1)).to(tl.int32)

    group = token * groups + k // SIZE
    value = _value(code, group, inside, scale_ptr, zero_ptr, BITS, HAS_ZERO)
    tl.store(out_ptr + row * hidden + k, value.to(out_ptr.dtype.element_ty), mask=k < hidden)


def gather(
    ids: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None = None,
    *,
    bits: int,
    hidden: int,
    packing: str = "dense",
    check: bool = True,
    block: int | None = None,
    warps: int | None = None,
) -> torch.Tensor:
    """``embedding_gather`` on arguments already checked, but for the values of ``ids``.

    ``block`` is the number of words (or of codes, where they straddle) one program takes.
    """
    if check:
        check_range(ids, weight_packed.shape[0])
    out = torch.empty((*ids.shape, hidden), dtype=weight_scale.dtype, device=ids.device)
    count = ids.numel()
    if count == 0:
        return out
    rows, words = weight_packed.shape
    groups = weight_scale.shape[1]
    size = hidden // groups
    per_word = 32 // bits
    arguments = (
        ids,
        weight_packed,
        weight_scale,
        weight_zero_point if weight_zero_point is not None else weight_packed,
        out,
        rows,
        hidden,
        words,
        groups,
    )
    with on_device(ids.device):
        if bits in (2, 4, 8) or (bits == 7 and packing == "padded"):
            # One program a row where it has at most 1024 words, one word a thread at a time.
            block = block or min(triton.next_power_of_2(words), 1024)
            warps = warps or (8 if block == 1024 else 4)
            _gather_words[(count, triton.cdiv(words, block))](
                *arguments,
                BITS=bits,
                SIZE=size,
                CODES=per_word,
                CHANNEL=groups == 1,
                WORD_SCALE=size % per_word == 0,
                HAS_ZERO=weight_zero_point is not None,
                BLOCK=block,
                num_warps=warps,
            )
        else:
            block = block or min(triton.next_power_of_2(hidden), 4096)
            warps = warps or 4
            _gather_codes[(count, triton.cdiv(hidden, block))](
                *arguments,
                BITS=bits,
                SIZE=size,
                DENSE=packing == "dense",
                HAS_ZERO=weight_zero_point is not None,
                BLOCK=block,
                num_warps=warps,
            )
    return out
