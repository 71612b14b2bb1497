"""The Triton path of :mod:`ctconvert.transforms.reorder`: one kernel each way for every order.

Before: words i32 [N, K/f], K-packed codes of b = 4 or 8 bits.
After: the order's words, i32 and flat.

A program takes consecutive words of the layout. The words between which codes are exchanged are
read as tensors of their own, so that an exchange is shifts and masks within a thread; then the
compiler turns the block round through shared memory and it is stored as one run. Each byte is read
once and written once. Programs that run at a time take neighbouring words of the weight: the few
bytes of a row that each touches meet in the cache as whole lines.

The launchers also take CPU tensors where Triton's interpreter runs the kernels.
"""

# Kernel arguments have Triton's types, not Python's.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ctconvert.transforms.device import on_device
from ctconvert.transforms.reorder.order import FIELDS, Order


@triton.jit
def _exchange(low, high, shift: tl.constexpr, mask: tl.constexpr):
    """Swaps the upper fields of ``low`` with the lower fields of ``high``."""
    # The shift is arithmetic; the mask is zero where it brings in copies of the sign.
    swap = ((low >> shift) ^ high) & mask
    return low ^ (swap << shift), high ^ swap


# In the functions below word ijk of eight, or ij of four, is at i, j, k of the inner dimensions.


@triton.jit
def _exchange4(w00, w01, w10, w11, DIM: tl.constexpr, SHIFT: tl.constexpr, MASK: tl.constexpr):
    if DIM == 0:
        w00, w10 = _exchange(w00, w10, SHIFT, MASK)
        w01, w11 = _exchange(w01, w11, SHIFT, MASK)
    else:
        w00, w01 = _exchange(w00, w01, SHIFT, MASK)
        w10, w11 = _exchange(w10, w11, SHIFT, MASK)
    return w00, w01, w10, w11


