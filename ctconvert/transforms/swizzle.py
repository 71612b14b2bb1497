"""The 128 x 4 swizzle of block scales, as Blackwell's block-scaled tensor cores read them.

Before: bytes [N, G], a scale for every row and group.
After: bytes [Np, Q], N rounded up to 128 and G to 4, what is added being 0. The byte of (n, g) is
at flat offset::

    ((n // 128) * (Q // 4) + g // 4) * 512 + (n % 32) * 16 + (n // 32 % 4) * 4 + g % 4

The layout of vLLM's ``swizzle_blockscale`` (vllm/model_executor/layers/quantization/utils/
quant_utils.py), of FlashInfer's ``SfLayout.layout_128x4`` and of cuBLAS's 1D block scaling factors:
E4M3 scales of NVFP4, E8M0 scales of MXFP8 and MXFP4.

CPU tensors take the torch code of this file, CUDA and XPU tensors the Triton kernels of
:mod:`ctconvert.transforms.swizzle_triton`; the results are equal bit for bit.
"""

from __future__ import annotations

import torch

ROWS = 128
COLUMNS = 4


def swizzled_shape(n: int, groups: int) -> tuple[int, int]:
    """[Np, Q] of the scales [N, G]."""
    return -(-n // ROWS) * ROWS, -(-groups // COLUMNS) * COLUMNS


def swizzle_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales [N, G] of a one-byte dtype to [Np, Q] of the same.

    Raises ValueError for another dtype or rank.
    """
    _check(scales)
    n, groups = scales.shape
    if not scales.numel():
        return scales.new_empty(swizzled_shape(n, groups))
    raw = scales.contiguous().view(torch.uint8)
    if _has_kernels(raw):
        from ctconvert.transforms import swizzle_triton

        return swizzle_triton.swizzle(raw).view(scales.dtype)
    height, width = swizzled_shape(n, groups)
    if (height, width) != (n, groups):
        raw = torch.nn.functional.pad(raw, (0, width - groups, 0, height - n))
    rows = _words(raw).unflatten(0, (-1, COLUMNS, ROWS // COLUMNS))
    made = rows.permute(0, 3, 2, 1).clone(memory_format=torch.contiguous_format)
    return made.view(torch.uint8).view(height, width).view(scales.dtype)


def unswizzle_scales(swizzled: torch.Tensor, n: int, groups: int) -> torch.Tensor:
    """The inverse of :func:`swizzle_scales`: [Np, Q] to [N, G].

    Raises ValueError for another dtype, a shape that is not that of ``n`` x ``groups``, or padding
    that is not 0.
    """
    _check(swizzled)
    height, width = swizzled_shape(n, groups)
    if tuple(swizzled.shape) != (height, width):
        raise ValueError(
            f"swizzled scales of {n} x {groups} are [{height}, {width}], not {list(swizzled.shape)}"
        )
    if not swizzled.numel():
        return swizzled.new_empty((n, groups))
    raw = swizzled.contiguous().view(torch.uint8)
    _check_padding(raw, n, groups)
    if _has_kernels(raw):
        from ctconvert.transforms import swizzle_triton

        return swizzle_triton.unswizzle(raw, n, groups).view(swizzled.dtype)
    rows = _words(raw).view(height // ROWS, width // COLUMNS, ROWS // COLUMNS, COLUMNS)
    made = rows.permute(0, 3, 2, 1).clone(memory_format=torch.contiguous_format)
    made = made.view(torch.uint8).view(height, width)[:n, :groups]
    return made.contiguous().view(swizzled.dtype)


def _words(raw: torch.Tensor) -> torch.Tensor:
    """Four groups of a row as a word."""
    return (raw if raw.storage_offset() % COLUMNS == 0 else raw.clone()).view(torch.int32)


def _check_padding(raw: torch.Tensor, n: int, groups: int) -> None:
    """What was added lies in the last rows of tiles and the last column of tiles."""
    tiles = raw.view(raw.shape[0] // ROWS, raw.shape[1] // COLUMNS, 32, COLUMNS, COLUMNS)
    wrong = []
    if columns := groups % COLUMNS:
        wrong.append(tiles[:, -1, :, :, columns:])
    if rows := n % ROWS:
        by_row = tiles[-1:].transpose(2, 3).flatten(2, 3)
        wrong.append(by_row[:, :, rows:])
    if any(part.numel() and bool(part.any()) for part in wrong):
        raise ValueError("the padding of the swizzled scales is not 0")


def _check(scales: torch.Tensor) -> None:
    if scales.element_size() != 1 or scales.dim() != 2:
        raise ValueError(
            f"scales must be 2-D of a one-byte dtype, not {scales.dtype} {list(scales.shape)}"
        )


def _has_kernels(tensor: torch.Tensor) -> bool:
    return tensor.device.type in ("cuda", "xpu")
