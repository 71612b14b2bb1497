"""Marlin tiles: weights, scales and zero points as the Marlin mixed-precision GEMM reads them.

Before (N output features, K input features, b = 4 or 8 bits, f = 32/b codes a word)::

    words   i32 [N, K/f]   K-packed: code k of row n at bits b*(k%f) of word k//f; MXFP4 codes,
                           u8 [N, K/2] with the even k in the low nibble, are the same bytes
    scales  [groups, N]    groups = K/G, or 1 where channel-wise
    zero points, codes u8 [groups, N]

After::

    tiles   i32 [K/16, N*16/f]  row t holds k = 16*t .. 16*t+15
    scales  [groups, N]         reordered along N
    zero points i32 [groups, N/f]  reordered along N, packed along N

A row of tiles is one run of 1024 codes after another, each 16 k by 64 n. With n split into bits
(j1 j0 blk a2 a1 a0), from high to low, and k into (k3 k2 k1 k0), the word of a run and the code in
the word are::

    b = 4:  word (a2 a1 a0 k2 k1 j1 j0),      code (k0 blk k3)
    b = 8:  word (a2 a1 a0 k2 k1 j1 j0 blk),  code (k0 k3)

These are the layouts of vLLM's ``gptq_marlin_repack``, ``marlin_permute_scales``,
``marlin_zero_points`` and ``prepare_fp4_layer_for_marlin``, for 16-bit activations.

All of them are safe to call from several threads. On the CPU the main thread uses up to
``torch.get_num_threads()`` threads for 8 MiB and more, another thread itself alone, with about
1 MiB each beside input and output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ctconvert.transforms import compiled, dispatch
from ctconvert.transforms.marlin import cpu
from ctconvert.transforms.packed import pack, unpack
from ctconvert.transforms.shapes import codes_per_word, marlin_padded_shape
from ctconvert.transforms.words import as_words, signed

__all__ = [
    "marlin_pack",
    "marlin_pack_zero_points",
    "marlin_padded_shape",
    "marlin_permute_mxfp4_scales",
    "marlin_permute_scales",
    "marlin_unpack",
    "marlin_unpack_zero_points",
    "marlin_unpermute_mxfp4_scales",
    "marlin_unpermute_scales",
    "pad_words",
    "sort_columns",
    "unsort_columns",
]

TILE_K = 16
TILE_N = 64


# ---------------------------------------------------------------------------------- weights


def marlin_pack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """K-packed codes i32 [N, K/f] to Marlin tiles i32 [K/16, N*16/f].

    ``bits`` is 4 or 8, K a multiple of 16 and N of 64 (the kernel asks for more, see
    :func:`marlin_padded_shape`). An input that is not contiguous is copied first.

    Raises ValueError for another dtype, rank, width or shape.
    """
    _check_words(words, bits)
    f = codes_per_word(bits)
    n, k = words.shape[0], words.shape[1] * f
    _check_tiled(n, k)
    if words.numel() == 0:
        return words.new_empty((k // TILE_K, n * TILE_K // f))
    units = as_words(words, torch.int64)
    if dispatch.has_kernels(words):
        from ctconvert.transforms.marlin.triton import marlin_pack_triton

        return marlin_pack_triton(units, bits)
    made = compiled.pack_tiles(units, bits)
    return cpu.pack_tiles(units, bits) if made is None else made


def marlin_unpack(tiles: torch.Tensor, bits: int, n: int, k: int) -> torch.Tensor:
    """Exact inverse of :func:`marlin_pack`: tiles i32 [K/16, N*16/f] to words i32 [N, K/f].

    Raises ValueError for another dtype, width, or a shape that is not that of ``n`` x ``k``.
    """
    _check_words(tiles, bits, "tiles")
    _check_tiled(n, k)
    f = codes_per_word(bits)
    if tuple(tiles.shape) != (k // TILE_K, n * TILE_K // f):
        raise ValueError(
            f"tiles of {n} x {k} codes of {bits} bits are i32 {[k // TILE_K, n * TILE_K // f]}, "
            f"not {list(tiles.shape)}"
        )
    if tiles.numel() == 0:
        return tiles.new_empty((n, k // f))
    if dispatch.has_kernels(tiles):
        from ctconvert.transforms.marlin.triton import marlin_unpack_triton

        return marlin_unpack_triton(tiles.contiguous(), bits, n, k)
    units = as_words(tiles, torch.int64)
    made = compiled.unpack_tiles(units, bits, n, k)
    return cpu.unpack_tiles(units, bits, n, k) if made is None else made


# ----------------------------------------------------------------------------------- scales


def marlin_permute_scales(scales: torch.Tensor, channelwise: bool) -> torch.Tensor:
    """Scales [groups, N] of any dtype in the kernel's order along N; same shape, contiguous.

    Grouped (``channelwise=False``): in every run of 64, position 8*i + j holds the scale of column
    i + 8*j. Channel-wise: in every run of 32, position 8*i + 2*a + e holds that of column
    8*a + 2*i + e. The kernel takes a weight as channel-wise when it has one row of scales and no
    act-order, so ``channelwise`` must be ``groups == 1``, also for a grouped scheme whose G is K
    (vLLM: ``marlin_permute_scales``, and ``group_size = -1`` in ``marlin_gemm``).

    Raises ValueError unless ``scales`` is 2-D with N a multiple of 64.
    """
    _check_runs(scales.shape, "scales")
    # Both orders are transposes of equal sides, so each is its own inverse.
    return _reorder(scales, _CHANNELWISE if channelwise else _grouped_then((0,)))


def marlin_unpermute_scales(scales: torch.Tensor, channelwise: bool) -> torch.Tensor:
    """Inverse of :func:`marlin_permute_scales`, with the same ValueError."""
    return marlin_permute_scales(scales, channelwise)


def marlin_permute_mxfp4_scales(scales: torch.Tensor) -> torch.Tensor:
    """E8M0 scales u8 [K/32, N] in the order of the kernel's MXFP4 path; same shape.

    The grouped order of :func:`marlin_permute_scales`, then every run of four as (0, 2, 1, 3)
    (vLLM: ``mxfp4_marlin_process_scales``). The bytes stay E8M0. Raises ValueError for another
    dtype or rank, or N that is not a multiple of 64.
    """
    _check_e8m0(scales)
    return _reorder(scales, _grouped_then((0, 2, 1, 3)))


def marlin_unpermute_mxfp4_scales(scales: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`marlin_permute_mxfp4_scales`, with the same ValueError."""
    _check_e8m0(scales)
    return _reorder(scales, _inverse(_grouped_then((0, 2, 1, 3))))


