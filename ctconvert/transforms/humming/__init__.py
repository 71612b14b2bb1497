"""Humming's weights for 16-bit activations: Marlin's tiles with differences.

Before (N output features, K input features, b = 4 or 8 bits, f = 32/b codes a word)::

    words        i32 [N, K/f]     K-packed; NVFP4's u8 [N, K/2], low nibble first, are such words
    scales       [groups, N]      any dtype of 1, 2 or 4 bytes: floats, NVFP4's e4m3, E8M0
    zero points  u8 [groups, N]   codes

After::

    tiles        i32 [K/16, N*16/f]
    scales       [groups, N]         in their own dtype
    zero points  i32 [groups, N*b/32]

Tiles and the orders along N are those of :mod:`ctconvert.transforms.marlin`. The differences: INT8
codes that meet bfloat16 activations are stored as sign and magnitude; one- and two-byte scales
alike take one order, without the shuffle of four that Marlin's FP4 path adds, and keep their bytes;
zero points are packed without the interleave.

Source: the humming-kernels library, its repacking of weights, scales and zero points for 16-bit
activations on SM90.

CPU tensors take torch code, CUDA and XPU tensors Triton kernels; the results are equal bit for bit.
"""

from __future__ import annotations

import torch

from ctconvert.transforms.marlin import (
    marlin_pack,
    marlin_permute_scales,
    marlin_unpack,
    marlin_unpermute_scales,
)
from ctconvert.transforms.packed import pack, unpack
from ctconvert.transforms.recode import humming_bytes, restore_bytes

#: What the kernel pads N and K to.
BLOCK_N, BLOCK_K = 256, 128


def humming_padded_shape(n: int, k: int) -> tuple[int, int]:
    """The smallest N x K that holds ``n`` x ``k`` and that the kernel takes."""
    return -(-n // BLOCK_N) * BLOCK_N, -(-k // BLOCK_K) * BLOCK_K


def humming_pack(words: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """K-packed codes i32 [N, K/f] to tiles i32 [K/16, N*16/f], for activations of ``dtype``.

    INT codes q + 2^(b-1), or FP4's (``bits`` 4). Only 8 bits with bfloat16 differ from
    :func:`ctconvert.transforms.marlin.marlin_pack`, whose errors these are: ValueError for another
    width than 4 and 8, N % 64 or K % 16. The kernel asks for N % 256 and K % 128.
    """
    _check_dtype(dtype)
    tiles = marlin_pack(words, bits)
    if _as_bytes(bits, dtype):  # each byte for itself: before or after makes no difference
        humming_bytes(tiles)
    return tiles


def humming_unpack(
    tiles: torch.Tensor, bits: int, n: int, k: int, dtype: torch.dtype
) -> torch.Tensor:
    """Exact inverse of :func:`humming_pack`: tiles i32 [K/16, N*16/f] to words i32 [N, K/f]."""
    _check_dtype(dtype)
    words = marlin_unpack(tiles, bits, n, k)
    if _as_bytes(bits, dtype):
        restore_bytes(words)
    return words


def _as_bytes(bits: int, dtype: torch.dtype) -> bool:
    return bits == 8 and dtype == torch.bfloat16


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"activations are torch.float16 or torch.bfloat16, not {dtype}")


def humming_permute_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales [groups, N] in the kernel's order along N; a single row in the channel-wise one.

    Dtype and bytes stay. Raises ValueError unless 2-D with N a multiple of 64.
    """
    return marlin_permute_scales(scales, channelwise=scales.shape[0] == 1)


def humming_unpermute_scales(scales: torch.Tensor) -> torch.Tensor:
    """Exact inverse of :func:`humming_permute_scales`."""
    return marlin_unpermute_scales(scales, channelwise=scales.shape[0] == 1)


def humming_pack_zero_points(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points u8 [groups, N] to i32 [groups, N*b/32], b = 4 for ``bits`` to 4, else 8.

    In the grouped order along N, whatever the scales' is, and code i of a word is that of position
    i of it. Raises ValueError for another dtype, N % 64, or a code of 2^b or more.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"zero points must be torch.uint8 codes, not {codes.dtype}")
    return pack(marlin_permute_scales(codes, channelwise=False), _stored_bits(bits))


def humming_unpack_zero_points(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Exact inverse of :func:`humming_pack_zero_points`: i32 [groups, N*b/32] to u8 [groups, N]."""
    stored = _stored_bits(bits)
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(
            f"zero points must be 2-D torch.int32 words, not {words.dtype} {list(words.shape)}"
        )
    codes = unpack(words, stored, words.shape[1] * 32 // stored)
    return marlin_unpermute_scales(codes, channelwise=False)


def _stored_bits(bits: int) -> int:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, not {bits}")
    return 4 if bits <= 4 else 8


def humming_global_scale(divisor: torch.Tensor) -> torch.Tensor:
    """NVFP4's global scale f32 [1], a divisor d, to the factor 1/d that the kernel takes.

    Not always invertible; the caller keeps d. Raises ValueError for another dtype, or where d or
    1/d is 0, infinite or NaN.
    """
    if divisor.dtype != torch.float32:
        raise ValueError(f"the global scale must be torch.float32, not {divisor.dtype}")
    factor = 1.0 / divisor
    for value in (divisor, factor):
        if not bool((value.isfinite() & (value != 0)).all()):
            raise ValueError(
                f"global scale {divisor.flatten().tolist()}: it or its reciprocal is 0, infinite "
                "or NaN"
            )
    return factor
