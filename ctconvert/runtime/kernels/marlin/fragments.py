"""A second kernel on INT4 Marlin tiles: words straight into the tensor cores' fragments.

Before and after are ``kernel.py``'s, b = 4. A word of a tile holds the codes that one lane of a
warp has of a 16 x 16 operand: with w the word's place among the 128 of a tile's 64 columns, i the
code's in the word, and bit X of k % 16 and n % 64 being kX and nX::

    w6 ... w0 = n2 n1 n0 k2 k1 n5 n4        i2 i1 i0 = k0 n3 k3

Lane (g, q) = (n2 n1 n0, k2 k1) has rows g and g + 8 (n3) and columns 2q, 2q + 1, 2q + 8, 2q + 9
(k3, k0) of the fragment of ``W [n, k]``, the left operand of ``W @ x^T``: no code changes its
lane, K keeps its order and x is read as it is. k0 is at bit 16, so one LOP3 makes a pair of 16-bit
floats of two codes (``wna16/triton.py`` says how, and how the work is cut along K). N is in the
order n4, block of 64, n5, n3, g until the result is stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ctconvert.runtime.kernels.wna16.triton import (
    COUNTERS,
    FEWEST_ROWS,
    combine,
    compute_capability,
    count_multiprocessors,
    dot,
    largest_part,
    pairs_of_one,
    programs_of_many_rows,
    steps_a_program,
    store_tile,
    subtract,
    times_scale,
    tma_addressable,
    wait_for_products,
)
from ctconvert.transforms.device import on_device


def _unpack_asm(bf16: bool, scaled: bool = False) -> str:
    """PTX of :func:`_unpack`: pair (k0) s of n3 k3 to outputs 2s and 2s + 1.

    scaled: less the zero of symmetric codes and times operand 9 or 10, a pair of one scale.
    """
    magic = 0x43004300 if bf16 else 0x64006400
    kind = "bf16x2" if bf16 else "f16x2"
    lines = [".reg .b32 a, t, z;", "mov.b32 a, $8;", f"mov.b32 z, {magic + 0x80008:#010x};"]
    for s in range(4):
        if s:
            lines.append("shr.u32 a, a, 4;")
        lines.append(f"lop3.b32 t, a, 0x000f000f, {magic:#010x}, 0xea;")
        if scaled:
            lines.append(f"sub.{kind} t, t, z; mul.{kind} t, t, ${9 + s // 2};")
        lines.append(f"mov.b32 {{${2 * s}, ${2 * s + 1}}}, t;")
    return "{ " + " ".join(lines) + " }"


UNPACK_BF16 = tl.constexpr(_unpack_asm(True))
UNPACK_F16 = tl.constexpr(_unpack_asm(False))
SCALED_BF16 = tl.constexpr(_unpack_asm(True, True))
SCALED_F16 = tl.constexpr(_unpack_asm(False, True))
OPERANDS = tl.constexpr("=h," * 8 + "r")
OPERANDS_SCALED = tl.constexpr("=h," * 8 + "r,r,r")


@triton.jit
def _join(o):
    """Of the pairs s of n3 k3: [..., k0, k3, n3]."""
    return tl.join(
        tl.join(tl.join(o[0], o[1]), tl.join(o[2], o[3])),
        tl.join(tl.join(o[4], o[5]), tl.join(o[6], o[7])),
    )


@triton.jit
def _unpack(words, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Words [...] -> [..., k0, k3, n3]: code + 128 (bf16), + 1024 (f16); without PTX int32."""
    if PTX == 0:
        codes = tl.join(words, words >> 16)
        codes = tl.join(codes, codes >> 4)
        codes = tl.join(codes, codes >> 8) & 15
    else:
        ASM: tl.constexpr = UNPACK_BF16 if tl.bfloat16 == DTYPE else UNPACK_F16
        o = tl.inline_asm_elementwise(
            ASM, OPERANDS, [words], dtype=(tl.int16,) * 8, is_pure=True, pack=1
        )
        codes = _join(o).to(DTYPE, bitcast=True)
    return codes