#: The channel-wise order of two runs of 32.
_CHANNELWISE = [
    at + 8 * a + 2 * i + e for at in (0, 32) for i in range(4) for a in range(4) for e in range(2)
]


def _grouped_then(order: tuple[int, ...]) -> list[int]:
    """The grouped order of a run of 64, then every run of ``len(order)`` taken in ``order``."""
    grouped = [i + 8 * j for i in range(8) for j in range(8)]
    return [grouped[at + p] for at in range(0, TILE_N, len(order)) for p in order]


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _reorder(rows: torch.Tensor, order: list[int]) -> torch.Tensor:
    """[groups, N]: position p of every run of 64 takes what is at order[p] of the run."""
    raw = rows.contiguous().view(_INTEGERS[rows.element_size()])
    if dispatch.has_kernels(rows):
        from ctconvert.transforms.marlin.triton import reorder_triton

        return reorder_triton(raw, order).view(rows.dtype)
    return cpu.reorder(raw, order).view(rows.dtype)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# ------------------------------------------------------------------------------ zero points


def marlin_pack_zero_points(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points u8 [groups, N] to the kernel's i32 [groups, N/f].

    The codes of a row are put in the grouped order of :func:`marlin_permute_scales`, whether the
    scales are grouped or channel-wise: a zero point is applied in every MMA, a channel-wise scale
    once at the end, so with one group the zero points keep the order of 64 while the scales take
    that of 32. Then every run of 8 (b = 4) is taken as (0, 2, 4, 6, 1, 3, 5, 7), every run of 4
    (b = 8) as (0, 2, 1, 3), and the codes are packed along N: code i of word c is that of position
    c*f + i.

    Source: ``marlin_zero_points`` in vllm/model_executor/layers/quantization/utils/
    marlin_utils.py, vLLM (16-bit activations), whose ``query_marlin_supported_quant_types`` lists
    zero points for 4 bits only.

    Raises ValueError for another dtype, rank or width, N that is not a multiple of 64, or a code of
    2**bits or more.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"zero points must be torch.uint8 codes, not {codes.dtype}")
    _check_runs(codes.shape, "zero points")
    order = _grouped_then(_INTERLEAVE[bits])
    if dispatch.has_kernels(codes):
        from ctconvert.transforms.marlin.triton import pack_zero_points_triton

        words, in_range = pack_zero_points_triton(codes, order, bits)
        if in_range:
            return words
    if bits == 4 and (made := compiled.pack_zero_points(codes)) is not None:
        return made
    return pack(_reorder(codes, order), bits)  # names a code that is not in range


