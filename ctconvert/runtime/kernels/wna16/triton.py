"""Triton kernels of ``wna16``; imported only when a kernel is launched.

Before (N = output features, K = input features, G = group size, b = 2, 4, 8, f = 32/b)::

    x        [M, K]      f16 or bf16
    qweight  i32 [K, N/f]    code j of word (k, c) belongs to n = c*f + j
    scales   [K/G, N]        f16, bf16 or f32
    qzeros   i32 [K/G, N/f]  packed like qweight; None: every zero is 2^(b-1)

After: [M, N] in x's dtype, ``out[m, n] = sum_k x[m, k] * (code - zero)[k, n] * scale[k // G, n]``.

Two ways, chosen by :func:`select`: a fused kernel that unpacks the weight in registers on its way
to the tensor cores, and, for many rows of x or group sizes that are no multiple of 16, one pass
that dequantises to [K, N] in x's dtype before torch's product. The fused kernel forms
``code - zero`` exactly in x's dtype; the scale multiplies either the f32 sum over a group (few rows
of x: nothing is rounded before the result) or the weight (many rows: one rounding a weight).

How the codes get into tensor-core order without moving between threads: the layout packs
neighbours along N, while the fragment of a tensor-core operand pairs neighbours along K. So the
product computed is ``weight^T [n, k] @ x^T [k, m]``, with N in an order of its own: lane (g, q) of
a warp reads words g, g + 8, ... of rows 2q, 2q + 1, 2q + 8, 2q + 9 of every 16; a word yields its
32/b codes as different rows of the operand in the same lane, and the words of rows k, k + 1 yield
packed pairs. The order of N is undone when the result is stored. A code becomes a 16-bit float
without a conversion: ``code | 0x4300`` are the bits of bf16(128 + code), ``code | 0x6400`` those of
f16(1024 + code); subtracting 128 + zero or 1024 + zero is exact. TMA brings the words into shared
memory swizzled, so that these reads meet no bank conflict.

Work is cut along K as well ("stream-K", Osama et al., 2023, arXiv:2301.03598): the (tile, step)
pairs are dealt to the programs in equal runs. A program that holds only part of a tile's steps
writes a f32 partial tile; the last to arrive adds them all in a fixed order. So results do not
depend on timing: the same call gives the same bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ctconvert.runtime.kernels.fake_quant.triton import (
    INTERPRETED,
    fake_quant,
    fake_quant_tile,
    load_scale,
    narrow,
)
from ctconvert.runtime.kernels.hardware import multiprocessors
from ctconvert.transforms.device import on_device


def _unpack_asm(bits: int, bf16: bool) -> str:
    """PTX of :func:`_unpack`."""
    count = 16 // bits
    out = 2 * count
    mask = ((1 << bits) - 1) * 0x10001
    magic = 0x43004300 if bf16 else 0x64006400
    lines = [".reg .b32 a, t;", f"prmt.b32 a, ${out}, ${out + 1}, ${out + 2};"]
    if bits == 8 and bf16:
        # Eight bits do not fit beside 128 in bf16's mantissa: through f32, where 2^23 + code does.
        lines += [".reg .f32 u, v;", ".reg .b32 s, o;", "mov.b32 o, 0x4b000000;"]
    for j in range(count):
        if j:
            lines.append(f"shr.u32 a, a, {bits};")
        if bits == 8 and bf16:
            lines += [
                "lop3.b32 s, a, 0xff, o, 0xea;",
                "mov.b32 u, s;",
                "shr.u32 s, a, 16;",
                "lop3.b32 s, s, 0xff, o, 0xea;",
                "mov.b32 v, s;",
                "sub.f32 u, u, 0f4B000000;",
                "sub.f32 v, v, 0f4B000000;",
                "cvt.rn.bf16x2.f32 t, v, u;",
            ]
        else:
            lines.append(f"lop3.b32 t, a, {mask:#010x}, {magic:#010x}, 0xea;")
        lines.append(f"mov.b32 {{${2 * j}, ${2 * j + 1}}}, t;")
    return "{ " + " ".join(lines) + " }"


UNPACK_2_BF16 = tl.constexpr(_unpack_asm(2, True))
UNPACK_2_F16 = tl.constexpr(_unpack_asm(2, False))
UNPACK_4_BF16 = tl.constexpr(_unpack_asm(4, True))
UNPACK_4_F16 = tl.constexpr(_unpack_asm(4, False))
UNPACK_8_BF16 = tl.constexpr(_unpack_asm(8, True))
UNPACK_8_F16 = tl.constexpr(_unpack_asm(8, False))
OPERANDS_2 = tl.constexpr("=h," * 16 + "r,r,r")
OPERANDS_4 = tl.constexpr("=h," * 8 + "r,r,r")
OPERANDS_8 = tl.constexpr("=h," * 4 + "r,r,r")
SUBTRACT_F16 = tl.constexpr("sub.f16x2 $0, $1, $2;")
SUBTRACT_BF16 = tl.constexpr("sub.bf16x2 $0, $1, $2;")
MULTIPLY_F16 = tl.constexpr("mul.f16x2 $0, $1, $2;")
MULTIPLY_BF16 = tl.constexpr("mul.bf16x2 $0, $1, $2;")
# Before sm_90 bf16 has only a fused multiply-add.
SUBTRACT_BF16_FMA = tl.constexpr(
    "{ .reg .b32 o; mov.b32 o, 0xbf80bf80; fma.rn.bf16x2 $0, $2, o, $1; }"
)
MULTIPLY_BF16_FMA = tl.constexpr(
    "{ .reg .b32 o; mov.b32 o, 0x80008000; fma.rn.bf16x2 $0, $1, $2, o; }"
)


def _scaled_asm(bf16: bool) -> str:
    """PTX of :func:`_scaled`: as of 4 bits above, less 8, times operand 11 + j."""
    magic = 0x43004300 if bf16 else 0x64006400
    kind = "bf16x2" if bf16 else "f16x2"
    lines = [
        ".reg .b32 a, t, z;",
        "prmt.b32 a, $8, $9, $10;",
        f"mov.b32 z, {magic + 0x80008:#010x};",
    ]
    for j in range(4):
        if j:
            lines.append("shr.u32 a, a, 4;")
        lines.append(f"lop3.b32 t, a, 0x000f000f, {magic:#010x}, 0xea;")
        lines.append(f"sub.{kind} t, t, z; mul.{kind} t, t, ${11 + j};")
        lines.append(f"mov.b32 {{${2 * j}, ${2 * j + 1}}}, t;")
    return "{ " + " ".join(lines) + " }"


SCALED_BF16 = tl.constexpr(_scaled_asm(True))
SCALED_F16 = tl.constexpr(_scaled_asm(False))
OPERANDS_SCALED = tl.constexpr("=h," * 8 + "r,r,r,r,r,r,r")


@triton.jit
def pairs_of_one(pairs):
    """Words of two 16-bit values -> words of the lower twice, and of the upper twice."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $2, 0x1010; prmt.b32 $1, $2, $2, 0x3232;",
        "=&r,=r,r",
        [pairs],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _scaled(low, high, pairs01, pairs23, DTYPE: tl.constexpr):
    """4-bit words as :func:`_unpack` takes them, symmetric, and the scales of their half words
    [..., half] -> weights [..., half, row, j / 2, j % 2].

    In one piece of PTX: the compiler would make a pair of one scale anew for each two weights.
    """
    half = tl.arange(0, 2)
    AXIS: tl.constexpr = len(low.shape)
    low = tl.expand_dims(low, AXIS)
    high = tl.expand_dims(high, AXIS)
    scale0, scale1 = pairs_of_one(pairs01)
    scale2, scale3 = pairs_of_one(pairs23)
    ASM: tl.constexpr = SCALED_BF16 if tl.bfloat16 == DTYPE else SCALED_F16
    o = tl.inline_asm_elementwise(
        ASM,
        OPERANDS_SCALED,
        [low, high, half * 0x2222 + 0x5410, scale0, scale1, scale2, scale3],
        dtype=(tl.int16,) * 8,
        is_pure=True,
        pack=1,
    )
    weight = tl.join(
        tl.join(tl.join(o[0], o[1]), tl.join(o[4], o[5])),
        tl.join(tl.join(o[2], o[3]), tl.join(o[6], o[7])),
    )
    return weight.to(DTYPE, bitcast=True)


