"""Codes that kernels store as other codes: every code for itself, at its place, invertibly.

Before and after: i32 words of any shape, each of eight 4-bit or four 8-bit codes.

- :func:`negate_nibbles`: offset codes q + 8 as the sign and magnitude of CUTLASS' W4A8;
- :func:`humming_bytes`: offset codes q + 128 as the bytes that Humming reads as bfloat16.

CPU tensors take the torch code of this file, CUDA and XPU tensors the Triton kernel of
:mod:`ctconvert.transforms.recode.kernel`; the results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ctconvert.transforms.reorder import has_kernels
from ctconvert.transforms.threads import GRAIN, spread


def negate_nibbles(words: torch.Tensor) -> None:
    """Codes q + 8 to the nibbles of q mod 16, but 8 - q where q is 1 to 7; i32, in place.

    A nibble of 8 or more is q + 16 of a negative q, one below is 8 - q of a positive one, and 0 is
    0 (vLLM: ``cutlass_encode_and_reorder_int4b``).
    """
    _recode(words, "negate")


def restore_nibbles(words: torch.Tensor) -> None:
    """Exact inverse of :func:`negate_nibbles`."""
    _recode(words, "unnegate")


def humming_bytes(words: torch.Tensor) -> None:
    """Codes u to the bytes u - 128 where u >= 128, else 255 - u; i32, in place.

    That is sign (the top bit) and magnitude of q = u - 128, a negative q having magnitude -1 - q
    (Humming: the INT8 weights of bfloat16 activations).
    """
    _recode(words, "bytes")


def restore_bytes(words: torch.Tensor) -> None:
    """Exact inverse of :func:`humming_bytes`."""
    _recode(words, "unbytes")


def _recode(words: torch.Tensor, kind: str) -> None:
    """Raises ValueError unless ``words`` is i32, contiguous and of an even number of elements."""
    if words.dtype != torch.int32 or not words.is_contiguous() or words.numel() % 2:
        raise ValueError(
            "words must be contiguous torch.int32, an even number of them, not "
            f"{words.dtype} {list(words.shape)}"
        )
    if has_kernels(words):
        from ctconvert.transforms.recode import kernel

        kernel.recode(words, kind)
        return

    def work(blocks: Sequence[torch.Tensor]) -> None:
        scratch = torch.zeros((2, min(words.numel(), GRAIN)), dtype=torch.int32)
        for block in blocks:
            _PATHS[kind](block, *scratch[:, : block.numel()])

    spread(work, words.view(-1).split(GRAIN), words.nbytes)


# In each x is changed in place, y and z are scratch, all i32. Shifts and masks are of 64 bits, two
# words at once, and sums and products of 32: the faster ones. The mask behind a shift removes
# copies of the sign and bits of the other word.

_TOPS = -0x7777777777777778  # the i64 of 0x8888888888888888
_LOWS = 0x7777777777777777
_BYTE_TOPS = -0x7F7F7F7F7F7F7F80  # of 0x8080808080808080


def _negate(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> None:
    """Positive and zero: q + 8 has the top bit; its lower three are negated mod 8."""
    codes, tops = x.view(torch.int64), y.view(torch.int64)
    torch.bitwise_and(codes, _TOPS, out=tops)
    codes.bitwise_xor_(tops)  # the lower three bits
    ones = z.view(torch.int64)
    torch.bitwise_right_shift(tops, 3, out=ones)
    ones.bitwise_and_(0x1111111111111111)
    y.sub_(z)  # 7 in the codes with a top bit
    x.bitwise_xor_(y).add_(z)
    codes.bitwise_and_(_LOWS)
    y.add_(z)
    codes.bitwise_or_(tops.bitwise_xor_(_TOPS))


def _unnegate(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> None:
    """After the top bits are turned over, what was negated is negated again."""
    codes = x.view(torch.int64)
    codes.bitwise_xor_(_TOPS)
    _negate(x, y, z)
    codes.bitwise_xor_(_TOPS)


def _to_bytes(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> None:
    """Turns the top bits over, and the lower seven where the top one was 0."""
    _turn_lower(x, y)
    x.bitwise_not_()


def _from_bytes(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> None:
    """Turns the top bits over, and the lower seven where the top one was 1."""
    _turn_lower(x, y)
    x.view(torch.int64).bitwise_xor_(_BYTE_TOPS)


def _turn_lower(x: torch.Tensor, y: torch.Tensor) -> None:
    """Turns the lower seven bits over where the top one is 1."""
    tops = y.view(torch.int64)
    torch.bitwise_right_shift(x.view(torch.int64), 7, out=tops)
    tops.bitwise_and_(0x0101010101010101)
    x.bitwise_xor_(y.mul_(0x7F))


_PATHS = {"negate": _negate, "unnegate": _unnegate, "bytes": _to_bytes, "unbytes": _from_bytes}
