"""Integers as rows of bits, on the CPU and on accelerators alike."""

from __future__ import annotations

import torch


def signed(value: int, bits: int = 32) -> int:
    """The two's complement number with these bits: what torch takes for a signed integer dtype."""
    return value - (1 << bits) if value >> (bits - 1) else value


def as_words(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor's bytes as wider integers: its shape, but for the last dimension.

    It is copied only where it is not contiguous or not aligned.
    """
    # A dimension of one element may have any stride, and a view of another dtype would look at it.
    flat = tensor.contiguous().view(-1)
    if flat.data_ptr() % dtype.itemsize or flat.storage_offset() % (
        dtype.itemsize // tensor.element_size()
    ):
        flat = flat.clone()
    return flat.view(tensor.shape).view(dtype)


def exchange(
    shift: int, mask: int, low: torch.Tensor, high: torch.Tensor, swap: torch.Tensor
) -> None:
    """Swaps the upper fields of ``low`` with the lower fields of ``high``, in place.

    ``mask`` has ones in the lower field, of ``shift`` bits, of every two; ``swap`` is scratch. The
    step of the recursive block-swap transpose of Warren, "Hacker's Delight", section 7-3.
    """
    # The shift is arithmetic; the mask is zero where it brings in copies of the sign.
    torch.bitwise_right_shift(low, shift, out=swap)
    swap.bitwise_xor_(high).bitwise_and_(mask)
    high.bitwise_xor_(swap)
    low.bitwise_xor_(swap.bitwise_left_shift_(shift))