@triton.jit
def _unpack(low, high, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Words [...] of rows k and k + 1 -> [..., half, row, bits of j]: 16 / BITS codes a half word.

    With PTX: DTYPE, code + 128 (bf16), + 1024 (f16) or + 0 (bf16, 8 bits); else int32, the code.
    """
    AXIS: tl.constexpr = len(low.shape)
    half = tl.arange(0, 2)
    low = tl.expand_dims(low, AXIS)
    high = tl.expand_dims(high, AXIS)
    if PTX == 0:
        codes = tl.join(low >> (half * 16), high >> (half * 16))
        codes = tl.join(codes, codes >> 8)
        if BITS <= 4:
            codes = tl.join(codes, codes >> 4)
        if BITS <= 2:
            codes = tl.join(codes, codes >> 2)
        codes = codes & ((1 << BITS) - 1)
    else:
        # Selects the low or the high half of both words (PRMT). o[2 * j + row]; the joins append
        # the bits of j, highest first.
        args = [low, high, half * 0x2222 + 0x5410]
        if BITS == 8:
            ASM8: tl.constexpr = UNPACK_8_BF16 if tl.bfloat16 == DTYPE else UNPACK_8_F16
            o = tl.inline_asm_elementwise(
                ASM8, OPERANDS_8, args, dtype=(tl.int16,) * 4, is_pure=True, pack=1
            )
            codes = tl.join(tl.join(o[0], o[1]), tl.join(o[2], o[3]))
        elif BITS == 4:
            ASM4: tl.constexpr = UNPACK_4_BF16 if tl.bfloat16 == DTYPE else UNPACK_4_F16
            o = tl.inline_asm_elementwise(
                ASM4, OPERANDS_4, args, dtype=(tl.int16,) * 8, is_pure=True, pack=1
            )
            codes = tl.join(
                tl.join(tl.join(o[0], o[1]), tl.join(o[4], o[5])),
                tl.join(tl.join(o[2], o[3]), tl.join(o[6], o[7])),
            )
        else:
            ASM2: tl.constexpr = UNPACK_2_BF16 if tl.bfloat16 == DTYPE else UNPACK_2_F16
            o = tl.inline_asm_elementwise(
                ASM2, OPERANDS_2, args, dtype=(tl.int16,) * 16, is_pure=True, pack=1
            )
            codes = tl.join(
                tl.join(
                    tl.join(tl.join(o[0], o[1]), tl.join(o[8], o[9])),
                    tl.join(tl.join(o[4], o[5]), tl.join(o[12], o[13])),
                ),
                tl.join(
                    tl.join(tl.join(o[2], o[3]), tl.join(o[10], o[11])),
                    tl.join(tl.join(o[6], o[7]), tl.join(o[14], o[15])),
                ),
            )
        codes = codes.to(DTYPE, bitcast=True)
    return codes


@triton.jit
def _minus_zero(weight, zero, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """What ``_unpack`` gave less the zero points: int32 without PTX, else DTYPE, both exact.

    zero: words of the weight's axes, of size 1 along K, so that every lane unpacks its own; None
    where symmetric.
    """
    if zero is None:
        BF16_BIAS: tl.constexpr = 0 if BITS == 8 else 128
        BIAS: tl.constexpr = BF16_BIAS if tl.bfloat16 == DTYPE else 1024
        ZERO: tl.constexpr = (1 << (BITS - 1)) + (BIAS if PTX else 0)
        zero = tl.full([1] * len(weight.shape), ZERO, tl.int32)
        if PTX:
            zero = zero.to(tl.float32).to(DTYPE)
    else:
        zero = _unpack(zero, zero, BITS, DTYPE, PTX)
    return subtract(weight, zero, DTYPE, PTX)


@triton.jit
def subtract(weight, zero, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Codes less zero points, of equal bias: int32 without PTX, else DTYPE."""
    if PTX == 0:
        weight = weight - zero
    else:
        SM90: tl.constexpr = SUBTRACT_BF16 if PTX >= 90 else SUBTRACT_BF16_FMA
        ASM: tl.constexpr = SM90 if tl.bfloat16 == DTYPE else SUBTRACT_F16
        weight, zero = tl.broadcast(weight, zero)
        weight = tl.inline_asm_elementwise(
            ASM, "=r,r,r", [weight, zero], dtype=tl.int16, is_pure=True, pack=2
        ).to(DTYPE, bitcast=True)
    return weight


@triton.jit
def times_scale(weight, scale, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """weight * scale in DTYPE, rounded once."""
    if PTX != 0 and scale.dtype == DTYPE:
        SM90: tl.constexpr = MULTIPLY_BF16 if PTX >= 90 else MULTIPLY_BF16_FMA
        ASM: tl.constexpr = SM90 if tl.bfloat16 == DTYPE else MULTIPLY_F16
        weight, scale = tl.broadcast(weight, scale)
        weight = tl.inline_asm_elementwise(
            ASM, "=r,r,r", [weight, scale], dtype=tl.int16, is_pure=True, pack=2
        ).to(DTYPE, bitcast=True)
    else:
        weight = narrow(weight.to(tl.float32) * scale.to(tl.float32), DTYPE)
    return weight


@triton.jit
def dot(a, b, acc):
    if INTERPRETED:  # which has no bf16 product
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def wait_for_products():
    """Waits for the tensor cores at the end of a step, where Triton has them run on.

    A sum that only the next step's product uses is one that Triton does not wait for; it then cuts
    the product along K (every 16 rows in 3.6, 32 in 3.9), and unpacks a piece while the one before
    is multiplied. Without this the next step would write registers that are still read (as below).
    """
    tl.inline_asm_elementwise(
        "{ wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1; }",
        "=r,r",
        [tl.zeros([1], tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def combine(
    part, ws_ptr, count_ptr, tile, mine, steps, per, program, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Hand in a partial tile of ``mine`` steps: the whole tile and True for the last to arrive."""
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    first = tile * steps
    # A program's run touches at most two tiles in part: its first (slot 0) and its last (slot 1).
    slot = program * 2 + (program * per < first).to(tl.int32)
    tl.store(ws_ptr + slot.to(tl.int64) * (ROWS * COLS) + at, part)
    tl.debug_barrier()  # the whole program's stores come before the one release below
    before = tl.atomic_add(count_ptr + tile, mine, sem="acq_rel", scope="gpu")
    last = before + mine == steps
    if last:
        part = tl.zeros([ROWS, COLS], tl.float32)
        for p in tl.range(first // per, (first + steps - 1) // per + 1, loop_unroll_factor=4):
            slot = p * 2 + (p * per < first).to(tl.int32)
            # .cg: not from this multiprocessor's L1
            part += tl.load(ws_ptr + slot.to(tl.int64) * (ROWS * COLS) + at, cache_modifier=".cg")
        tl.store(count_ptr + tile, 0)  # as the next launch expects it
    return part, last


@triton.jit
def store_tile(
    out, out_ptr, bias_ptr, scale_ptr, m0, n0, M, N, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Bias, rounding and fake-quantisation of a f32 tile [ROWS of M, COLS of N], and the store."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    m = (m0 + tl.arange(0, ROWS))[:, None]
    n = (n0 + tl.arange(0, COLS))[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    out = narrow(out, DTYPE)
    if scale_ptr is not None:
        out = fake_quant_tile(out, load_scale(scale_ptr, DTYPE))
    tl.store(out_ptr + m.to(tl.int64) * N + n, out, mask=(m < M) & (n < N))


@triton.jit(do_not_specialize=["M", "per"])
def _gemm_kernel(
    x,  # pointer, or with TMA a descriptor of blocks [BM, BK]
    qweight,  # pointer, or with TMA a descriptor of blocks [BK, 8 * BLOCKS]
    scales_ptr,
    qzeros_ptr,
    bias_ptr,
    input_scale_ptr,
    output_scale_ptr,
    out_ptr,
    ws_ptr,
    count_ptr,
    M,
    N,
    WORDS,  # N / f
    K,
    per,  # steps a program takes
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of 8 words
    BK: tl.constexpr,  # divides GROUP
    PIECES: tl.constexpr,  # of BK rows, a step
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    SCALE_SUM: tl.constexpr,  # the scale multiplies the f32 partial sum, else the weight
    # Unpacks rows while those before are multiplied (one piece, not SCALE_SUM, sm_90).
    OVERLAP: tl.constexpr,
    PTX: tl.constexpr,  # compute capability x 10 of an NVIDIA GPU, 0: plain Triton
):
    F2: tl.constexpr = 16 // BITS
    BW: tl.constexpr = 8 * BLOCKS
    BN: tl.constexpr = BW * 2 * F2
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    SCALE: tl.constexpr = scales_ptr.dtype.element_ty
    # The words of a tile on the axes of their codes: q (4), block, 16 rows, h (2), g (8)
    # (, half, row of a pair, j / 2, j % 2).
    block = tl.arange(0, BLOCKS)[None, :, None, None, None]
    g = tl.arange(0, 8)[None, None, None, None, :]
    word_in_tile = block * 8 + g
    # Likewise the scales. A load of fewer elements than threads would be repeated by all of them:
    # then both rows of a pair load.
    ROWS: tl.constexpr = 2 if BN // 2 < WARPS * 32 else 1
    half = tl.arange(0, 2)[None, None, None, None, None, :, None, None]
    row = tl.arange(0, ROWS)[None, None, None, None, None, None, :, None]
    j = tl.arange(0, F2 // 2)[None, None, None, None, None, None, None, :]
    pair_in_tile = (word_in_tile[:, :, :, :, :, None, None, None] * 2 + half) * (F2 // 2) + j
    pair_in_tile += row * 0
    # On the axes of half words alone, where one piece of PTX does all.
    FUSED: tl.constexpr = OVERLAP and BITS == 4 and qzeros_ptr is None and SCALE == DTYPE
    pair_of_half = tl.expand_dims(word_in_tile, 5) * 4 + tl.arange(0, 2) * 2
    n_in_tile = tl.arange(0, BN)
    steps = tl.cdiv(K, BK * PIECES)
    tiles_m = tl.cdiv(M, BM)
    tiles = tl.cdiv(WORDS, BW) * tiles_m
    program = tl.program_id(0)
    at = program * per
    end = tl.minimum(at + per, tiles * steps)
    while at < end:
        tile = at // steps
        begin = at - tile * steps
        until = tl.minimum(steps, begin + end - at)
        tile_n = tile // tiles_m
        tile_m = tile - tile_n * tiles_m
        acc = tl.zeros([BN, BM], tl.float32)
        for step in tl.range(begin, until, num_stages=STAGES):
            for piece in tl.static_range(PIECES):
                k0 = (step * PIECES + piece) * BK
                # Rows past K: their x is zero; their scale must only be a number.
                group = tl.minimum(k0, K - 1) // GROUP if PIECES > 1 else k0 // GROUP
                if TMA:  # which gives zeros outside
                    words = qweight.load([k0, tile_n * BW])
                    a = x.load([tile_m * BM, k0])
                else:
                    k = k0 + tl.arange(0, BK)
                    c = (tile_n * BW + tl.arange(0, BW))[None, :]
                    m = (tile_m * BM + tl.arange(0, BM))[:, None]
                    inside = (k[:, None] < K) & (c < WORDS)
                    words = tl.load(qweight + k[:, None] * WORDS + c, mask=inside, other=0)
                    inside = (m < M) & (k[None, :] < K)
                    a = tl.load(x + m.to(tl.int64) * K + k[None, :], mask=inside, other=0.0)
                if input_scale_ptr is not None:
                    a = fake_quant_tile(a, load_scale(input_scale_ptr, DTYPE))
                words = tl.reshape(words, [BK // 16, 2, 4, 2, BLOCKS, 8])
                low, high = tl.split(tl.permute(words, (2, 4, 0, 1, 5, 3)))
                if FUSED:
                    pair = tile_n * (BN // 2) + pair_of_half
                    pairs_ptr = scales_ptr.to(tl.pointer_type(tl.int32)) + group * (N // 2)
                    pairs01 = tl.load(pairs_ptr + pair, mask=pair < N // 2, other=0)
                    pairs23 = tl.load(pairs_ptr + pair + 1, mask=pair < N // 2, other=0)
                    weight = _scaled(low, high, pairs01, pairs23, DTYPE)
                else:
                    zero = None
                    if qzeros_ptr is not None:
                        c = tile_n * BW + word_in_tile
                        zero = tl.load(qzeros_ptr + group * WORDS + c, mask=c < WORDS, other=0)
                    weight = _unpack(low, high, BITS, DTYPE, PTX)
                    weight = _minus_zero(weight, zero, BITS, DTYPE, PTX)
                weight = tl.reshape(weight, [4, BLOCKS, BK // 16, 2, 8, 2, 2, F2 // 2, 2])
                if SCALE_SUM:
                    n = tile_n * BN + n_in_tile
                    if SCALE.primitive_bitwidth == 16:
                        # Asynchronous copies move 4 bytes or more: a scale and its neighbour.
                        pairs_ptr = scales_ptr.to(tl.pointer_type(tl.int32)) + group * (N // 2)
                        pairs = tl.load(pairs_ptr + n // 2, mask=n < N, other=0)
                        scale = (pairs >> (n % 2 * 16)).to(tl.int16).to(SCALE, bitcast=True)
                    else:
                        scale = tl.load(scales_ptr + group * N + n, mask=n < N, other=0.0)
                    scale = tl.reshape(scale, [BLOCKS, 8, 2, F2 // 2, 2])
                    scale = tl.reshape(tl.permute(scale, (3, 0, 2, 4, 1)), [BN, 1])
                    if PTX == 0:
                        weight = weight.to(tl.float32).to(DTYPE)
                elif not FUSED:
                    pair = tile_n * (BN // 2) + pair_in_tile
                    if SCALE.primitive_bitwidth == 16:
                        pairs_ptr = scales_ptr.to(tl.pointer_type(tl.int32)) + group * (N // 2)
                        pairs = tl.load(pairs_ptr + pair, mask=pair < N // 2, other=0)
                        scale = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
                        scale = scale.to(SCALE, bitcast=True)
                    else:
                        n = tl.expand_dims(pair * 2, 8) + tl.arange(0, 2)
                        scale = tl.load(scales_ptr + group * N + n, mask=n < N, other=0.0)
                    weight = times_scale(weight, scale, DTYPE, PTX)
                # n' = (j / 2, block, half, j % 2, g), k = (r, h, q, row)
                weight = tl.permute(weight, (7, 1, 5, 8, 4, 2, 3, 0, 6))
                weight = tl.reshape(weight, [BN, BK])
                if SCALE_SUM:
                    part = dot(weight, tl.trans(a), tl.zeros([BN, BM], tl.float32))
                    acc += part * scale.to(tl.float32)
                else:
                    acc = dot(weight, tl.trans(a), acc)
                    if OVERLAP:
                        wait_for_products()
                    elif PTX != 0:
                        # An empty use of the sum makes Triton wait for the product here. Left to
                        # itself it lets the next step overwrite the weight's registers while they
                        # are being read (triton-lang/triton#9433; fixed by ptxas 13.3).
                        acc = tl.inline_asm_elementwise(
                            "", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1
                        )
        whole = until - begin == steps
        if SPLIT:  # noqa: SIM102 - resolved when compiled: there is no workspace otherwise
            if not whole:
                acc, whole = combine(
                    acc, ws_ptr, count_ptr, tile, until - begin, steps, per, program, BN, BM
                )
        if whole:
            out = tl.reshape(acc, [F2 // 2, BLOCKS, 2, 2, 8, BM])
            out = tl.reshape(tl.permute(out, (5, 1, 4, 2, 0, 3)), [BM, BN])
            store_tile(
                out, out_ptr, bias_ptr, output_scale_ptr, tile_m * BM, tile_n * BN, M, N, BM, BN
            )
        at += until - begin


@triton.jit
def _dequantize_kernel(
    qweight_ptr,
    scales_ptr,
    qzeros_ptr,
    out_ptr,
    N,
    WORDS,
    K,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BW: tl.constexpr,
    ONE_GROUP: tl.constexpr,  # ROWS divides GROUP
):
    F: tl.constexpr = 32 // BITS
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    k0 = tl.program_id(1) * ROWS
    word = tl.program_id(0) * BW + tl.arange(0, BW)[None, :]
    n = tl.program_id(0) * (BW * F) + tl.arange(0, BW * F)[None, :]
    k = k0 + tl.arange(0, ROWS)[:, None]
    shifts = tl.arange(0, F) * BITS
    inside = (k < K) & (word < WORDS)
    codes = tl.load(qweight_ptr + k.to(tl.int64) * WORDS + word, mask=inside, other=0)
    codes = (codes[:, :, None] >> shifts) & ((1 << BITS) - 1)
    if ONE_GROUP:
        group = k0 // GROUP + tl.zeros([1, 1], tl.int32)
    else:
        group = k // GROUP
    group = group.to(tl.int64)
    inside = (group * GROUP < K) & (n < N)
    scale = tl.load(scales_ptr + group * N + n, mask=inside, other=0.0).to(tl.float32)
    if qzeros_ptr is None:
        zero = 1 << (BITS - 1)
    else:
        inside = (group * GROUP < K) & (word < WORDS)
        zero = tl.load(qzeros_ptr + group * WORDS + word, mask=inside, other=0)
        zero = (zero[:, :, None] >> shifts) & ((1 << BITS) - 1)
    weight = tl.reshape((codes - zero).to(tl.float32), [ROWS, BW * F]) * scale
    inside = (k < K) & (n < N)
    tl.store(out_ptr + k.to(tl.int64) * N + n, narrow(weight, DTYPE), mask=inside)


def _ceil_div(a: int, b: int) -> int:
    # triton.cdiv reads Triton's settings on every call: several microseconds each
    return -(-a // b)


def steps_a_program(tiles: int, steps: int, programs: int) -> int:
    """Steps that each of so many programs takes of tiles of ``steps``; programs = 0: a tile's.

    Where little more makes the most of them part of one tile, it is taken: a program that ends one
    tile and begins the next fills its pipeline and hands in a sum twice.
    """
    if programs == 0:
        return steps
    per = _ceil_div(tiles * steps, programs)
    if per >= steps:
        return per
    whole = _ceil_div(steps, steps // per)
    return whole if whole * 16 <= per * 17 else per


@dataclass(frozen=True)
class Tiles:
    """Tiles of the fused kernel: BN = 8 * blocks * f. programs = 0: a program a tile."""

    block_m: int
    blocks: int
    block_k: int
    pieces: int
    warps: int
    stages: int
    programs: int  # a multiprocessor
    scale_sum: bool
    overlap: bool = False  # Hopper, one piece, the scale on the weight


@dataclass(frozen=True)
class Dense:
    """Dequantise to [K, N], then torch's product."""


Config = Tiles | Dense

#: The fewest rows of x in a tensor-core product: Triton 3.4 takes 16 or more.
FEWEST_ROWS = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5) else 16


#: What a 128 x 128 tile takes for 64 of K, two tiles at once on a multiprocessor.
_STEP_SECONDS = 0.94e-6


def programs_of_many_rows(
    m: int, n: int, k: int, multiprocessors: int, step_seconds: float = _STEP_SECONDS
) -> int | None:
    """How 128 x 128 tiles are dealt: 0, a program each; 2 a multiprocessor, each an equal run of
    steps; None where to dequantise in a pass of its own before torch's product takes less.

    By what an H200 was seen to do: ``step_seconds`` for 64 of K, a quarter more where a run ends
    amid a tile, 11 us to hand sums in; a pass at 3.9 TB/s, a product at 700 TFLOP/s.
    """
    rows, steps = _ceil_div(m, 128), _ceil_div(k, 64)
    tiles = rows * _ceil_div(n, 128)
    whole = _ceil_div(tiles, 2 * multiprocessors) * steps * step_seconds
    per = steps_a_program(tiles, steps, 2 * multiprocessors)
    runs = per * step_seconds * (1.25 if steps % per else 1) + 11e-6
    dense = 2.5 * n * k / 3.9e12 + 2 * 128 * rows * n * k / 700e12
    if dense < min(whole, runs):
        return None
    return 0 if whole <= runs else 2


def select(m: int, n: int, k: int, bits: int, group_size: int, multiprocessors: int) -> Config:
    """The kernel and its tiles for one problem on a Hopper GPU.

    Measured for groups of 128, bf16 on an H200 (132 multiprocessors; tests/bench/tune_mm.py).
    """
    part = largest_part(group_size)
    wide_n = n >= 128 * multiprocessors
    if not part or (m > (768 if wide_n else 384) and bits != 4):
        return Dense()
    narrow, wide = {2: (2, 2), 4: (2, 4), 8: (4, 4)}[bits]  # 128 and 256 columns where they fit
    if m <= 16 and n * k <= 1 << 24 and bits == 4:
        return Tiles(FEWEST_ROWS if m <= 8 else 16, wide, part, 1, 8, 3, 1, True)
    if m <= 8:
        programs = 3 if wide_n or k <= 4096 < n else 2
        return Tiles(FEWEST_ROWS, wide, part, 1, 4, 3, programs, True)
    if m <= 16:
        return Tiles(16, wide, part, 1, 4, 4 if wide_n else 3, 2, True)
    half = min(part, 64)  # for the tiles that fill the registers
    if bits == 2 and m > 32:
        return Tiles(64, narrow, half, 1, 4, 3, 0 if wide_n else 2, False)
    if m <= 32:
        return Tiles(32, narrow, part, 1, 4, 3, 0 if wide_n else 2, False)
    if bits == 4:
        return _select_int4(m, n, k, part, half, multiprocessors)
    if m <= 64:
        return Tiles(64, narrow, part, 1, 4, 3, 0 if wide_n else 2, False)
    if _ceil_div(n, 128) * _ceil_div(m, 128) >= 2 * multiprocessors:
        return Tiles(128, narrow, half, 1, 4, 3, 0, False)
    if bits == 8 and m > 128:
        return Dense()
    return Tiles(64, narrow, part, 1, 4, 3, 2, False)


def _select_int4(m: int, n: int, k: int, part: int, half: int, multiprocessors: int) -> Config:
    """More than 32 rows of x."""
    small = n * k <= 1 << 24
    if m <= 64:
        programs = 0 if n >= 128 * multiprocessors else 1 if small else 2
        return Tiles(64, 2, part, 1, 4, 3 if small else 4, programs, False, True)
    many = _ceil_div(n, 128) * _ceil_div(m, 128) >= 1.5 * multiprocessors
    if many or m > 384:
        # Runs that end amid tiles take no less here than the pass of its own.
        if m > 256 and programs_of_many_rows(m, n, k, multiprocessors) != 0:
            return Dense()
        return Tiles(128, 2, half, 1, 4, 4, 0, False)
    if m <= 192 or small:
        return Tiles(64, 2, part, 1, 4, 4, 2, False, True)
    return Tiles(128, 4, part, 1, 8, 4, 1, False, True)


def largest_part(group_size: int) -> int:
    """Rows of K a step, which divide the group (0: any do); 0 where none do."""
    return next((part for part in (128, 64, 32, 16) if group_size % part == 0), 0)


def select_elsewhere(m: int, group_size: int, bits: int) -> Config:
    """The same for any other device, in at most 64 KiB of shared memory; not measured."""
    part = next((p for p in (64, 32, 16) if group_size % p == 0), 0)
    if not part or m > 256:
        return Dense()
    narrow, wide = {2: (2, 2), 4: (2, 4), 8: (4, 4)}[bits]
    if m <= 16:
        return Tiles(16, wide, part, 1, 4, 2, 2, True)
    return Tiles(32 if m <= 32 or bits == 2 else 64, narrow, part, 1, 4, 2, 2, False)


class Counters:
    """Zeroed arrival counters, one a tile; every kernel leaves them at zero.

    Launches of one stream follow one another and share counters. A captured launch may be replayed
    on any stream beside anything: it gets counters of its own, from a reserve that is zeroed
    outside the capture, or, once that is used up, a fresh tensor whose zeroing is captured too.
    """

    RESERVE = 1 << 20

    def __init__(self) -> None:
        self._streams: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._reserves: dict[torch.device, torch.Tensor] = {}

    def get(self, device: torch.device, count: int) -> torch.Tensor:
        if device.type == "cpu":
            return torch.zeros(count, dtype=torch.int32)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing:
            # Whole 16 bytes: Triton would compile once more for a pointer that is less aligned.
            count = _ceil_div(count, 4) * 4
            reserve = self._reserves.get(device)
            if reserve is None or reserve.numel() < count:
                return torch.zeros(count, dtype=torch.int32, device=device)
            self._reserves[device] = reserve[count:]
            return reserve[:count]
        if device.type == "cuda" and device not in self._reserves:
            self._reserves[device] = torch.zeros(self.RESERVE, dtype=torch.int32, device=device)
            torch.cuda.synchronize(device)
        key = (device, torch.accelerator.current_stream(device).stream_id)
        counters = self._streams.get(key)
        if counters is None or counters.numel() < count:
            size = max(count, 4096)
            counters = torch.zeros(size, dtype=torch.int32, device=device)
            self._streams[key] = counters
        return counters


COUNTERS = Counters()


def dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight, transposed: [K, N] in ``dtype`` from the arguments of ``wna16_gemm``."""
    k, words = qweight.shape
    n = scales.shape[1]
    out = torch.empty((k, n), dtype=dtype, device=qweight.device)
    rows, block = 16, 8 * bits
    grid = (_ceil_div(words, block), _ceil_div(k, rows))
    with on_device(qweight.device):
        _dequantize_kernel[grid](
            qweight,
            scales,
            qzeros,
            out,
            n,
            words,
            k,
            BITS=bits,
            GROUP=group_size,
            ROWS=rows,
            BW=block,
            ONE_GROUP=group_size % rows == 0,
            num_warps=2,
        )
    return out


def gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    input_scale: torch.Tensor | None = None,
    output_scale: torch.Tensor | None = None,
    config: Config | None = None,
    tma: bool | None = None,
) -> torch.Tensor:
    """``wna16_gemm`` on arguments already checked; ``config`` overrides :func:`select`."""
    lead, k = x.shape[:-1], x.shape[-1]
    x = x.reshape(-1, k)
    m, words = x.shape[0], qweight.shape[1]
    n = scales.shape[1]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out.view(*lead, n)
    sms = count_multiprocessors(x.device)
    ptx = compute_capability(x.device)
    if config is None:
        if qweight.numel() >= 1 << 31:  # the fused kernel indexes words with 32 bits
            config = Dense()
        elif ptx == 90:
            config = select(m, n, k, bits, group_size, sms)
        else:
            config = select_elsewhere(m, group_size, bits)
    if isinstance(config, Dense):
        if input_scale is not None:
            x = fake_quant(x, input_scale)
        weight = dequantize(
            qweight, scales, qzeros, bits=bits, group_size=group_size, dtype=x.dtype
        )
        if bias is None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(bias.to(x.dtype), x, weight, out=out)
        out = out if output_scale is None else fake_quant(out, output_scale)
        return out.view(*lead, n)

    if input_scale is not None and config.block_m > 16:
        x = fake_quant(x, input_scale)
        input_scale = None
    block_w = 8 * config.blocks
    block_n = block_w * (32 // bits)
    tiles = _ceil_div(n, block_n) * _ceil_div(m, config.block_m)
    steps = _ceil_div(k, config.block_k * config.pieces)
    per = steps_a_program(tiles, steps, config.programs * sms)
    grid = (_ceil_div(tiles * steps, per),)
    split = per % steps != 0
    partial: torch.Tensor | None = None
    counters: torch.Tensor | None = None
    if split:
        size = 2 * grid[0] * block_n * config.block_m
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
        counters = COUNTERS.get(x.device, tiles)
    if scales.data_ptr() % 4:  # a view into a larger buffer: scales are read in pairs
        scales = scales.clone()
    if tma is None:
        tma = ptx >= 90 and tma_addressable(x) and tma_addressable(qweight)
    with on_device(x.device):
        _gemm_kernel[grid](
            TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]) if tma else x,
            TensorDescriptor.from_tensor(qweight, [config.block_k, block_w]) if tma else qweight,
            scales,
            qzeros,
            bias,
            input_scale,
            output_scale,
            out,
            partial,
            counters,
            m,
            n,
            words,
            k,
            per,
            BITS=bits,
            GROUP=group_size,
            BM=config.block_m,
            BLOCKS=config.blocks,
            BK=config.block_k,
            PIECES=config.pieces,
            WARPS=config.warps,
            STAGES=config.stages,
            SPLIT=split,
            TMA=tma,
            SCALE_SUM=config.scale_sum,
            OVERLAP=config.overlap and ptx == 90,
            PTX=ptx,
            num_warps=config.warps,
        )
    return out.view(*lead, n)


@functools.cache
def compute_capability(device: torch.device) -> int:
    """Compute capability x 10 where the kernels may use PTX (NVIDIA from sm_80), else 0."""
    if INTERPRETED.value or device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor if major >= 8 else 0


count_multiprocessors = functools.cache(multiprocessors)


def tma_addressable(tensor: torch.Tensor) -> bool:
    """Whether a TMA descriptor can address a contiguous matrix."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0