@triton.jit
def _exchange8(
    a00, a01, a10, a11, b00, b01, b10, b11,
    DIM: tl.constexpr, SHIFT: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    if DIM == 0:
        a00, b00 = _exchange(a00, b00, SHIFT, MASK)
        a01, b01 = _exchange(a01, b01, SHIFT, MASK)
        a10, b10 = _exchange(a10, b10, SHIFT, MASK)
        a11, b11 = _exchange(a11, b11, SHIFT, MASK)
    else:
        a00, a01, a10, a11 = _exchange4(a00, a01, a10, a11, DIM - 1, SHIFT, MASK)
        b00, b01, b10, b11 = _exchange4(b00, b01, b10, b11, DIM - 1, SHIFT, MASK)
    return a00, a01, a10, a11, b00, b01, b10, b11


@triton.jit
def _joined(w00, w01, w10, w11):
    """[rows, tail] four times to [rows, tail, 2, 2]."""
    return tl.join(tl.join(w00, w10), tl.join(w01, w11))


@triton.jit
def _parted(words):
    """The inverse of :func:`_joined`."""
    first, second = tl.split(words)
    w00, w10 = tl.split(first)
    w01, w11 = tl.split(second)
    return w00, w01, w10, w11


@triton.jit
def _program(steps, each):
    """Which block of words the program takes: of ``steps`` by ``each``, the steps first."""
    pid = tl.program_id(0)
    return (pid % steps * each + pid // steps).to(tl.int64)


@triton.jit
def _places(
    pid, count, size1, size2, stride0, stride1, stride2, tail,
    ROWS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Offsets of the program's words [rows, tail] in the weight, and which of them exist."""
    row = pid * ROWS + tl.arange(0, ROWS)
    # The place of a row of words in the three outer dimensions.
    third = row % size2
    second = row // size2 % size1
    first = row // size2 // size1
    at = first * stride0 + second * stride1 + third * stride2
    at = at[:, None] + (tl.arange(0, TAIL) * tail)[None, :]
    return at, tl.broadcast_to((row < count)[:, None], [ROWS, TAIL])


@triton.jit
def _runs(
    pid, count, size1, size2, stride0, stride1, stride2, ROWS: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """:func:`_places` of runs of 2 * TAIL words, at multiples of so many: [rows, 2 * tail]."""
    at, inside = _places(pid, count, size1, size2, stride0, stride1, stride2, 1, ROWS, 2 * TAIL)
    return tl.max_contiguous(tl.multiple_of(at, (1, 2 * TAIL)), (1, 2 * TAIL)), inside


@triton.jit
def _load_run(at, inside, ROWS: tl.constexpr, TAIL: tl.constexpr):
    """The words at even and those at odd places of runs, [rows, tail] each."""
    return tl.split(tl.load(at, mask=inside, other=0).reshape(ROWS, TAIL, 2))


@triton.jit
def _store_run(at, even, odd, inside, ROWS: tl.constexpr, TAIL: tl.constexpr):
    """The inverse of :func:`_load_run`."""
    tl.store(at, tl.join(even, odd).reshape(ROWS, 2 * TAIL), mask=inside)


@triton.jit
def _consecutive(pid, total, run, GAP: tl.constexpr, WORDS: tl.constexpr):
    """Offsets of the program's words in the layout, and which of them exist."""
    word = pid * WORDS + tl.arange(0, WORDS)
    at = word
    if GAP:
        at += word // run * GAP
    return at, word < total


@triton.jit
def _reorder_kernel(
    words, flat, count, size1, size2, stride0, stride1, stride2, tail, in0, in1, in2, run, total,
    steps, each,
    DIMS: tl.constexpr, SHIFTS: tl.constexpr, MASKS: tl.constexpr, EXCHANGES: tl.constexpr,
    INNER: tl.constexpr, PAIR: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr, GAP: tl.constexpr,
):  # fmt: skip
    pid = _program(steps, each)
    if PAIR == -1:
        at, inside = _places(pid, count, size1, size2, stride0, stride1, stride2, tail, ROWS, TAIL)
    else:
        at, inside = _runs(pid, count, size1, size2, stride0, stride1, stride2, ROWS, TAIL)
    at += words
    if INNER == 2:
        if PAIR == 0:
            w00, w10 = _load_run(at, inside, ROWS, TAIL)
            w01, w11 = _load_run(at + in1, inside, ROWS, TAIL)
        elif PAIR == 1:
            w00, w01 = _load_run(at, inside, ROWS, TAIL)
            w10, w11 = _load_run(at + in0, inside, ROWS, TAIL)
        else:
            w00 = tl.load(at, mask=inside, other=0)
            w01 = tl.load(at + in1, mask=inside, other=0)
            w10 = tl.load(at + in0, mask=inside, other=0)
            w11 = tl.load(at + in0 + in1, mask=inside, other=0)
        for i in tl.static_range(EXCHANGES):
            w00, w01, w10, w11 = _exchange4(w00, w01, w10, w11, DIMS[i], SHIFTS[i], MASKS[i])
        x = _joined(w00, w01, w10, w11).permute(0, 2, 3, 1)
    else:
        a00 = tl.load(at, mask=inside, other=0)
        a01 = tl.load(at + in2, mask=inside, other=0)
        a10 = tl.load(at + in1, mask=inside, other=0)
        a11 = tl.load(at + in1 + in2, mask=inside, other=0)
        at += in0
        b00 = tl.load(at, mask=inside, other=0)
        b01 = tl.load(at + in2, mask=inside, other=0)
        b10 = tl.load(at + in1, mask=inside, other=0)
        b11 = tl.load(at + in1 + in2, mask=inside, other=0)
        for i in tl.static_range(EXCHANGES):
            a00, a01, a10, a11, b00, b01, b10, b11 = _exchange8(
                a00, a01, a10, a11, b00, b01, b10, b11, DIMS[i], SHIFTS[i], MASKS[i]
            )
        x = tl.join(_joined(a00, a01, a10, a11), _joined(b00, b01, b10, b11))
        x = x.permute(0, 4, 2, 3, 1)
    WIDTH: tl.constexpr = TAIL << INNER
    word, inside = _consecutive(pid, total, run, GAP, ROWS * WIDTH)
    tl.store(flat + word, x.reshape(ROWS * WIDTH), mask=inside)


@triton.jit
def _restore_kernel(
    words, flat, count, size1, size2, stride0, stride1, stride2, tail, in0, in1, in2, run, total,
    steps, each,
    DIMS: tl.constexpr, SHIFTS: tl.constexpr, MASKS: tl.constexpr, EXCHANGES: tl.constexpr,
    INNER: tl.constexpr, PAIR: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr, GAP: tl.constexpr,
):  # fmt: skip
    pid = _program(steps, each)
    if PAIR == -1:
        at, inside = _places(pid, count, size1, size2, stride0, stride1, stride2, tail, ROWS, TAIL)
    else:
        at, inside = _runs(pid, count, size1, size2, stride0, stride1, stride2, ROWS, TAIL)
    at += words
    WIDTH: tl.constexpr = TAIL << INNER
    word, exists = _consecutive(pid, total, run, GAP, ROWS * WIDTH)
    x = tl.load(flat + word, mask=exists, other=0)
    if INNER == 2:
        w00, w01, w10, w11 = _parted(x.reshape(ROWS, 2, 2, TAIL).permute(0, 3, 1, 2))
        for i in tl.static_range(EXCHANGES):
            w00, w01, w10, w11 = _exchange4(w00, w01, w10, w11, DIMS[i], SHIFTS[i], MASKS[i])
        if PAIR == 0:
            _store_run(at, w00, w10, inside, ROWS, TAIL)
            _store_run(at + in1, w01, w11, inside, ROWS, TAIL)
        elif PAIR == 1:
            _store_run(at, w00, w01, inside, ROWS, TAIL)
            _store_run(at + in0, w10, w11, inside, ROWS, TAIL)
        else:
            tl.store(at, w00, mask=inside)
            tl.store(at + in1, w01, mask=inside)
            tl.store(at + in0, w10, mask=inside)
            tl.store(at + in0 + in1, w11, mask=inside)
    else:
        a, b = tl.split(x.reshape(ROWS, 2, 2, 2, TAIL).permute(0, 4, 2, 3, 1))
        a00, a01, a10, a11 = _parted(a)
        b00, b01, b10, b11 = _parted(b)
        for i in tl.static_range(EXCHANGES):
            a00, a01, a10, a11, b00, b01, b10, b11 = _exchange8(
                a00, a01, a10, a11, b00, b01, b10, b11, DIMS[i], SHIFTS[i], MASKS[i]
            )
        tl.store(at, a00, mask=inside)
        tl.store(at + in2, a01, mask=inside)
        tl.store(at + in1, a10, mask=inside)
        tl.store(at + in1 + in2, a11, mask=inside)
        at += in0
        tl.store(at, b00, mask=inside)
        tl.store(at + in2, b01, mask=inside)
        tl.store(at + in1, b10, mask=inside)
        tl.store(at + in1 + in2, b11, mask=inside)


# Words of one program, and its warps.
_WORDS, _WARPS = 4096, 4


def reorder(words: torch.Tensor, flat: torch.Tensor, order: Order) -> None:
    """K-packed words i32 [N, K/f] into ``flat``; both contiguous."""
    pair = _pair(order) if order.tail[0] >= 8 else -1  # shorter runs meet in the first cache
    _launch(_reorder_kernel, words, flat, order, order.exchanges, pair)


def restore(flat: torch.Tensor, words: torch.Tensor, order: Order) -> None:
    """The inverse: ``flat`` into ``words`` i32 [N, K/f]; both contiguous."""
    _launch(_restore_kernel, words, flat, order, order.exchanges[::-1], _pair(order))


def _launch(
    kernel: triton.JITFunction,
    words: torch.Tensor,
    flat: torch.Tensor,
    order: Order,
    exchanges: tuple[tuple[int, int], ...],
    pair: int,
) -> None:
    outer = ((1, 0), *order.outer)[-3:]
    inner = [stride for _, stride in order.inner]
    size, tail = order.tail
    width = size << len(inner)
    count = order.words // width
    rows = _WORDS // width
    programs, steps = triton.cdiv(count, rows), order.outer[0][0]
    if count // steps % rows:  # a program would take the end of one step and the next one's start
        steps = 1
    with on_device(words.device):
        kernel[(programs,)](
            words,
            flat,
            count,
            outer[1][0],
            outer[2][0],
            *(stride for _, stride in outer),
            tail,
            *[*inner, 0][:3],
            order.run,
            order.words,
            steps,
            programs // steps,
            DIMS=tuple(dim for dim, _ in exchanges),
            SHIFTS=tuple(shift for _, shift in exchanges),
            MASKS=tuple(FIELDS[shift] for _, shift in exchanges),
            EXCHANGES=len(exchanges),
            INNER=len(inner),
            PAIR=pair,
            ROWS=rows,
            TAIL=size,
            GAP=order.gap,
            num_warps=_WARPS,
        )


def _pair(order: Order) -> int:
    """The inner dimension whose two words and the tail's are one run of words; -1: none is.

    Such runs are read and written whole; word by word a store would take as many transactions.
    """
    size, stride = order.tail
    strides = [stride for _, stride in order.inner]
    if len(strides) != 2 or stride != 2 or 1 not in strides:
        return -1
    others = [stride for _, stride in (*order.outer, *order.inner) if stride != 1]
    return -1 if any(other % (2 * size) for other in others) else strides.index(1)
