"""Layouts that permute the bits of a code's position: one engine, a record for each layout.

Before: words i32 [N, K/f], K-packed codes of b = 4 or 8 bits, f = 32/b codes a word.
After: the same number of words in another order, each with another choice of codes.

Such a layout is an :class:`Order`: its words one after the other are the elements of a strided view
of the words before, but for the codes in them; and those come by exchanges. An exchange trades one
bit of a code's place in its word for one bit of the word's place: of two words, the upper fields of
the first for the lower fields of the second, as in the recursive block-swap transpose of Warren,
"Hacker's Delight", section 7-3. It is its own inverse, so the way back is the exchanges in reverse.

CPU tensors take :mod:`ctconvert.transforms.reorder.blocks`, CUDA and XPU tensors the Triton kernel
of :mod:`ctconvert.transforms.reorder.kernel`; the results are equal bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctconvert.transforms.reorder.order import Order

if TYPE_CHECKING:
    import torch


def check_bits(bits: int) -> None:
    """Raises ValueError unless ``bits`` is 4 or 8."""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits}")


def check_words(words: torch.Tensor, shape: tuple[int, ...] | None, name: str) -> None:
    """Raises ValueError unless ``words`` is i32, 2-D or of ``shape``."""
    import torch

    if words.dtype != torch.int32 or words.dim() != len(shape or (0, 0)):
        raise ValueError(
            f"{name} must be a {len(shape or (0, 0))}-D torch.int32 tensor, not {words.dtype} "
            f"{list(words.shape)}"
        )
    if shape is not None and tuple(words.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, not {list(words.shape)}")


def check_multiples(layout: str, n: int, k: int, of_n: int, of_k: int) -> None:
    """Raises ValueError unless N x K is whole blocks of ``layout``."""
    if n % of_n or k % of_k:
        raise ValueError(
            f"{layout} needs N % {of_n} == 0 and K % {of_k} == 0; this is N = {n}, K = {k}"
        )


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether the tensor's device takes the Triton kernels."""
    return tensor.device.type in ("cuda", "xpu")


def reorder(words: torch.Tensor, order: Order, out: torch.Tensor | None = None) -> torch.Tensor:
    """K-packed words i32 [N, K/f] to the order's words, i32 and flat, in a new tensor or ``out``.

    Where the order has gaps ``out`` is needed, i32, flat and contiguous, and its gaps stay as they
    are. Safe to call from several threads; on the CPU each needs about 512 KiB beside input and
    output. The caller checks dtype and shape.
    """
    words = words.contiguous()
    out = words.new_empty(order.words) if out is None else out
    if order.words:
        _path(words).reorder(words, out, order)
    return out


def restore(flat: torch.Tensor, order: Order) -> torch.Tensor:
    """The exact inverse of :func:`reorder`: as many i32 words of any shape to i32 [N, K/f]."""
    flat = flat.contiguous()
    words = flat.new_empty((order.n, order.row_words))
    if order.words:
        _path(flat).restore(flat.view(-1), words, order)
    return words


def _path(tensor: torch.Tensor):  # type: ignore[no-untyped-def]
    """The module that does the work for the tensor's device."""
    if has_kernels(tensor):
        from ctconvert.transforms.reorder import kernel

        return kernel
    from ctconvert.transforms.reorder import blocks

    return blocks
