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
registers, which is where the weight is dequantised (``codes.py``).

On Hopper the form ``int4``, but for experts, has a kernel of its own (``fragments.py``).

Grouped: rows of x sorted by expert meet stacked weights [E, ...]. A block of rows is one expert's;
which one it is, every program finds in the experts' offsets.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ctconvert.runtime.kernels.fake_quant.triton import narrow
from ctconvert.runtime.kernels.hardware import has_large_shared_memory, multiprocessors
from ctconvert.runtime.kernels.marlin import codes, fragments
from ctconvert.runtime.kernels.marlin.codes import (
    INT8,
    both_k,
    load_group,
    plain_words,
    spread,
    values,
)
from ctconvert.runtime.kernels.marlin.forms import FORMS, Form
from ctconvert.runtime.kernels.marlin.fragments import Fragments
from ctconvert.runtime.kernels.wna16.triton import compute_capability, count_multiprocessors
from ctconvert.transforms.device import on_device


@triton.jit
def _permute_activations(
    x_ptr,
    rows_ptr,
    index_ptr,
    out_ptr,
    K,
    HAS_ROWS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[m, p, q] = x[rows[m], index[k]], with q = (k // 16, k2 k1) and p = (k3, k0).

    With two parts, row 2m has bf16(x) and row 2m + 1 what it leaves of an f16 x, also exact in
    bf16.
    """
    m = tl.program_id(0).to(tl.int64)
    row = m
    if HAS_ROWS:
        row = tl.load(rows_ptr + m).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o < K
    p = o // (K // 4)
    q = o % (K // 4)
    k = (q // 4) * 16 + (p // 2) * 8 + (q % 4) * 2 + p % 2
    if HAS_INDEX:
        k = tl.load(index_ptr + k, mask=mask, other=0)
    x = tl.load(x_ptr + row * K + k, mask=mask, other=0.0)
    high = x.to(out_ptr.dtype.element_ty)
    out = out_ptr + m * PARTS * K + o
    tl.store(out, high, mask=mask)
    if PARTS == 2:
        rest = x.to(tl.float32) - high.to(tl.float32)
        rest = tl.where(tl.abs(high.to(tl.float32)) == float("inf"), 0.0, rest)
        tl.store(out + K, rest.to(out_ptr.dtype.element_ty), mask=mask)


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
def _block_of_rows(
    offsets_ptr, pid_m, M, experts, PARTS: tl.constexpr, BM: tl.constexpr, EP: tl.constexpr
):
    """(expert, first row, end of its rows) of a block; no rows where there are fewer blocks."""
    e = tl.arange(0, EP)
    starts = tl.load(offsets_ptr + e, mask=e < experts, other=0)
    ends = tl.minimum(tl.load(offsets_ptr + e + 1, mask=e < experts, other=0), M // PARTS)
    blocks = tl.cdiv(tl.maximum(ends - starts, 0) * PARTS, BM)
    upto = tl.cumsum(blocks, 0)
    expert = tl.sum((upto <= pid_m).to(tl.int32), 0)
    here = e == expert
    first = tl.sum(tl.where(here, starts * PARTS + (pid_m - upto + blocks) * BM, 0), 0)
    end = tl.sum(tl.where(here, ends * PARTS, 0), 0)
    return tl.minimum(expert, experts - 1), first, end


@triton.jit
def _gemm(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    f_ptr,
    bias_ptr,
    offsets_ptr,
    out_ptr,
    M,
    N,
    K,
    blocks_m,
    experts,
    steps,  # steps of KT tiles of 16 rows that one program takes
    GROUP: tl.constexpr,  # weights along K that share a scale; 0 where all do
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    ZEROS: tl.constexpr,
    LIFT: tl.constexpr,  # times the scales, and
    FACTOR: tl.constexpr,  # times the sums: what the weights are short of
    HAS_FACTOR: tl.constexpr,  # a factor f32 [1], for the sums as well
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,  # the partial sums go to out [splits, M, N] in float32
    PARTS: tl.constexpr,  # rows of x for a row of the result
    EP: tl.constexpr,  # a power of two of at least as many experts; 0: not grouped
    EVEN: tl.constexpr,  # K is a multiple of KT * 16
    BM: tl.constexpr,
    BN: tl.constexpr,
    KT: tl.constexpr,
    GT: tl.constexpr,  # scale groups told apart in one tile
    WIDE: tl.constexpr,
):
    BITS: tl.constexpr = 8 if CODES >= INT8 else 4
    RUN: tl.constexpr = 32 if BITS == 4 else 64  # rows of words for 64 columns
    R: tl.constexpr = BN // 64 * RUN
    Q: tl.constexpr = KT * 4
    KB: tl.constexpr = KT * 16

    pid = tl.program_id(0)
    pid_m = pid % blocks_m
    pid_n = pid // blocks_m
    row_words = N * BITS // 2  # words of one 16-row tile
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, tl.cdiv(K, KB))
    first_m = pid_m * BM
    end_m = M
    if EP > 0:
        expert, first_m, end_m = _block_of_rows(offsets_ptr, pid_m, M, experts, PARTS, BM, EP)
        last = tl.where(first_m < end_m, last, first)
        groups = 1
        if GROUP > 0:
            groups = K // GROUP
        whole = expert.to(tl.int64)
        w_ptr += whole * (K // 16) * row_words
        s_ptr += whole * groups * (N // 4 if SCALES > 0 else N)  # bytes are words
        z_ptr += whole * groups * (N * BITS // 32)
        f_ptr += expert
        bias_ptr += expert * N

    r = tl.arange(0, R)
    # The last block of columns may reach past N: read the last 64 again, store none of them.
    block = tl.minimum(pid_n * (BN // 64) + r // RUN, N // 64 - 1)
    row = block * RUN + r % RUN
    q = tl.arange(0, Q)
    in_tile = block * (32 * BITS) + r % RUN // BITS * (4 * BITS) + r % BITS
    w_ptrs = w_ptr + in_tile[:, None] + (q // 4 * row_words + q % 4 * BITS)[None, :]
    w_ptrs += (first * KT).to(tl.int64) * row_words
    m = first_m + tl.arange(0, BM)
    x_ptrs = x_ptr + tl.minimum(m, end_m - 1).to(tl.int64)[None, :] * K + q[:, None] + first * Q

    acc0 = tl.zeros([R, BM], tl.float32)
    acc1 = tl.zeros([R, BM], tl.float32)
    # Scales are read one step ahead: they are too narrow for the asynchronous copies.
    next_s0, next_s1, next_z0, next_z1 = load_group(
        s_ptr, z_ptr, first, N, K, row, GROUP, CODES, SCALES, LIFT, ZEROS, KB, GT
    )
    for step in range(first, last):
        s0 = spread(next_s0, R, GT, Q)
        s1 = spread(next_s1, R, GT, Q)
        z0 = spread(next_z0, R, GT, Q)
        z1 = spread(next_z1, R, GT, Q)
        next_s0, next_s1, next_z0, next_z1 = load_group(
            s_ptr, z_ptr, step + 1, N, K, row, GROUP, CODES, SCALES, LIFT, ZEROS, KB, GT
        )
        inside = step * Q + q < K // 4
        words = _load_inside(w_ptrs, inside[None, :], EVEN).to(tl.uint32, bitcast=True)
        words = plain_words(words, CODES)
        # (k3, k0) selects the code and the slice of x; n3 the half.
        for p in tl.static_range(4):
            k3 = p // 2
            k0 = p % 2
            x = _load_inside(x_ptrs + p * (K // 4), inside[:, None], EVEN)
            at = (k3 + k0 * (16 // BITS)) * BITS
            acc0 = _dot(values(words, at, CODES, SCALES, s0, z0), x, acc0, WIDE)
            if BITS == 4:
                acc1 = _dot(values(words, at + 8, CODES, SCALES, s1, z1), x, acc1, WIDE)
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
    mask = (m < end_m)[:, None] & (n < N)[None, :]
    if GROUP == 0:
        # Channel-wise scales: column n4 n3 n2 n1 n0 of 32 stands at n2 n1 n4 n3 n0.
        at = n // 32 * 32 + n % 8 // 2 * 8 + n % 32 // 8 * 2 + n % 2
        acc *= tl.load(s_ptr + at, mask=n < N, other=0.0).to(tl.float32)[None, :] * FACTOR
    if HAS_FACTOR:
        acc *= tl.load(f_ptr) * FACTOR
    offsets = m.to(tl.int64)[:, None] * N + n[None, :]
    if HAS_BIAS:  # once in all that is added up
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        once = (m % PARTS == 0) & (tl.program_id(1) == 0)
        acc += tl.where(once[:, None], bias, 0.0)
    if SPLIT:
        offsets += tl.program_id(1).to(tl.int64) * M * N
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_splits(
    part_ptr,
    out_ptr,
    total,
    N,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [M, N] = sum of part [splits, M, parts, N], in float32, always in the same order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    source = part_ptr + at // N * (PARTS * N) + at % N
    acc = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        for part in tl.static_range(PARTS):
            acc += tl.load(source + split * total * PARTS + part * N, mask=mask, other=0.0)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_kernel(
    w_ptr,
    s_ptr,
    z_ptr,
    f_ptr,
    out_ptr,
    N,
    K,
    GROUP: tl.constexpr,  # as in _gemm
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    ZEROS: tl.constexpr,
    LIFT: tl.constexpr,
    FACTOR: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    KT: tl.constexpr,  # 16-row tiles a program takes
    GT: tl.constexpr,
):
    """64 columns of KT tiles of 16 rows, as [64 of N, KT * 16 of K] in out's dtype."""
    BITS: tl.constexpr = 8 if CODES >= INT8 else 4
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
    words = plain_words(words.to(tl.uint32, bitcast=True), CODES)
    row = block * RUN + r
    s0, s1, z0, z1 = load_group(
        s_ptr, z_ptr, step, N, K, row, GROUP, CODES, SCALES, LIFT, ZEROS, KB, GT
    )
    s0 = spread(s0, RUN, GT, Q)
    s1 = spread(s1, RUN, GT, Q)
    z0 = spread(z0, RUN, GT, Q)
    z1 = spread(z1, RUN, GT, Q)
    n = tl.arange(0, 64)
    # A word holds k3 at its lowest code, then (b = 4) n3, then k0, which is at bit 16.
    lower = both_k(words, 0, CODES, SCALES, s0, z0)
    if BITS == 4:  # rows (n2 n1 n0, n5 n4), columns (tile, k2 k1), k0, k3, n3
        upper = both_k(words, 8, CODES, SCALES, s1, z1)
        made = tl.reshape(tl.join(lower, upper), [8, 4, KT, 4, 2, 2, 2])
        made = tl.permute(made, (1, 6, 0, 2, 5, 3, 4))
    else:  # rows (n2 n1 n0, n5 n4 n3), columns (tile, k2 k1), k0, k3
        made = tl.permute(tl.reshape(lower, [8, 8, KT, 4, 2, 2]), (1, 0, 2, 5, 3, 4))
    made = tl.reshape(made, [64, KB])
    if GROUP == 0:
        stored = n // 32 * 32 + n % 8 // 2 * 8 + n % 32 // 8 * 2 + n % 2
        whole = tl.load(s_ptr + block * 64 + stored).to(tl.float32)
        made *= whole[:, None] * FACTOR
    if HAS_FACTOR:
        made *= tl.load(f_ptr) * FACTOR
    k = step * KB + tl.arange(0, KB)
    out = out_ptr + (block * 64 + n).to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out, narrow(made, out_ptr.dtype.element_ty), mask=(k < K)[None, :])


class Step(NamedTuple):
    """What the kernels are compiled for, by a form and its tensors."""

    GROUP: int
    CODES: int
    SCALES: int
    ZEROS: int
    LIFT: float
    FACTOR: float
    HAS_FACTOR: bool


#: By how many powers of two the bits of a code, seen as float32, are too small.
_SHORT = {"e2m1": 126, "e4m3": 120}
#: How many of them the sums make up for: scales in bytes go to 960, float32 to 2**128.
_LATER = 9


def _step(form: Form, scale: torch.Tensor, group: int, zeros: bool, factor: bool) -> Step:
    short = _SHORT.get(form.codes, 0)
    lift, after = 0, 0
    if form.scales == "float":
        held = {torch.float16: form.powers[0], torch.bfloat16: form.powers[1]}.get(scale.dtype, 0)
        # Where one row of scales is for the sums, so is what they hold.
        group, lift, after = (0, short, -held) if scale.shape[-2] == 1 else (group, short - held, 0)
    elif form.scales != "e8m0":
        assert form.power is not None
        lift, after = short - _LATER, form.power + _LATER
    stored = codes.PLAIN if form.zeros == "plain" else codes.INTERLEAVED
    return Step(
        group,
        getattr(codes, form.codes.upper()).value,
        {"float": codes.FLOAT, "e8m0": codes.E8M0, "e5m3": codes.E5M3}.get(
            form.scales, codes.E4M3_SCALES
        ).value,
        (stored if zeros else codes.NO_ZEROS).value,
        2.0**lift,
        2.0**after,
        factor,
    )


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


def _choose(
    m: int, n: int, k: int, bits: int, group: int, device: torch.device, experts: int | None = None
) -> Config:
    """Tile and splits for [m, k] x [n, k], measured on an H200 (tests/bench/bench_marlin_mm.py).

    ``group`` is G or K.
    """
    rows = m if experts is None else triton.cdiv(m, experts)
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
    if experts is not None:  # with what finds the expert, more sums do not fit in registers
        block_m = min(block_m, 64)
    config = Config(block_m, 128, 8, 4, 3, 1)
    if bits == 8 and block_m > 64:
        # An int8 tile has twice the rows of words: with fewer warps its sums do not fit in
        # registers.
        config = Config(128, 128, 8, 8, 3, 1)
    elif bits == 8 and _groups_told_apart(group, config.tiles_k) > 2:
        # So it is with the scales of four groups beside fewer sums: a third of the time.
        config = Config(block_m, 64, 8, 4, 4, 1)
    if not has_large_shared_memory(device):
        config = Config(min(block_m, 64), 128, 4, 4, 2, 1)
    sms = multiprocessors(device)
    steps = triton.cdiv(k, config.tiles_k * 16)
    tiles = _blocks(m, config.block_m, experts) * triton.cdiv(n, config.block_n)
    # Two programs for each multiprocessor; where a few tokens give more tiles than there are
    # multiprocessors already, shorter programs that fill the last round better.
    splits = 4 if rows <= 32 and tiles > sms else 2 * sms // tiles
    return config._replace(splits=max(1, min(splits, steps // 4, 8)))


def _blocks(m: int, block_m: int, experts: int | None) -> int:
    """Blocks of rows; of experts, as many as there may be."""
    if experts is None:
        return triton.cdiv(m, block_m)
    return m // block_m + min(experts, m)


def dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    *,
    form: Form,
    n: int,
    k: int,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight [N, K] in ``dtype``, K in the order of the tiles; ``group`` is G or K."""
    out = torch.empty((n, k), dtype=dtype, device=weight.device)
    tiles = 8
    step = _step(form, scale, group, zeros is not None, factor is not None)
    with on_device(weight.device):
        _dequantize_kernel[(triton.cdiv(k, tiles * 16), n // 64)](
            weight,
            _loadable(scale, form),
            zeros if zeros is not None else weight,
            factor if factor is not None else weight,
            out,
            n,
            k,
            **step._asdict(),
            KT=tiles,
            GT=_groups_told_apart(step.GROUP, tiles),
            num_warps=4,
        )
    return out


def _loadable(scale: torch.Tensor, form: Form) -> torch.Tensor:
    """Scales as the kernels load them: of bytes, four at once."""
    if form.scales == "float":
        return scale
    scale = scale.view(torch.uint8)
    if scale.storage_offset() % 4 or scale.data_ptr() % 4:
        scale = scale.clone()
    return scale.view(torch.int32)


def _groups_told_apart(group: int, tiles: int) -> int:
    """Scale groups that ``tiles`` 16-row tiles may meet; 2 at least, see :func:`_matmul`."""
    rows = tiles * 16
    if group == 0 or group % rows == 0:
        return 2
    return max(2, rows // group) if rows % group == 0 else tiles


def _permuted(
    x: torch.Tensor, rows: torch.Tensor | None, index: torch.Tensor | None, parts: int
) -> torch.Tensor:
    """x [M, K] in the order of the tiles; parts = 2: the bf16 parts [M * 2, K] of an f16 x."""
    m, k = len(x) if rows is None else len(rows), x.shape[1]
    dtype = x.dtype if parts == 1 else torch.bfloat16
    out = torch.empty((m * parts, k), dtype=dtype, device=x.device)
    block = 1024
    _permute_activations[(m, triton.cdiv(k, block))](
        x,
        rows if rows is not None else x,
        index if index is not None else x,
        out,
        k,
        HAS_ROWS=rows is not None,
        HAS_INDEX=index is not None,
        PARTS=parts,
        BLOCK=block,
        num_warps=4,
    )
    return out


class Weight(NamedTuple):
    """Tensors of a weight, checked, and of what form they are; G or K is its group."""

    form: Form
    words: torch.Tensor
    scale: torch.Tensor
    zeros: torch.Tensor | None
    factor: torch.Tensor | None
    n: int
    group: int


class Experts(NamedTuple):
    """Rows of x sorted by expert: i32 [P], and i32 [E + 1], where each one's begin and end."""

    rows: torch.Tensor
    offsets: torch.Tensor


def _parts(weight: Weight, x: torch.Tensor) -> int:
    """An f16 x against E8M0 scales is two bf16 parts, whose products are added in float32."""
    return 2 if weight.form.scales == "e8m0" and x.dtype == torch.float16 else 1


def _dense(
    x: torch.Tensor, weight: Weight, index: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    n, k = weight.n, x.shape[1]
    made = dequantize(
        *weight[1:5], form=weight.form, n=n, k=k, group=weight.group, dtype=x.dtype
    ).t()
    if index is not None:
        x = x.index_select(1, index)
    return torch.mm(x, made) if bias is None else torch.addmm(bias, x, made)


def _matmul(
    x: torch.Tensor,
    weight: Weight,
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    config: Config | Fragments | Dense | None,
    experts: Experts | None = None,
) -> torch.Tensor:
    """[..., K] to [..., N]; of experts, [M, K] to [P, N]."""
    n, k = weight.n, x.shape[-1]
    lead = x.shape[:-1] if experts is None else experts.rows.shape
    x = x.reshape(-1, k)
    m = lead.numel()
    if m == 0:
        return torch.empty((*lead, n), dtype=x.dtype, device=x.device)
    form, bits, parts = weight.form, weight.form.bits, _parts(weight, x)
    count = None if experts is None else len(experts.offsets) - 1
    if config is None:
        # Fragments are read with indices of 32 bits.
        fits = form == FORMS["int4"] and experts is None and weight.words.numel() < 1 << 31
        if fits and compute_capability(x.device) == 90:
            group = 0 if weight.scale.shape[-2] == 1 else weight.group
            sms = count_multiprocessors(x.device)
            config = fragments.select(m, n, k, group, weight.zeros is not None, sms) or Dense()
        else:
            # In float16 a weight may be too small, which codes, scales and a factor apart are not.
            apart = parts == 2 or (weight.factor is not None and x.dtype == torch.float16)
            many = m >= DENSE_ROWS and not apart and experts is None
            found = _choose(m * parts, n, k, bits, weight.group, x.device, count)
            config = Dense() if many else found
    if isinstance(config, Dense):
        return _dense(x, weight, index, bias).reshape(*lead, n)
    if isinstance(config, Fragments):
        assert experts is None
        assert form == FORMS["int4"]
        x = x if index is None else x.index_select(1, index)
        made = fragments.gemm(x, *weight[1:4], bias, n=n, group_size=weight.group, config=config)
        return made.reshape(*lead, n)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    tile = config.tiles_k * 16
    steps = triton.cdiv(triton.cdiv(k, tile), config.splits)
    splits = triton.cdiv(triton.cdiv(k, tile), steps)
    partial = splits * parts > 1
    target = out
    if partial:
        target = torch.empty((splits, m, parts, n), dtype=torch.float32, device=x.device)
    with on_device(x.device):
        x = _permuted(x, None if experts is None else experts.rows, index, parts)
        blocks = _blocks(m * parts, config.block_m, count)
        step = _step(
            form, weight.scale, weight.group, weight.zeros is not None, weight.factor is not None
        )
        _gemm[(blocks * triton.cdiv(n, config.block_n), splits)](
            x,
            weight.words,
            _loadable(weight.scale, form),
            weight.zeros if weight.zeros is not None else weight.words,
            weight.factor if weight.factor is not None else x,
            bias if bias is not None else x,
            experts.offsets if experts is not None else x,
            target,
            m * parts,
            n,
            k,
            blocks,
            count or 1,
            steps,
            **step._asdict(),
            HAS_BIAS=bias is not None,
            SPLIT=partial,
            PARTS=parts,
            EP=0 if count is None else triton.next_power_of_2(count),
            EVEN=k % tile == 0,
            BM=config.block_m,
            BN=config.block_n,
            KT=config.tiles_k,
            # One group would do where a tile has one, but a single column of scales would be
            # broadcast straight into the dot product's operand; carried through the loop in
            # another register layout, it makes the compiler pass the whole weight through shared
            # memory.
            GT=_groups_told_apart(step.GROUP, config.tiles_k),
            WIDE=x.device.type == "cpu",
            num_warps=config.warps,
            num_stages=config.stages,
        )
        if partial:
            block = 512
            _sum_splits[(triton.cdiv(m * n, block),)](
                target,
                out,
                m * n,
                n,
                SPLITS=splits,
                PARTS=parts,
                BLOCK=block,
                num_warps=4,
            )
    return out.reshape(*lead, n)


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
    config: Config | Fragments | Dense | None = None,
) -> torch.Tensor:
    """``marlin_gemm`` on arguments already checked; ``config`` overrides what is chosen."""
    weight = Weight(FORMS[f"int{bits}"], qweight, scales, qzeros, None, n, group_size)
    return _matmul(x, weight, g_idx_sort_indices, bias, config)


def tiles_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    form: str,
    n: int,
    k: int,
    group_size: int,
    config: Config | Dense | None = None,
) -> torch.Tensor:
    """``marlin_tiles_gemm`` on arguments already checked; ``config`` overrides what is chosen."""
    held = Weight(FORMS[form], weight, scale, zeros, factor, n, group_size)
    return _matmul(x, held, None, bias, config)


def grouped(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    form: str,
    n: int,
    k: int,
    group_size: int,
    config: Config | None = None,
) -> torch.Tensor:
    """``marlin_grouped`` on arguments already checked; ``config`` overrides what is chosen."""
    held = Weight(FORMS[form], weight, scale, zeros, factor, n, group_size)
    return _matmul(x, held, None, bias, config, Experts(rows, offsets))
