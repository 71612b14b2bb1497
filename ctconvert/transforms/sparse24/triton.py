"""Launchers of the Triton kernels of the 2:4 transforms, which ``kernels.py`` describes.

They take CPU tensors as well where Triton's interpreter is on.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ctconvert.transforms.device import on_device
from ctconvert.transforms.shapes import sm90_meta_shape
from ctconvert.transforms.sparse24 import kernels
from ctconvert.transforms.sparse24.cpu import from_kernel_order
from ctconvert.transforms.sparse24.errors import (
    raise_dense_error,
    raise_drop_error,
    raise_mask_error,
    raise_meta_error,
)
from ctconvert.transforms.sparse24.groups import GROUP_DTYPE, PAIR_DTYPE
from ctconvert.transforms.words import as_words

_NO_ERROR = (1 << 63) - 1

# Units in one program of the bitmask kernels, and its warps, by element size.
_FLAT_TILES = {
    "decompress": {1: (256, 4), 2: (256, 4)},
    "compress": {1: (256, 2), 2: (128, 4)},
    "mask": {1: (256, 2), 2: (128, 4)},
}
# 128-column blocks in one program of the SM90 kernels, and its warps, by element size.
_BLOCK_TILES = {
    "sm90_compress": {1: (1, 8), 2: (2, 8)},
    "sm90_decompress": {1: (2, 8), 2: (1, 4)},
}


def bitmask_decompress_triton(compressed: Tensor, bitmask: Tensor, k: int) -> Tensor:
    """`bitmask_decompress` on the tensors' device."""
    error = _error_word(compressed.device)
    dense = launch_bitmask_decompress(compressed, bitmask, k, error)
    rows = _wrong_rows(error, k // 4)
    if rows is not None:
        raise_mask_error(bitmask[rows].cpu(), k, rows.start)
    return dense


def bitmask_compress_triton(dense: Tensor, bitmask: Tensor) -> Tensor:
    """`bitmask_compress` on the tensors' device."""
    error = _error_word(dense.device)
    compressed = launch_bitmask_compress(dense, bitmask, error)
    rows = _wrong_rows(error, dense.shape[1] // 4)
    if rows is not None:
        raise_drop_error(dense[rows].cpu(), bitmask[rows].cpu(), rows.start)
    return compressed


def bitmask_of_triton(dense: Tensor) -> Tensor:
    """`bitmask_of` on the tensor's device."""
    error = _error_word(dense.device)
    bitmask = launch_bitmask_of(dense, error)
    rows = _wrong_rows(error, dense.shape[1] // 4)
    if rows is not None:
        raise_dense_error(dense[rows].cpu(), rows.start)
    return bitmask


def sm90_compress_triton(dense: Tensor) -> tuple[Tensor, Tensor]:
    """`sm90_compress` on the tensor's device."""
    error = _error_word(dense.device)
    values, meta = launch_sm90_compress(dense, error)
    row = _first_error(error)
    if row is not None:
        raise_dense_error(dense[row : row + 1].cpu(), row)
    return values, meta


def sm90_decompress_triton(values: Tensor, meta: Tensor, n: int, k: int) -> Tensor:
    """`sm90_decompress` on the tensors' device."""
    error = _error_word(values.device)
    dense = launch_sm90_decompress(values, meta, n, k, error)
    row = _first_error(error)
    if row is not None:
        # The metadata of the 64 rows around it, as if they were the whole weight.
        start = row // 64 * 64
        block = meta.reshape(meta.shape[1] // 16, -1, 1024)[:, row // 64].reshape(64, -1)
        nibbles = from_kernel_order(block.cpu(), values.element_size())
        rows = values[start : start + 64].cpu()
        raise_meta_error(rows, nibbles, rows.shape[0], k, start)
    return dense


def launch_bitmask_decompress(compressed: Tensor, bitmask: Tensor, k: int, error: Tensor) -> Tensor:
    """Dense weight; ``error`` i64 [1] is lowered to a wrong unit's first group, and not read."""
    size, n = compressed.element_size(), compressed.shape[0]
    dense = torch.empty((n, k), dtype=compressed.dtype, device=compressed.device)
    pairs = as_words(compressed, PAIR_DTYPE[size])
    _launch_flat(
        "decompress",
        kernels.decompress_kernel,
        (pairs,),
        bitmask,
        (dense.view(GROUP_DTYPE[size]),),
        error,
        (n, k, size),
    )
    return dense


def launch_bitmask_compress(dense: Tensor, bitmask: Tensor, error: Tensor) -> Tensor:
    """Kept values; ``error`` as in `launch_bitmask_decompress`."""
    size = dense.element_size()
    n, k = dense.shape
    compressed = torch.empty((n, k // 2), dtype=dense.dtype, device=dense.device)
    groups = as_words(dense, GROUP_DTYPE[size])
    _launch_flat(
        "compress",
        kernels.compress_kernel,
        (groups,),
        bitmask,
        (compressed.view(PAIR_DTYPE[size]),),
        error,
        (n, k, size),
    )
    return compressed


def launch_bitmask_of(dense: Tensor, error: Tensor) -> Tensor:
    """Bitmask; ``error`` as in `launch_bitmask_decompress`."""
    size = dense.element_size()
    n, k = dense.shape
    bitmask = torch.empty((n, -(-k // 8)), dtype=torch.uint8, device=dense.device)
    groups = as_words(dense, GROUP_DTYPE[size])
    _launch_flat("mask", kernels.mask_kernel, (groups,), bitmask, (), error, (n, k, size))
    return bitmask


def launch_sm90_compress(dense: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Values and metadata; ``error`` i64 [1] is lowered to the first wrong row, and not read."""
    size = dense.element_size()
    n, k = dense.shape
    values = torch.empty((n, k // 2), dtype=dense.dtype, device=dense.device)
    meta = torch.empty(sm90_meta_shape(n, k), dtype=torch.uint8, device=dense.device)
    groups = as_words(dense, GROUP_DTYPE[size])
    tensors = (groups, values.view(PAIR_DTYPE[size]), meta.view(torch.int16))
    flags = {"SIZE": size, "WHOLE": k % 16 == 0}
    _launch_blocks(
        "sm90_compress", kernels.sm90_compress_kernel, tensors, error, (n, k, size), flags
    )
    return values, meta


def launch_sm90_decompress(values: Tensor, meta: Tensor, n: int, k: int, error: Tensor) -> Tensor:
    """Dense weight; ``error`` as in `launch_sm90_compress`."""
    size = values.element_size()
    dense = torch.empty((n, k), dtype=values.dtype, device=values.device)
    pairs = as_words(values, PAIR_DTYPE[size])
    units = as_words(meta, torch.int16)
    tensors = (pairs, units, dense.view(GROUP_DTYPE[size]))
    flags = {"SIZE": size, "WHOLE": k % 16 == 0}
    _launch_blocks(
        "sm90_decompress", kernels.sm90_decompress_kernel, tensors, error, (n, k, size), flags
    )
    return dense


def _launch_flat(
    name: str,
    kernel: Any,
    inputs: tuple[Tensor, ...],
    bitmask: Tensor,
    outputs: tuple[Tensor, ...],
    error: Tensor,
    weight: tuple[int, int, int],
) -> None:
    n, k, size = weight
    if n == 0:
        return
    units, warps = _FLAT_TILES[name][size]
    rows, groups = (1, n * k // 4) if k % 8 == 0 else (n, k // 4)
    mask, stride = bitmask.contiguous(), bitmask.shape[1]
    word = groups % 4 == 0 and rows == 1
    if word:
        mask = as_words(mask.view(1, -1), torch.int16)
    units = min(units, triton.next_power_of_2(triton.cdiv(groups, 4)))
    grid = (rows * triton.cdiv(groups, units * 4),)
    with on_device(error.device):
        kernel[grid](
            *inputs,
            mask,
            *outputs,
            error,
            groups,
            stride,
            SIZE=size,
            WORD=word,
            UNITS=units,
            num_warps=warps,
        )


def _launch_blocks(
    name: str,
    kernel: Any,
    tensors: tuple[Tensor, ...],
    error: Tensor,
    weight: tuple[int, int, int],
    flags: dict[str, Any],
) -> None:
    n, k, size = weight
    if n == 0:
        return
    blocks, warps = _BLOCK_TILES[name][size]
    blocks = min(blocks, triton.next_power_of_2(triton.cdiv(k, 128)))
    grid = (triton.cdiv(k, 128 * blocks), triton.cdiv(n, 64))
    with on_device(error.device):
        kernel[grid](
            *tensors,
            error,
            n,
            k // 4,
            EVEN=n % 64 == 0 and k % (128 * blocks) == 0,
            BLOCKS=blocks,
            num_warps=warps,
            **flags,
        )


# Error words that hold _NO_ERROR, by device. A launch takes one out; only a word that was read
# and found untouched comes back, so none is ever shared or stale.
_error_words: dict[torch.device, list[Tensor]] = {}


def _error_word(device: torch.device) -> Tensor:
    free = _error_words.setdefault(device, [])
    try:
        return free.pop()
    except IndexError:
        return torch.full((1,), _NO_ERROR, dtype=torch.int64, device=device)


def _first_error(error: Tensor) -> int | None:
    """What the kernel left in the error word, None where it is untouched; waits for the kernel."""
    place = int(error.item())
    if place == _NO_ERROR:
        _error_words[error.device].append(error)
        return None
    return place


def _wrong_rows(error: Tensor, row_groups: int) -> slice | None:
    """Rows that the first wrong unit lies in, None where there is none."""
    place = _first_error(error)
    if place is None:
        return None
    return slice(place // row_groups, (place + 3) // row_groups + 1)