def marlin_unpack_zero_points(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`marlin_pack_zero_points`: i32 [groups, N/f] to u8 [groups, N].

    Raises ValueError for another dtype, rank or width, or N that is not a multiple of 64.
    """
    _check_words(words, bits)
    order = _inverse(_grouped_then(_INTERLEAVE[bits]))
    n = words.shape[1] * codes_per_word(bits)
    _check_runs((words.shape[0], n), "zero points")
    if dispatch.has_kernels(words):
        from ctconvert.transforms.marlin.triton import unpack_zero_points_triton

        return unpack_zero_points_triton(words, order, bits)
    if bits == 4 and (made := compiled.unpack_zero_points(words)) is not None:
        return made
    return _reorder(unpack(words, bits, n), order)


#: The order of the codes of a word, as the kernel's conversion to 16-bit floats takes them out.
_INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}


# -------------------------------------------------------------------------------- act-order


def sort_columns(
    words: torch.Tensor, g_idx: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts the columns of a K-packed weight by their group, as the kernel's act-order asks.

    ``words`` i32 [N, K/f] and ``g_idx`` i32 [K] to (sorted words i32 [N, K/f], perm i32 [K]), on
    the same device. ``perm`` is the stable argsort of ``g_idx``: column j of the result is column
    perm[j] of the weight. The kernel's own ``g_idx`` is then ``g_idx[perm]``. On an accelerator it
    needs 32 MiB beside its output, or 128 rows where those are more.

    Raises ValueError for another dtype, rank or width, or a ``g_idx`` that is not one group a
    column.
    """
    _check_words(words, bits)
    k = words.shape[1] * codes_per_word(bits)
    _check_columns(g_idx, "g_idx", k, words)
    perm = torch.argsort(g_idx, stable=True).to(torch.int32)
    return _take_columns(words, perm, bits), perm


def unsort_columns(words: torch.Tensor, perm: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`sort_columns`: sorted words i32 [N, K/f] and its perm to the weight.

    Raises ValueError for another dtype, rank or width, or a ``perm`` that is not a permutation of
    the columns.
    """
    _check_words(words, bits)
    k = words.shape[1] * codes_per_word(bits)
    _check_columns(perm, "perm", k, words)
    inverse = torch.argsort(perm).to(torch.int32)
    if not torch.equal(perm[inverse], torch.arange(k, dtype=torch.int32, device=perm.device)):
        raise ValueError(f"perm is not a permutation of 0 .. {k - 1}")
    return _take_columns(words, inverse, bits)


def _take_columns(words: torch.Tensor, perm: torch.Tensor, bits: int) -> torch.Tensor:
    """Column j of the result is column perm[j] of the weight."""
    if words.numel() == 0:
        return words.clone()
    if dispatch.has_kernels(words):
        from ctconvert.transforms.marlin.triton import take_columns_triton

        return take_columns_triton(words.contiguous(), perm, bits)
    made = compiled.take_columns(words, perm, bits)
    return cpu.take_columns(words, perm, bits) if made is None else made


# ---------------------------------------------------------------------------------- padding


def pad_words(
    words: torch.Tensor,
    bits: int,
    n: int,
    k: int,
    n_padded: int,
    k_padded: int,
    fill_code: int,
) -> torch.Tensor:
    """Pads a K-packed weight i32 [n, ceil(k/f)] with ``fill_code`` to i32 [n_padded, k_padded/f].

    Where k is not a multiple of f, the codes that the last word lacks are filled as well. A new
    tensor on the same device, also where there is nothing to pad.

    Raises ValueError for another dtype, rank or width, words that are not those of ``n`` x ``k``, a
    padded shape smaller than it or with k_padded % f != 0, or a code outside 0 .. 2**bits - 1.
    """
    _check_words(words, bits)
    f = codes_per_word(bits)
    if tuple(words.shape) != (n, -(-k // f)):
        raise ValueError(
            f"{n} x {k} codes of {bits} bits are words [{n}, {-(-k // f)}], not {list(words.shape)}"
        )
    if n_padded < n or k_padded < k or k_padded % f:
        raise ValueError(
            f"{n} x {k} cannot be padded to {n_padded} x {k_padded} with {f} codes a word"
        )
    if not 0 <= fill_code < 1 << bits:
        raise ValueError(f"fill code {fill_code} is outside 0..{(1 << bits) - 1}")
    fill = signed(fill_code * (0xFFFFFFFF // ((1 << bits) - 1)))
    if dispatch.has_kernels(words):
        from ctconvert.transforms.marlin.triton import pad_words_triton

        return pad_words_triton(words.contiguous(), bits, n, k, n_padded, k_padded, fill)
    return cpu.pad(words, bits, n, k, n_padded, k_padded, fill)


# ----------------------------------------------------------------------------------- checks


def _check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits}")


def _check_words(words: torch.Tensor, bits: int, name: str = "words") -> None:
    _check_bits(bits)
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(
            f"{name} must be a 2-D torch.int32 tensor, not {words.dtype} {list(words.shape)}"
        )


def _check_tiled(n: int, k: int) -> None:
    if n % TILE_N or k % TILE_K:
        raise ValueError(
            f"Marlin tiles need N % {TILE_N} == 0 and K % {TILE_K} == 0; this is N = {n}, K = {k}"
        )


def _check_runs(shape: Sequence[int], name: str) -> None:
    if len(shape) != 2 or shape[1] % TILE_N:
        raise ValueError(
            f"{name} must be [groups, N] with N a multiple of {TILE_N}, not {list(shape)}"
        )


def _check_e8m0(scales: torch.Tensor) -> None:
    _check_runs(scales.shape, "scales")
    if scales.dtype != torch.uint8:
        raise ValueError(f"E8M0 scales must be torch.uint8 bytes, not {scales.dtype}")


def _check_columns(values: torch.Tensor, name: str, k: int, words: torch.Tensor) -> None:
    if values.dtype != torch.int32 or tuple(values.shape) != (k,) or values.device != words.device:
        raise ValueError(
            f"{name} must be torch.int32 [{k}] on {words.device}, not {values.dtype} "
            f"{list(values.shape)} on {values.device}"
        )
