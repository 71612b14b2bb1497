"""2:4 sparse weights: the checkpoint's bitmask form, the dense form and CUTLASS's SM90 form.

Three forms of one weight, N output features by K input features, a *group* being the four
columns 4g..4g+3 of a row:

bitmask (checkpoint format ``sparse-24-bitmask``)
    ``compressed`` [N, K/2]   the kept values of a row in column order, two per group
    ``bitmask`` u8 [N, ceil(K/8)]   bit j of byte c (LSB first): column 8c + j is kept. Exactly two
    columns of every group are kept, also where fewer are nonzero, so a kept value may be 0.
dense
    ``dense`` [N, K]
SM90 (CUTLASS 3.x sparse GEMM, operand A compressed)
    ``values`` [N, K/2]   two per group: the group's elements at positions i0 and i1
    ``meta`` u8 [Np, Kp/8]   Np = N rounded up to 64, Kp = K rounded up to 128. A nibble
    ``i0 | i1 << 2`` per group, low nibble of a byte first; padding nibbles are 0. The nibble of
    (row m, columns k..k+3) is number
    ``((m//64)*64*128 + (k//128)*Np*128 + inner(m', k')) / 4``, where m' = m%64, k' = k%128 and
    8-bit elements:  inner = m'*128 + k'
    16-bit elements: inner = k'%16 + 16*((m'//8)%2) + 32*(k'//32) + 128*(m'%8)
    + 1024*((k'//16)%2) + 2048*(m'//16)

pairs (what the program moves a weight as)
    ``values`` as in the SM90 form, and ``pairs`` u8 [N, ceil(K/8)]: its nibbles row after row,
    without padding. A weight has one such form, so two are equal where these bytes are.

(i0, i1) by the group's nonzero elements: two at p0 < p1: (p0, p1); one at p <= 2: (p, 3); one at 3:
(0, 3); none: (0, 0). "Nonzero" means: the bits are not all 0, after -0.0 of the 16-bit floats
became +0.0. The 8-bit types are taken as raw bytes, so -0.0 of float8_e4m3fn counts as nonzero.
Source: CUTLASS 3.x, ``SM90StructuredSparseCompressor`` and ``Sm90GmmaSparseConfig``.

dtypes: float16, bfloat16, int8, float8_e4m3fn, always moved as bits.

All transforms are safe to call from several threads. On the CPU the main thread uses up to
``torch.get_num_threads()`` threads for 8 MiB and more, another thread itself alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctconvert.transforms import dispatch
from ctconvert.transforms.shapes import sm90_meta_shape
from ctconvert.transforms.sparse24 import compiled, cpu, order

__all__ = [
    "bitmask_compress",
    "bitmask_decompress",
    "bitmask_of",
    "bitmask_of_pairs",
    "dense_of_pairs",
    "pairs_of_bitmask",
    "pairs_of_sm90",
    "sm90_compress",
    "sm90_decompress",
    "sm90_meta",
    "sm90_meta_shape",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)


def bitmask_decompress(compressed: Tensor, bitmask: Tensor, k: int) -> Tensor:
    """Dense weight of a ``sparse-24-bitmask`` one.

    Args:
        compressed: [N, K/2], one of the four dtypes.
        bitmask: u8 [N, ceil(K/8)].
        k: K, a multiple of 4.

    Returns:
        dense [N, K] in the dtype of ``compressed``; columns that are not kept are +0.

    Raises:
        ValueError: a shape, dtype or device does not fit, or a group does not keep exactly two
            columns (the message names the first such row and the group's first column).
    """
    _check_weight("compressed", compressed)
    n = compressed.shape[0]
    _check_columns(k)
    _check_shape("compressed", compressed, (n, k // 2))
    _check_bytes("bitmask", bitmask, (n, -(-k // 8)), compressed)
    if dispatch.has_kernels(compressed):
        from ctconvert.transforms.sparse24.triton import bitmask_decompress_triton

        return bitmask_decompress_triton(compressed, bitmask, k)
    made = compiled.bitmask_decompress(compressed, bitmask, k)
    return cpu.bitmask_decompress(compressed, bitmask, k) if made is None else made


def bitmask_compress(dense: Tensor, bitmask: Tensor) -> Tensor:
    """Kept values of a dense weight, given which columns are kept.

    The inverse of `bitmask_decompress` for the same bitmask. Kept values are taken as they are,
    -0.0 included.

    Args:
        dense: [N, K], K a multiple of 4.
        bitmask: u8 [N, ceil(K/8)], exactly two columns of every group kept.

    Returns:
        compressed [N, K/2] in the dtype of ``dense``.

    Raises:
        ValueError: a shape, dtype or device does not fit, a group does not keep exactly two
            columns, or a column that is not kept holds a nonzero (row and column are named).
    """
    _check_weight("dense", dense)
    n, k = dense.shape
    _check_columns(k)
    _check_bytes("bitmask", bitmask, (n, -(-k // 8)), dense)
    if dispatch.has_kernels(dense):
        from ctconvert.transforms.sparse24.triton import bitmask_compress_triton

        return bitmask_compress_triton(dense, bitmask)
    return cpu.bitmask_compress(dense, bitmask)


def bitmask_of(dense: Tensor) -> Tensor:
    """A bitmask that keeps two columns of every group, all nonzero ones among them.

    Where fewer than two are nonzero, the lowest-numbered zero columns of the group are kept with
    them. (The producers took the two largest magnitudes by a top-k whose choice among equal zeros
    is not defined, so their masks cannot be rebuilt from the weight alone.) -0.0 of a 16-bit float
    counts as zero here.

    Args:
        dense: [N, K], K a multiple of 4.

    Returns:
        bitmask u8 [N, ceil(K/8)]; where K % 8 is 4 the last byte's high nibble is 0.

    Raises:
        ValueError: dtype or K does not fit, or a group has more than two nonzeros (row and column
            are named).
    """
    _check_weight("dense", dense)
    _check_columns(dense.shape[1])
    if dispatch.has_kernels(dense):
        from ctconvert.transforms.sparse24.triton import bitmask_of_triton

        return bitmask_of_triton(dense)
    return cpu.bitmask_of(dense)


def sm90_compress(dense: Tensor) -> tuple[Tensor, Tensor]:
    """CUTLASS SM90 form of a dense 2:4 weight (the module docstring has the layout).

    Args:
        dense: [N, K], K a multiple of 4.

    Returns:
        (values [N, K/2] in the dtype of ``dense``, meta u8 [Np, Kp/8]).

    Raises:
        ValueError: dtype or K does not fit, or a group has more than two nonzeros (row and column
            are named).
    """
    _check_weight("dense", dense)
    _check_columns(dense.shape[1])
    if dispatch.has_kernels(dense):
        from ctconvert.transforms.sparse24.triton import sm90_compress_triton

        return sm90_compress_triton(dense)
    return cpu.sm90_compress(dense)


def sm90_decompress(values: Tensor, meta: Tensor, n: int, k: int) -> Tensor:
    """Dense weight of an SM90 compressed one, the inverse of `sm90_compress`.

    Args:
        values: [N, K/2], one of the four dtypes.
        meta: u8 [Np, Kp/8].
        n: N.
        k: K, a multiple of 4.

    Returns:
        dense [N, K] in the dtype of ``values``.

    Raises:
        ValueError: a shape, dtype or device does not fit; an index pair is neither i0 < i1 nor
            (0, 0) with both values zero; or a padding nibble is not 0 (row and column are named).
    """
    _check_weight("values", values)
    _check_columns(k)
    _check_shape("values", values, (n, k // 2))
    _check_bytes("meta", meta, sm90_meta_shape(n, k), values)
    if dispatch.has_kernels(values):
        from ctconvert.transforms.sparse24.triton import sm90_decompress_triton

        return sm90_decompress_triton(values, meta, n, k)
    made = compiled.sm90_decompress(values, meta, n, k)
    return cpu.sm90_decompress(values, meta, n, k) if made is None else made


def pairs_of_bitmask(compressed: Tensor, bitmask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The pairs of a ``sparse-24-bitmask`` weight; arguments and errors of `bitmask_decompress`.

    Returns:
        (values [N, K/2], pairs u8 [N, ceil(K/8)]), -0.0 of 16-bit floats made +0.0.
    """
    _check_weight("compressed", compressed)
    n = compressed.shape[0]
    _check_columns(k)
    _check_shape("compressed", compressed, (n, k // 2))
    _check_bytes("bitmask", bitmask, (n, -(-k // 8)), compressed)
    if not dispatch.has_kernels(compressed):
        made = compiled.settle(compressed, bitmask, k, "bitmask")
        if made is not None:
            return made
    return _pairs_of_dense(bitmask_decompress(compressed, bitmask, k))


def bitmask_of_pairs(values: Tensor, pairs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The bitmask form of a weight in pairs, with the bitmask of `bitmask_of`.

    Args:
        values: [N, K/2], one of the four dtypes.
        pairs: u8 [N, ceil(K/8)].
        k: K, a multiple of 4.

    Returns:
        (compressed [N, K/2], bitmask u8 [N, ceil(K/8)]).

    Raises:
        ValueError: as `dense_of_pairs`.
    """
    _check_pairs(values, pairs, k)
    if not dispatch.has_kernels(values):
        made = compiled.settle(values, pairs, k, "back")
        if made is not None:
            return made
    dense = dense_of_pairs(values, pairs, k)
    bitmask = bitmask_of(dense)
    return bitmask_compress(dense, bitmask), bitmask


def dense_of_pairs(values: Tensor, pairs: Tensor, k: int) -> Tensor:
    """Dense weight [N, K] of one in pairs; arguments of `bitmask_of_pairs`.

    Raises:
        ValueError: a shape, dtype or device does not fit, or an index pair is neither i0 < i1 nor
            (0, 0) with both values zero.
    """
    meta = sm90_meta(values, pairs, k)
    return sm90_decompress(values, meta, values.shape[0], k)


def sm90_meta(values: Tensor, pairs: Tensor, k: int) -> Tensor:
    """``meta`` u8 [Np, Kp/8] of a weight in pairs, its SM90 ``values`` being the same.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check_pairs(values, pairs, k)
    n, size = values.shape[0], values.element_size()
    shape = sm90_meta_shape(n, k)
    if tuple(pairs.shape) != shape:
        rows = pairs.new_zeros(shape)
        rows[:n, : pairs.shape[1]] = pairs
        pairs = rows
    made = None if dispatch.has_kernels(pairs) else compiled.to_kernel_order(pairs, size)
    return order.to_kernel_order(pairs, size) if made is None else made


def pairs_of_sm90(values: Tensor, meta: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """The pairs of an SM90 compressed weight; arguments and errors of `sm90_decompress`.

    Returns:
        (values [N, K/2], pairs u8 [N, ceil(K/8)]); the values are the very argument where
        `sm90_compress` would give these.
    """
    _check_weight("values", values)
    _check_columns(k)
    _check_shape("values", values, (n, k // 2))
    _check_bytes("meta", meta, sm90_meta_shape(n, k), values)
    if not dispatch.has_kernels(values):
        rows = compiled.from_kernel_order(meta, values.element_size())
        if rows is not None and order.padding_is_zero(rows, n, k):
            made = compiled.settle(values, rows[:n, : -(-k // 8)], k, "pairs")
            if made is not None:
                return made
    return _pairs_of_dense(sm90_decompress(values, meta, n, k))


def _pairs_of_dense(dense: Tensor) -> tuple[Tensor, Tensor]:
    values, meta = sm90_compress(dense)
    n, k = dense.shape
    rows = order.from_kernel_order(meta, dense.element_size())
    return values, rows[:n, : -(-k // 8)].contiguous()


def _check_pairs(values: Tensor, pairs: Tensor, k: int) -> None:
    _check_weight("values", values)
    _check_columns(k)
    n = values.shape[0]
    _check_shape("values", values, (n, k // 2))
    _check_bytes("pairs", pairs, (n, -(-k // 8)), values)


def _check_columns(k: int) -> None:
    """Raise ValueError unless K is a positive multiple of 4."""
    if k <= 0 or k % 4:
        raise ValueError(f"2:4 sparsity needs K to be a positive multiple of 4, got K = {k}")


def _check_weight(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise ValueError(f"{name} is {tensor.dtype}; 2:4 weights are one of {known}")
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected two dimensions")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def _check_bytes(name: str, tensor: Tensor, shape: tuple[int, int], weight: Tensor) -> None:
    if tensor.dtype != torch.uint8:
        raise ValueError(f"{name} is {tensor.dtype}, expected torch.uint8")
    _check_shape(name, tensor, shape)
    if tensor.device != weight.device:
        raise ValueError(f"{name} is on {tensor.device}, the values on {weight.device}")