@triton.jit
def _scaled(words, pairs, DTYPE: tl.constexpr):
    """Words [...] of symmetric codes, and the scales of both n3 -> weights [..., k0, k3, n3].

    In one piece of PTX: the compiler would make a pair of one scale anew for each two weights.
    """
    scale0, scale1 = pairs_of_one(pairs)
    ASM: tl.constexpr = SCALED_BF16 if tl.bfloat16 == DTYPE else SCALED_F16
    o = tl.inline_asm_elementwise(
        ASM,
        OPERANDS_SCALED,
        [words, scale0, scale1],
        dtype=(tl.int16,) * 8,
        is_pure=True,
        pack=1,
    )
    return _join(o).to(DTYPE, bitcast=True)


@triton.jit(do_not_specialize=["M", "per"])
def _fragments_kernel(
    x,  # pointer, or with TMA a descriptor of blocks [BM, BK]
    qweight,  # pointer, or with TMA a descriptor of blocks [BK / 16, 128 * BLOCKS]
    scales_ptr,
    qzeros_ptr,
    bias_ptr,
    out_ptr,
    ws_ptr,
    count_ptr,
    M,
    N,
    K,
    per,  # steps a program takes
    GROUP: tl.constexpr,  # 0: channel-wise, and the scale multiplies the result
    BM: tl.constexpr,
    BLOCKS: tl.constexpr,  # of 64 columns
    BK: tl.constexpr,  # divides GROUP
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    SCALE_SUM: tl.constexpr,  # the scale multiplies the f32 partial sum, else the weight
    OVERLAP: tl.constexpr,
    PTX: tl.constexpr,  # as in wna16
):
    BN: tl.constexpr = 64 * BLOCKS
    KT: tl.constexpr = BK // 16
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    SCALE: tl.constexpr = scales_ptr.dtype.element_ty
    # Scales and zero points on the axes of the codes: tile, block, g, q, n5, n4, k0, k3, n3. A load
    # of fewer elements than threads would be repeated by all of them: then both k0 load.
    ROWS: tl.constexpr = 2 if BN // 2 < WARPS * 32 else 1
    block = tl.arange(0, BLOCKS)[None, :, None, None, None, None, None, None]
    g = tl.arange(0, 8)[None, None, :, None, None, None, None, None]
    n5 = tl.arange(0, 2)[None, None, None, None, :, None, None, None]
    n4 = tl.arange(0, 2)[None, None, None, None, None, :, None, None]
    k0 = tl.arange(0, ROWS)[None, None, None, None, None, None, :, None]
    pair_in_tile = block * 32 + g * 4 + n5 * 2 + n4 + k0 * 0  # of n3, neighbours where scales are
    zero_in_tile = block * 8 + g + (n5 + n4 + k0) * 0
    zero_shift = (n5 * 2 + n4) * 4 + (block + g + k0) * 0
    # On the axes of the words alone, where one piece of PTX does all.
    FUSED: tl.constexpr = (
        qzeros_ptr is None and PTX >= 90 and GROUP > 0 and not SCALE_SUM and SCALE == DTYPE
    )
    pair_of_word = tl.arange(0, BLOCKS)[None, :, None, None, None, None] * 32
    pair_of_word += tl.arange(0, 8)[None, None, :, None, None, None] * 4
    pair_of_word += tl.arange(0, 2)[None, None, None, None, :, None] * 2
    pair_of_word += tl.arange(0, 2)[None, None, None, None, None, :]
    # The same along the rows of the product.
    row = tl.arange(0, BN)
    row_n4 = row // (32 * BLOCKS)
    row_block = row // 32 % BLOCKS
    row_n3 = row // 8 % 2
    row_pair = row_block * 32 + row % 8 * 4 + row // 16 % 2 * 2 + row_n4

    steps = tl.cdiv(K, BK)
    tiles_m = tl.cdiv(M, BM)
    tiles = tl.cdiv(N, BN) * tiles_m
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
            # Rows past K: their x is zero.
            group = step * BK // GROUP if GROUP > 0 else 0
            if TMA:  # which gives zeros outside
                words = qweight.load([step * KT, tile_n * (2 * BN)])
                a = x.load([tile_m * BM, step * BK])
            else:
                t = (step * KT + tl.arange(0, KT))[:, None]
                c = (tile_n * (2 * BN) + tl.arange(0, 2 * BN))[None, :]
                k = (step * BK + tl.arange(0, BK))[None, :]
                m = (tile_m * BM + tl.arange(0, BM))[:, None]
                inside = (t < K // 16) & (c < 2 * N)
                words = tl.load(qweight + t * (2 * N) + c, mask=inside, other=0)
                a = tl.load(x + m.to(tl.int64) * K + k, mask=(m < M) & (k < K), other=0.0)
            words = tl.reshape(words, [KT, BLOCKS, 8, 4, 2, 2])
            if FUSED:
                pair = tile_n * (BN // 2) + pair_of_word
                pairs_ptr = scales_ptr.to(tl.pointer_type(tl.int32)) + group * (N // 2)
                pairs = tl.load(pairs_ptr + pair, mask=pair < N // 2, other=0)
                weight = _scaled(words, pairs, DTYPE)
            else:
                weight = _unpack(words, DTYPE, PTX)
                BIAS: tl.constexpr = 0 if PTX == 0 else (128 if tl.bfloat16 == DTYPE else 1024)
                if qzeros_ptr is None:
                    zero = tl.full([1] * 9, 8 + BIAS, tl.int32)
                else:
                    at_zero = tile_n * (8 * BLOCKS) + zero_in_tile
                    zero = tl.load(
                        qzeros_ptr + group * (N // 8) + at_zero, mask=at_zero < N // 8, other=0
                    )
                    zero = tl.join(zero >> zero_shift, zero >> (zero_shift + 16)) & 15
                    zero += BIAS
                if PTX:
                    zero = zero.to(tl.float32).to(DTYPE)
                weight = subtract(weight, zero, DTYPE, PTX)
                if GROUP > 0 and not SCALE_SUM:
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
                elif PTX == 0:
                    weight = weight.to(tl.float32).to(DTYPE)
            if BM < 16:
                # No wgmma: Triton gives a lane four neighbours along K, so they must be its own.
                weight = tl.permute(weight, (5, 1, 4, 8, 2, 0, 3, 7, 6))
                a = tl.permute(tl.reshape(a, [BM, KT, 2, 4, 2]), (0, 1, 3, 2, 4))
                a = tl.reshape(a, [BM, BK])
            else:
                weight = tl.permute(weight, (5, 1, 4, 8, 2, 0, 7, 3, 6))
            weight = tl.reshape(weight, [BN, BK])
            if GROUP > 0 and SCALE_SUM:
                pair = tile_n * (BN // 2) + row_pair
                if SCALE.primitive_bitwidth == 16:
                    pairs_ptr = scales_ptr.to(tl.pointer_type(tl.int32)) + group * (N // 2)
                    pairs = tl.load(pairs_ptr + pair, mask=pair < N // 2, other=0)
                    scale = (pairs >> (row_n3 * 16)).to(tl.int16).to(SCALE, bitcast=True)
                else:
                    n = pair * 2 + row_n3
                    scale = tl.load(scales_ptr + group * N + n, mask=n < N, other=0.0)
                part = dot(weight, tl.trans(a), tl.zeros([BN, BM], tl.float32))
                acc += part * scale.to(tl.float32)[:, None]
            else:
                acc = dot(weight, tl.trans(a), acc)
                if OVERLAP:
                    wait_for_products()
                elif PTX != 0:  # as in wna16: Triton is to wait for the product here
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
            out = tl.reshape(acc, [2, BLOCKS, 2, 2, 8, BM])
            out = tl.reshape(tl.permute(out, (5, 1, 2, 0, 3, 4)), [BM, BN])
            if GROUP == 0:
                # Column n4 n3 n2 n1 n0 of 32 stands at n2 n1 n4 n3 n0.
                n = tile_n * BN + tl.arange(0, BN)
                stored = n // 32 * 32 + n % 8 // 2 * 8 + n % 32 // 8 * 2 + n % 2
                out *= tl.load(scales_ptr + stored, mask=n < N, other=0.0).to(tl.float32)[None, :]
            store_tile(out, out_ptr, bias_ptr, None, tile_m * BM, tile_n * BN, M, N, BM, BN)
        at += until - begin


class Fragments(NamedTuple):
    """Tiles of this kernel. ``programs`` are a multiprocessor's; 0: a program a tile.

    With zero points ``scale_sum`` is slow: Triton then passes the weight through shared memory.
    """

    block_m: int
    blocks: int  # of 64 columns
    block_k: int  # divides the group
    warps: int
    stages: int
    programs: int
    scale_sum: bool
    overlap: bool = False  # Hopper, the scale not on the sum


def select(
    m: int, n: int, k: int, group_size: int, zeros: bool, multiprocessors: int
) -> Fragments | None:
    """Tiles for [m, k] x [n, k] on a Hopper GPU; None: dequantise first.

    ``group_size`` is 0 where a scale is a whole column's. Measured in bf16 on an H200 (132
    multiprocessors; tests/bench/tune_mm.py), for groups of 128 most.
    """
    part = largest_part(group_size)
    small = n * k <= 1 << 24
    wide = n >= 128 * multiprocessors
    if m <= 16:
        return _select_few(m, part, zeros, small, wide)
    if m <= 32:
        return Fragments(32, 2, part, 4, 4, 3 if part <= 32 else 0 if wide else 2, False)
    if small and m <= 128:
        if (m <= 64 and part <= 32) or (m > 64 and part <= 64) or zeros:
            return Fragments(64, 2, part, 4, 4, 2, False, True)
        return Fragments(64, 1, part, 4, 3, 2, False)
    if m <= 64:
        return Fragments(64, 2, part, 4, 4, 0 if wide else 2, False)
    many = -(-n // 128) * -(-m // 128) >= 1.5 * multiprocessors
    if m > (128 if part <= 32 else 256):
        # What a step takes with more scales, and with zero points.
        step = 0.87e-6 * {16: 2.5, 32: 1.34}.get(part, 1) * (1.13 if zeros else 1)
        programs = programs_of_many_rows(m, n, k, multiprocessors, step)
        if programs is None or (part <= 32 and not many):
            return None
        return Fragments(128, 2, min(part, 64), 4, 4, programs, False, True)
    if many:
        return Fragments(128, 2, min(part, 64), 4, 4, 0, False, True)
    if m > 192 and not small:
        blocks, rows = (4, 128) if zeros else (2, 256)
        return Fragments(rows, blocks, part, 8, 3, 1, False, True)
    if 128 < m <= 192 and not zeros and part >= 64:
        return Fragments(64, 2, 64, 4, 4, 3, False, True)
    return Fragments(64, 2, part, 4, 3, 2, False, small or part <= 64)


def _select_few(m: int, part: int, zeros: bool, small: bool, wide: bool) -> Fragments:
    """Of at most 16 rows of x."""
    rows = FEWEST_ROWS if m <= 8 else 16
    if zeros:
        if not small and part == 128:
            return Fragments(16, 2, part, 4, 4, 2, False)
        return Fragments(rows, 2, part, 4, 3 if wide else 4, 4 if wide else 2, False)
    if small:
        return Fragments(rows, *((2, part, 4, 4, 2) if m <= 8 else (1, part, 4, 4, 4)), True)
    if part < 128:
        return Fragments(rows, 4, part, 4, 4, 2, True)
    return Fragments(rows, 2, part, 4, 3 if wide else 4, 4 if wide else 2, True)


def gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    n: int,
    group_size: int,
    config: Fragments,
    tma: bool | None = None,
) -> torch.Tensor:
    """x [M, K], M > 0, in the order of the tiles, to [M, N] in x's dtype; the rest as
    ``marlin_gemm``'s, already checked.
    """
    m, k = x.shape
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    sms, ptx = count_multiprocessors(x.device), compute_capability(x.device)
    block_n = 64 * config.blocks
    tiles = -(-n // block_n) * -(-m // config.block_m)
    steps = -(-k // config.block_k)
    per = steps_a_program(tiles, steps, config.programs * sms)
    grid = (-(-tiles * steps // per),)
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
    words = [config.block_k // 16, 2 * block_n]
    with on_device(x.device):
        _fragments_kernel[grid](
            TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]) if tma else x,
            TensorDescriptor.from_tensor(qweight, words) if tma else qweight,
            scales,
            qzeros,
            bias,
            out,
            partial,
            counters,
            m,
            n,
            k,
            per,
            GROUP=0 if scales.shape[0] == 1 else group_size,
            BM=config.block_m,
            BLOCKS=config.blocks,
            BK=config.block_k,
            WARPS=config.warps,
            STAGES=config.stages,
            SPLIT=split,
            TMA=tma,
            SCALE_SUM=config.scale_sum,
            OVERLAP=config.overlap and ptx == 90,
            PTX=ptx,
            num_warps=config.warps,
        )
    return out
