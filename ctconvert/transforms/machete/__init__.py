"""Machete's prepacked weights: INT4 and INT8 for Hopper's mixed-input GEMM.

Before (N output features, K input features, b = 4 or 8 bits, f = 32/b codes a word)::

    words  i32 [N, K/f]     K-packed: code k of row n at bits b*(k%f) of word k//f

After::

    words  i32 [K*b/32, N]  memory of that size; its shape says nothing of where a code is

Blocks of 64 k by 16 n follow one another, the n of a block of k first. With n % 16 split into bits
(n3 n2 n1 n0) from high to low and k % 64 into (k5 .. k0), a code's place in its block is::

    b = 4:  word (n2 n1 n0 k2 k1 k5 k4), code (k0 k3 n3)
    b = 8:  word (n2 n1 n0 k2 k1 k5 k4 k3), code (n3 k0)

This is what vLLM's ``machete_prepack_B`` (csrc/quantization/machete) makes for 16-bit activations,
and its ``[K*b/32, N]`` tensor as it lies in memory.

CPU tensors take torch code, CUDA and XPU tensors a Triton kernel, both of
:mod:`ctconvert.transforms.reorder`; the results are equal bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctconvert.transforms import reorder
from ctconvert.transforms.reorder import Order

if TYPE_CHECKING:
    import torch

#: What N and K must be multiples of: the block that the library prepacks.
BLOCK_N, BLOCK_K = 128, 64


def machete_padded_shape(n: int, k: int) -> tuple[int, int]:
    """The smallest N x K that holds ``n`` x ``k`` and can be prepacked."""
    return -(-n // BLOCK_N) * BLOCK_N, -(-k // BLOCK_K) * BLOCK_K


def check_shape(n: int, k: int) -> None:
    """Raises ValueError unless N % 128 == 0 and K % 64 == 0."""
    reorder.check_multiples("Machete", n, k, BLOCK_N, BLOCK_K)


def machete_pack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """K-packed codes i32 [N, K/f] to prepacked memory i32 [K*b/32, N].

    Safe to call from several threads. Raises ValueError for another dtype, rank or width than 4 and
    8, or unless N % 128 == 0 and K % 64 == 0.
    """
    reorder.check_bits(bits)
    reorder.check_words(words, None, "words")
    n, k = words.shape[0], words.shape[1] * 32 // bits
    check_shape(n, k)
    return reorder.reorder(words, _order(n, k, bits)).view(k * bits // 32, n)


def machete_unpack(packed: torch.Tensor, bits: int, n: int, k: int) -> torch.Tensor:
    """Exact inverse of :func:`machete_pack`: i32 [K*b/32, N] to words i32 [N, K/f].

    Raises ValueError for another dtype or width, or a shape that is not that of ``n`` x ``k``.
    """
    reorder.check_bits(bits)
    check_shape(n, k)
    reorder.check_words(packed, (k * bits // 32, n), "the prepacked weight")
    return reorder.restore(packed, _order(n, k, bits))


def _order(n: int, k: int, bits: int) -> Order:
    row = k * bits // 32
    rows = (n // 16, 16 * row), (8, row)
    if bits == 4:
        # Dimensions n3 and k3 take the bits k2 and k1 that leave the words.
        return Order(
            bits,
            n,
            k,
            outer=((k // 64, 8), *rows),
            inner=((2, 8 * row), (2, 1)),
            tail=(4, 2),  # k5 k4
            exchanges=((0, 4), (1, 8), (0, 16)),
            block=(32, 16),
        )
    return Order(
        bits,
        n,
        k,
        outer=((k // 64, 16), *rows),
        inner=((2, 1), (2, 8 * row)),  # k2, and n3 that takes k1
        tail=(8, 2),  # k5 k4 k3
        exchanges=((1, 16),),
        block=(16, 16),
    )


def machete_zero_points(scales: torch.Tensor, zero_points: torch.Tensor) -> torch.Tensor:
    """What the kernel adds where codes have a zero point: ``-scale * zero_point``.

    ``scales`` [groups, N] in a 16-bit float, ``zero_points`` u8 codes [groups, N]; the result is in
    the scales' dtype, rounded once, so the zero points cannot always be read from it (vLLM:
    ``MacheteLinearKernel.process_weights_after_loading``). Raises ValueError for other dtypes or
    unequal shapes.
    """
    import torch

    if scales.dtype not in (torch.float16, torch.bfloat16) or zero_points.dtype != torch.uint8:
        raise ValueError(
            "scales must be 16-bit floats and zero points torch.uint8, not "
            f"{scales.dtype} and {zero_points.dtype}"
        )
    if scales.shape != zero_points.shape:
        raise ValueError(
            f"scales {list(scales.shape)} and zero points {list(zero_points.shape)} differ in shape"
        )
    return (-1.0 * scales * zero_points.to(scales.dtype)).contiguous()
