"""Triton kernels that read Marlin tiles directly.

Before: ``qweight`` i32 [K/16, N*16/f], f = 32/b codes a word. With w the index of a word inside
its run of 1024 codes (64 columns of one 16-row tile) and i the place of a code inside its word,
the layout is a permutation of address bits (bit X of k % 16 is kX, of n % 64 is nX):

    b = 4:  w6 w5 w4 w3 w2 w1 w0 = n2 n1 n0 k2 k1 n5 n4        i2 i1 i0 = k0 n3 k3
    b = 8:  w7 ... w0            = n2 n1 n0 k2 k1 n5 n4 n3     i1 i0    = k0 k3

After: nothing is unpacked. A tile of words [rows, KT*4] is loaded with the address permutation
above: its rows are the n bits of w, its columns the 16-row tile and k2 k1. Each of the four
values of (k3, k0) then is one shift of the whole tile and one slice of K, and with b = 4 each
value of n3 is one of two accumulators, so every dot product takes the words in the registers
they were loaded into. The activations are permuted to match ([M, K] to [M, (k3, k0), K/4], by
one small kernel that applies the act-order permutation as well), and the accumulator's rows are
put back in order once, before they are stored.

The product is computed transposed, out.T = W @ x.T: Hopper's wgmma takes its left operand from
registers, which is where the weight is dequantised.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ctconvert.runtime.kernels.fake_quant.triton import narrow
from ctconvert.runtime.kernels.hardware import has_large_shared_memory, multiprocessors
from ctconvert.transforms.device import on_device

_E2M1 = tl.constexpr(16)  # KIND of the weight's codes: a 4-bit float, or an integer of BITS bits


@triton.jit
def _permute_activations(
    x_ptr,
    index_ptr,
    out_ptr,
    total,
    K,
    HAS_INDEX: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[m, p, q] = x[m, index[k]], with q = (k // 16, k2 k1) and p = (k3, k0).

    With two parts, bf16(x) goes to the first M rows and what it leaves of an f16 x, also exact
    in bf16, to the M rows after.
    """
    row = tl.program_id(0).to(tl.int64) * K
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o < K
    p = o // (K // 4)
    q = o % (K // 4)
    k = (q // 4) * 16 + (p // 2) * 8 + (q % 4) * 2 + p % 2
    if HAS_INDEX:
        k = tl.load(index_ptr + k, mask=mask, other=0)
    x = tl.load(x_ptr + row + k, mask=mask, other=0.0)
    high = x.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row + o, high, mask=mask)
    if PARTS == 2:
        rest = x.to(tl.float32) - high.to(tl.float32)
        rest = tl.where(tl.abs(high.to(tl.float32)) == float("inf"), 0.0, rest)
        tl.store(out_ptr + total + row + o, rest.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _int_values(words, SHIFT: tl.constexpr, BITS: tl.constexpr, scale, zero):
    """(code - zero) * scale of the code at SHIFT of each word; zero comes multiplied by scale.

    The code is masked where it stands: it is then 2**SHIFT too large, exactly, and so is
    divided out of the scale once for a row instead of being shifted once for a weight.
    """
    code = words & (((1 << BITS) - 1) << SHIFT)
    return code.to(tl.float32) * (scale * (1.0 / (1 << SHIFT))) - zero


@triton.jit
def _e2m1_values(words, SHIFT: tl.constexpr):
    """The 4-bit floats at SHIFT: their exponent and mantissa bits are those of a float32 that
    is 2**126 too small (a subnormal where the code is), so one multiplication is exact."""
    top = words << (28 - SHIFT)
    bits = (top & 0x80000000) | ((top >> 6) & 0x01C00000)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def _values(words, SHIFT: tl.constexpr, KIND: tl.constexpr, scale, zero):
    """The weights whose codes are at SHIFT of each word; zero as :func:`_int_values` takes it."""
    if KIND == _E2M1:
        values = _e2m1_values(words, SHIFT) * scale
    else:
        values = _int_values(words, SHIFT, KIND, scale, zero)
    return values


@triton.jit
def _both_k(words, SHIFT: tl.constexpr, KIND: tl.constexpr, scale, zero):
    """The weights of k3 = 0, 1 and k0 = 0, 1 of each word, [..., k0, k3]; SHIFT is the first's."""
    NEXT: tl.constexpr = 8 if KIND == 8 else 4
    low = tl.join(
        _values(words, SHIFT, KIND, scale, zero), _values(words, SHIFT + 16, KIND, scale, zero)
    )
    high = tl.join(
        _values(words, SHIFT + NEXT, KIND, scale, zero),
        _values(words, SHIFT + NEXT + 16, KIND, scale, zero),
    )
    return tl.join(low, high)


@triton.jit
def _e8m0_value(byte):
    """2**(byte - 127) in float32: 0 is a subnormal, 255 is NaN."""
    bits = byte.to(tl.uint32) << 23
    bits = tl.where(byte == 0, 0x00400000, tl.where(byte == 255, 0x7FC00000, bits))
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _load_scale(s_ptr, g, N, row, P1: tl.constexpr, KIND: tl.constexpr):
    """Scales of the rows of half P1 in group g, from grouped (8 x 8 permuted) scales."""
    # n = 16 j + 8 p + i (p the half, i = n % 8) is stored at 8 i + 2 j + p, and a tile's row is
    # 4 i + j (b = 4) or 8 i + 2 j + p (b = 8): the scales already stand in the order of the rows.
    if KIND == _E2M1:
        at = (row // 2) * 4 + P1 * 2 + row % 2  # the two low bits of the place are swapped
        return _e8m0_value(tl.load(s_ptr + g * N + at))
    if KIND == 4:
        return tl.load(s_ptr + g * N + row * 2 + P1).to(tl.float32)
    return tl.load(s_ptr + g * N + row).to(tl.float32)


@triton.jit
def _load_zero(z_ptr, g, N, row, P1: tl.constexpr, KIND: tl.constexpr):
    """Zero points of the rows of half P1 in group g, from Marlin's zero points."""
    if KIND == 4:
        word = row // 4  # i, after 8 words for each 64 columns before
        shift = (row % 4) * 4 + P1 * 16
    else:
        word = row // 4  # 2 i + p // 4, after 16 words for each 64 columns before
        shift = (row % 2) * 16 + (row // 2 % 2) * 8
    words = tl.load(z_ptr + g * (N * KIND // 32) + word)
    return ((words >> shift) & ((1 << KIND) - 1)).to(tl.float32)


@triton.jit
def _load_group(
    s_ptr,
    z_ptr,
    step,
    N,
    K,
    row,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    KB: tl.constexpr,
    GT: tl.constexpr,
):
    """(scale, zero point times scale) of both halves, [rows, GT], for the tile at step."""
    at = row[:, None]
    if GROUP == 0:
        g = tl.zeros([1, GT], tl.int32)
        s0 = tl.full([row.shape[0], GT], 1.0, tl.float32)
        s1 = s0
    else:
        k = step * KB + tl.arange(0, GT) * (KB // GT)
        g = tl.minimum(k // GROUP, K // GROUP - 1)[None, :]
        s0 = _load_scale(s_ptr, g, N, at, 0, KIND)
        s1 = s0
        if KIND != 8:
            s1 = _load_scale(s_ptr, g, N, at, 1, KIND)
    if KIND == _E2M1:
        z0 = s0
        z1 = s1
    elif HAS_ZERO:
        z0 = _load_zero(z_ptr, g, N, at, 0, KIND) * s0
        z1 = z0
        if KIND != 8:
            z1 = _load_zero(z_ptr, g, N, at, 1, KIND) * s1
    else:
        z0 = s0 * (1 << (KIND - 1))
        z1 = s1 * (1 << (KIND - 1))
    return s0, s1, z0, z1


@triton.jit
def _spread(values, R: tl.constexpr, GT: tl.constexpr, Q: tl.constexpr):
    """[R, GT] to [R, Q]: each group's value on its share of the columns."""
    return tl.reshape(tl.broadcast_to(values[:, :, None], [R, GT, Q // GT]), [R, Q])


@triton.jit
def _load_inside(ptrs, inside, EVEN: tl.constexpr):
    """Load where inside, 0 elsewhere; EVEN: everything is inside."""
    if EVEN:
        values = tl.load(ptrs)
    else:
        values = tl.load(ptrs, mask=inside, other=0)
    return values


@triton.jit
def _dot(a, x, acc, WIDE: tl.constexpr):
    """acc + a @ x, with a rounded to x's dtype; WIDE: Triton's interpreter has no bf16 product."""
    a = a.to(x.dtype)
    if WIDE:
        a = a.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(a, x, acc)


@triton.jit
def _gemm(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    steps,  # steps of KT tiles of 16 rows that one program takes
    GROUP: tl.constexpr,  # weights along K that share a scale; 0 where all do
    KIND: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,  # the partial sums go to out [splits, M, N] in float32
    EVEN: tl.constexpr,  # K is a multiple of KT * 16
    BM: tl.constexpr,
    BN: tl.constexpr,
    KT: tl.constexpr,
    GT: tl.constexpr,  # scale groups told apart in one tile
    WIDE: tl.constexpr,
):
    BITS: tl.constexpr = 8 if KIND == 8 else 4
    RUN: tl.constexpr = 32 if BITS == 4 else 64  # rows of words for 64 columns
    R: tl.constexpr = BN // 64 * RUN
    Q: tl.constexpr = KT * 4
    KB: tl.constexpr = KT * 16

    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BM)
    pid_m = pid % tiles_m
    pid_n = pid // tiles_m
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, tl.cdiv(K, KB))

    r = tl.arange(0, R)
    # The last block of columns may reach past N: read the last 64 again, store none of them.
    block = tl.minimum(pid_n * (BN // 64) + r // RUN, N // 64 - 1)
    row = block * RUN + r % RUN
    row_words = N * BITS // 2  # words of one 16-row tile
    q = tl.arange(0, Q)
    in_tile = block * (32 * BITS) + r % RUN // BITS * (4 * BITS) + r % BITS
    w_ptrs = w_ptr + in_tile[:, None] + (q // 4 * row_words + q % 4 * BITS)[None, :]
    w_ptrs += (first * KT).to(tl.int64) * row_words
    m = pid_m * BM + tl.arange(0, BM)
    x_ptrs = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[None, :] * K + q[:, None] + first * Q

    acc0 = tl.zeros([R, BM], tl.float32)
    acc1 = tl.zeros([R, BM], tl.float32)
    # Scales are read one step ahead: they are too narrow for the asynchronous copies.
    next_s0, next_s1, next_z0, next_z1 = _load_group(
        s_ptr, z_ptr, first, N, K, row, GROUP, KIND, HAS_ZERO, KB, GT
    )
    for step in range(first, last):
        s0 = _spread(next_s0, R, GT, Q)
        s1 = _spread(next_s1, R, GT, Q)
        z0 = _spread(next_z0, R, GT, Q)
        z1 = _spread(next_z1, R, GT, Q)
        next_s0, next_s1, next_z0, next_z1 = _load_group(
            s_ptr, z_ptr, step + 1, N, K, row, GROUP, KIND, HAS_ZERO, KB, GT
        )
        inside = step * Q + q < K // 4
        words = _load_inside(w_ptrs, inside[None, :], EVEN).to(tl.uint32, bitcast=True)
        # (k3, k0) selects the code and the slice of x; n3 the half.
        for p in tl.static_range(4):
            k3 = p // 2
            k0 = p % 2
            x = _load_inside(x_ptrs + p * (K // 4), inside[:, None], EVEN)
            at = (k3 + k0 * (16 // BITS)) * BITS
            acc0 = _dot(_values(words, at, KIND, s0, z0), x, acc0, WIDE)
            if BITS == 4:
                acc1 = _dot(_values(words, at + 8, KIND, s1, z1), x, acc1, WIDE)
        w_ptrs += KT * row_words
        x_ptrs += Q

    # Rows to columns: r = (block, i, j) and the half p to n = (block, j, p, i).
    if BITS == 4:
        acc = tl.reshape(tl.join(acc0, acc1), [BN // 64, 8, 4, BM, 2])
        acc = tl.reshape(tl.permute(acc, (3, 0, 2, 4, 1)), [BM, BN])
    else:
        acc = tl.reshape(acc0, [BN // 64, 8, 8, BM])
        acc = tl.reshape(tl.permute(acc, (3, 0, 2, 1)), [BM, BN])
    n = pid_n * BN + tl.arange(0, BN)
    mask = (m < M)[:, None] & (n < N)[None, :]
    if GROUP == 0:
        # Channel-wise scales: column n4 n3 n2 n1 n0 of 32 stands at n2 n1 n4 n3 n0.
        at = n // 32 * 32 + n % 8 // 2 * 8 + n % 32 // 8 * 2 + n % 2
        acc *= tl.load(s_ptr + at, mask=n < N, other=0.0).to(tl.float32)[None, :]
    offsets = m.to(tl.int64)[:, None] * N + n[None, :]
    if SPLIT:
        offsets += tl.program_id(1).to(tl.int64) * M * N
    elif HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_splits(
    part_ptr,
    bias_ptr,
    out_ptr,
    total,
    N,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = sum of part [splits, M, N] + bias, in float32, always in the same order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    acc = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(part_ptr + split * total + at, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_kernel(
    w_ptr,
    s_ptr,
    z_ptr,
    out_ptr,
    N,
    K,
    GROUP: tl.constexpr,  # as in _gemm
    KIND: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    KT: tl.constexpr,  # 16-row tiles a program takes
    GT: tl.constexpr,
):
    """64 columns of KT tiles of 16 rows, as [64 of N, KT * 16 of K] in out's dtype."""
    BITS: tl.constexpr = 8 if KIND == 8 else 4
    RUN: tl.constexpr = 32 if BITS == 4 else 64
    Q: tl.constexpr = KT * 4
    KB: tl.constexpr = KT * 16
    block = tl.program_id(1)
    step = tl.program_id(0)
    r = tl.arange(0, RUN)
    q = tl.arange(0, Q)
    in_tile = block * (32 * BITS) + r // BITS * (4 * BITS) + r % BITS
    tile = step * KT + q // 4
    at = tile.to(tl.int64)[None, :] * (N * BITS // 2) + (in_tile[:, None] + q % 4 * BITS)
    words = tl.load(w_ptr + at, mask=(tile < K // 16)[None, :], other=0)
    words = words.to(tl.uint32, bitcast=True)
    row = block * RUN + r
    s0, s1, z0, z1 = _load_group(s_ptr, z_ptr, step, N, K, row, GROUP, KIND, HAS_ZERO, KB, GT)
    s0 = _spread(s0, RUN, GT, Q)
    s1 = _spread(s1, RUN, GT, Q)
    z0 = _spread(z0, RUN, GT, Q)
    z1 = _spread(z1, RUN, GT, Q)
    n = tl.arange(0, 64)
    if GROUP == 0:
        stored = n // 32 * 32 + n % 8 // 2 * 8 + n % 32 // 8 * 2 + n % 2
        whole = tl.load(s_ptr + block * 64 + stored).to(tl.float32)
    # A word holds k3 at its lowest code, then (b = 4) n3, then k0, which is at bit 16.
    first = _both_k(words, 0, KIND, s0, z0)
    second = first
    if BITS == 4:
        second = _both_k(words, 8, KIND, s1, z1)
    if BITS == 4:  # rows (n2 n1 n0, n5 n4), columns (tile, k2 k1), k0, k3, n3
        values = tl.reshape(tl.join(first, second), [8, 4, KT, 4, 2, 2, 2])
        values = tl.permute(values, (1, 6, 0, 2, 5, 3, 4))
    else:  # rows (n2 n1 n0, n5 n4 n3), columns (tile, k2 k1), k0, k3
        values = tl.permute(tl.reshape(first, [8, 8, KT, 4, 2, 2]), (1, 0, 2, 5, 3, 4))
    values = tl.reshape(values, [64, KB])
    if GROUP == 0:
        values *= whole[:, None]
    k = step * KB + tl.arange(0, KB)
    out = out_ptr + (block * 64 + n).to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out, narrow(values, out_ptr.dtype.element_ty), mask=(k < K)[None, :])


class Config(NamedTuple):
    """Tile of one program (tokens, columns, 16-row tiles a step) and how it is run."""

    block_m: int
    block_n: int
    tiles_k: int
    warps: int
    stages: int
    splits: int


class Dense(NamedTuple):
    """Dequantise to [N, K] in x's dtype, then torch's product."""


#: More rows of x than one tile has: one pass that dequantises costs less than doing it for each.
DENSE_ROWS = 129


def _choose(m: int, n: int, k: int, kind: int, device: torch.device) -> Config:
    """Tile and splits for [m, k] x [n, k], measured on an H200 (tests/bench/bench_marlin_mm.py)."""
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    config = Config(block_m, 128, 8, 4, 3, 1)
    if kind == 8 and m > 64:
        # An int8 tile has twice the rows of words: with fewer warps its sums do not fit in
        # registers.
        config = Config(128, 128, 8, 8, 3, 1)
    if not has_large_shared_memory(device):
        config = Config(min(block_m, 64), 128, 4, 4, 2, 1)
    sms = multiprocessors(device)
    steps = triton.cdiv(k, config.tiles_k * 16)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    # Two programs for each multiprocessor; where a few tokens give more tiles than there are
    # multiprocessors already, shorter programs that fill the last round better.
    splits = 4 if m <= 32 and tiles > sms else 2 * sms // tiles
    return config._replace(splits=max(1, min(splits, steps // 4, 8)))


def dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None,
    *,
    n: int,
    k: int,
    kind: int,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight [N, K] in ``dtype``, K in the order of the tiles; arguments as of the kernels."""
    out = torch.empty((n, k), dtype=dtype, device=weight.device)
    tiles = 8
    with on_device(weight.device):
        _dequantize_kernel[(triton.cdiv(k, tiles * 16), n // 64)](
            weight,
            scale,
            zeros if zeros is not None else weight,
            out,
            n,
            k,
            GROUP=group,
            KIND=kind,
            HAS_ZERO=zeros is not None,
            KT=tiles,
            GT=_groups_told_apart(group, tiles),
            num_warps=4,
        )
    return out


def _groups_told_apart(group: int, tiles: int) -> int:
    """Scale groups that ``tiles`` 16-row tiles may meet; 2 at least, see :func:`_matmul`."""
    rows = tiles * 16
    if group == 0 or group % rows == 0:
        return 2
    return max(2, rows // group) if rows % group == 0 else tiles


def _permuted(x: torch.Tensor, index: torch.Tensor | None, parts: int) -> torch.Tensor:
    """x [M, K] in the order of the tiles; parts = 2: as the bf16 parts [2M, K] of an f16 x."""
    m, k = x.shape
    dtype = x.dtype if parts == 1 else torch.bfloat16
    out = torch.empty((parts * m, k), dtype=dtype, device=x.device)
    block = 1024
    _permute_activations[(m, triton.cdiv(k, block))](
        x,
        index if index is not None else x,
        out,
        m * k,
        k,
        HAS_INDEX=index is not None,
        PARTS=parts,
        BLOCK=block,
        num_warps=4,
    )
    return out


def _matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None,
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    kind: int,
    group: int,
    config: Config | Dense | None,
) -> torch.Tensor:
    k = x.shape[-1]
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    x = x.reshape(-1, k)
    m = x.shape[0]
    if m == 0:
        return out
    parts = 2 if kind == 16 and x.dtype == torch.float16 else 1
    if config is None:
        # An f16 x against MXFP4 is two bf16 parts, whose products must be added in float32.
        many = m >= DENSE_ROWS and parts == 1
        config = Dense() if many else _choose(m * parts, n, k, kind, x.device)
    if isinstance(config, Dense):
        dense = dequantize(
            weight, scale, zeros, n=n, k=k, kind=kind, group=group, dtype=x.dtype
        ).t()
        if index is not None:
            x = x.index_select(1, index)
        if bias is None:
            torch.mm(x, dense, out=out.view(m, n))
        else:
            torch.addmm(bias, x, dense, out=out.view(m, n))
        return out
    tile = config.tiles_k * 16
    steps = triton.cdiv(triton.cdiv(k, tile), config.splits)
    splits = triton.cdiv(triton.cdiv(k, tile), steps)
    partial = splits * parts > 1
    target = out
    if partial:
        target = torch.empty((splits * parts, m, n), dtype=torch.float32, device=x.device)
    with on_device(x.device):
        x = _permuted(x, index, parts)
        grid = (triton.cdiv(parts * m, config.block_m) * triton.cdiv(n, config.block_n), splits)
        _gemm[grid](
            x,
            weight,
            scale,
            zeros if zeros is not None else weight,
            bias if bias is not None else x,
            target,
            parts * m,
            n,
            k,
            steps,
            GROUP=group,
            KIND=kind,
            HAS_ZERO=zeros is not None,
            HAS_BIAS=bias is not None,
            SPLIT=partial,
            EVEN=k % tile == 0,
            BM=config.block_m,
            BN=config.block_n,
            KT=config.tiles_k,
            # One group would do where a tile has one, but a single column of scales would be
            # broadcast straight into the dot product's operand; carried through the loop in
            # another register layout, it makes the compiler pass the whole weight through shared
            # memory.
            GT=_groups_told_apart(group, config.tiles_k),
            WIDE=x.device.type == "cpu",
            num_warps=config.warps,
            num_stages=config.stages,
        )
        if partial:
            block = 512
            _sum_splits[(triton.cdiv(m * n, block),)](
                target,
                bias if bias is not None else x,
                out,
                m * n,
                n,
                SPLITS=splits * parts,
                HAS_BIAS=bias is not None,
                BLOCK=block,
                num_warps=4,
            )
    return out


def gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    g_idx_sort_indices: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    n: int,
    k: int,
    group_size: int,
    config: Config | Dense | None = None,
) -> torch.Tensor:
    """``marlin_gemm`` on arguments already checked; ``config`` overrides what is chosen."""
    group = 0 if scales.shape[0] == 1 else group_size
    return _matmul(x, qweight, scales, qzeros, g_idx_sort_indices, bias, n, bits, group, config)


def mxfp4_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    n: int,
    k: int,
    config: Config | Dense | None = None,
) -> torch.Tensor:
    """``marlin_mxfp4_gemm`` on arguments already checked; ``config`` overrides what is chosen."""
    return _matmul(x, weight, scale.view(torch.uint8), None, None, bias, n, 16, 32, config)
