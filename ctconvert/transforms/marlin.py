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

CPU tensors take the torch code of this file, CUDA and XPU tensors the Triton kernels of
:mod:`ctconvert.transforms.marlin_triton`; the results are equal bit for bit.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from ctconvert.transforms.packed import codes_per_word, pack, unpack

TILE_K = 16
TILE_N = 64

# Torch runs an elementwise op of at most this many elements in the calling thread (its
# GRAIN_SIZE). Every op on a block stays under it, so that threads never wait for one another's
# OpenMP teams; the block and its scratch then fill, but do not overflow, an L2 cache of 1 MiB.
_GRAIN = 32768
# K tiles of a block at most for 4 bits; half of it for 8 bits, whose tiles have twice the bytes.
_BLOCK_TILES = 240
_MAX_RUNS = 16
# 64 bytes more a row of scratch: rows a power of two apart would share the sets of the L1 cache.
_ROW_PADDING = 8
# Under this many bytes a thread costs more than it brings.
_THREADED_BYTES = 8 << 20
# Codes, a byte each, of one block of the act-order path.
_SORT_CODES = 1 << 18


# ---------------------------------------------------------------------------------- weights


def marlin_pack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """K-packed codes i32 [N, K/f] to Marlin tiles i32 [K/16, N*16/f].

    ``bits`` is 4 or 8, K a multiple of 16 and N of 64 (the kernel asks for more, see
    :func:`marlin_padded_shape`). Safe to call from several threads; called from the main thread it
    uses up to ``torch.get_num_threads()`` threads of its own on the CPU. Beside input and output
    it needs about 1 MiB a thread there, and nothing on an accelerator. An input that is not
    contiguous is copied first.

    Raises ValueError for another dtype, rank, width or shape.
    """
    _check_words(words, bits)
    f = codes_per_word(bits)
    n, k = words.shape[0], words.shape[1] * f
    _check_tiled(n, k)
    if words.numel() == 0:
        return words.new_empty((k // TILE_K, n * TILE_K // f))
    words = _aligned(words)
    if _has_kernels(words):
        from ctconvert.transforms import marlin_triton

        return marlin_triton.marlin_pack_triton(words, bits)
    tiles = words.new_empty((k // TILE_K, n * TILE_K // f))
    source, target = words.view(torch.int64), tiles.view(torch.int64)

    def run(block: _Block, rows: slice, columns: slice, tile_rows: slice, units: slice) -> None:
        block.pack(source[rows, columns], target[tile_rows, units])

    _run_blocks(run, bits, n, k, words.nbytes)
    return tiles


def marlin_unpack(tiles: torch.Tensor, bits: int, n: int, k: int) -> torch.Tensor:
    """Exact inverse of :func:`marlin_pack`: tiles i32 [K/16, N*16/f] to words i32 [N, K/f].

    Threads and memory as there. Raises ValueError for another dtype, width, or a shape that is not
    that of ``n`` x ``k``.
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
    tiles = _aligned(tiles)
    if _has_kernels(tiles):
        from ctconvert.transforms import marlin_triton

        return marlin_triton.marlin_unpack_triton(tiles, bits, n, k)
    words = tiles.new_empty((n, k // f))
    source, target = tiles.view(torch.int64), words.view(torch.int64)

    def run(block: _Block, rows: slice, columns: slice, tile_rows: slice, units: slice) -> None:
        block.unpack(source[tile_rows, units], target[rows, columns])

    _run_blocks(run, bits, n, k, tiles.nbytes)
    return words


class _Block:
    """Scratch and views to reorder blocks of ``runs`` runs of 64 rows by ``tiles`` K tiles.

    The work is done on 64-bit units, ``planes`` being one row for each unit that a K tile has in
    the output. Source and target units hold different bits of n and k; each step trades one bit of
    a unit's position in the word (a field of ``shift`` bits) for the bit of a plane's number that
    its axis stands for, as in the recursive block-swap transpose of Warren, "Hacker's Delight",
    section 7-3. What is left is a transpose of 64-bit elements. Steps are their own inverse.

    With 4 bits a source unit is the 16 codes (k3 k2 k1 k0) of one row and tile, with 8 bits 8 codes
    (k2 k1 k0) of them, and axis by axis, before and after::

        4 bits: planes [run, a, j0 -> k2, blk -> k1, j1, tile],  code k3 k2 k1 k0 -> j0 k0 blk k3
        8 bits: planes [run, a, blk -> k2, k3 -> k1, j, tile],   code k2 k1 k0 -> blk k0 k3
    """

    def __init__(self, bits: int, runs: int, tiles: int) -> None:
        self.runs, self.tiles, self.bits = runs, tiles, bits
        stride = tiles + _ROW_PADDING
        planes = torch.zeros((runs, 8, 2, 2, bits // 2, stride), dtype=torch.int64)
        units = planes[..., 0].numel()
        self.filled = planes[..., :tiles]
        self.columns = planes.view(units, stride)[:, :tiles].t()
        rows = max(min(_GRAIN // units, tiles), 1)
        self.chunks = [slice(t, min(t + rows, tiles)) for t in range(0, tiles, rows)]
        # The exchanges and the staging of tile rows never overlap: one scratch serves both.
        half = planes[:, :, 0]
        scratch = torch.zeros(max(half.numel(), rows * (units + _ROW_PADDING)), dtype=torch.int64)
        self.staging = scratch[: rows * (units + _ROW_PADDING)].view(rows, -1)[:, :units]
        swap = scratch[: half.numel()].view(half.shape)
        order = ((2, 32), (2, 4), (2, 16), (3, 8)) if bits == 4 else ((2, 32), (3, 8), (3, 16))
        self.steps = [
            (shift, _FIELDS[shift], planes.select(axis, 0), planes.select(axis, 1), swap)
            for axis, shift in order
        ]

    def pack(self, words: torch.Tensor, tiles: torch.Tensor) -> None:
        """i64 [64*runs, K units] into ``tiles``, i64 [tiles, units a run * runs]."""
        units = self._planes_of(words)
        for half in (0, 1):
            self.filled[:, :, half].copy_(units[:, :, half])
        for step in self.steps:
            _exchange(*step)
        for chunk in self.chunks:
            tiles[chunk].copy_(self.columns[chunk])

    def unpack(self, tiles: torch.Tensor, words: torch.Tensor) -> None:
        """The inverse: ``tiles`` into ``words``."""
        for chunk in self.chunks:
            # Torch transposes along its output's rows: straight from the tiles, whose rows are
            # many pages apart, that would fetch a cache line for every element.
            staged = self.staging[: chunk.stop - chunk.start]
            self.columns[chunk].copy_(staged.copy_(tiles[chunk]))
        for step in reversed(self.steps):
            _exchange(*step)
        units = self._planes_of(words)
        for half in (0, 1):
            units[:, :, half].copy_(self.filled[:, :, half])

    def _planes_of(self, words: torch.Tensor) -> torch.Tensor:
        """The block's words, viewed in the order of the planes."""
        if self.bits == 4:  # [run, j1, j0, blk, a, tile]
            return words.unflatten(0, (self.runs, 2, 2, 2, 8)).permute(0, 4, 2, 3, 1, 5)
        units = words.unflatten(1, (self.tiles, 2))  # [run, j, blk, a, tile, k3]
        return units.unflatten(0, (self.runs, 4, 2, 8)).permute(0, 3, 2, 5, 1, 4)


#: The lower of every two fields of so many bits.
_FIELDS = {4: 0x0F0F0F0F0F0F0F0F, 8: 0x00FF00FF00FF00FF, 16: 0x0000FFFF0000FFFF, 32: 0xFFFFFFFF}


def _exchange(
    shift: int, mask: int, low: torch.Tensor, high: torch.Tensor, swap: torch.Tensor
) -> None:
    """Swaps the upper fields of ``low`` with the lower fields of ``high``, in place."""
    # The shift is arithmetic; the mask is zero where it brings in copies of the sign.
    torch.bitwise_right_shift(low, shift, out=swap)
    swap.bitwise_xor_(high).bitwise_and_(mask)
    high.bitwise_xor_(swap)
    low.bitwise_xor_(swap.bitwise_left_shift_(shift))


def _run_blocks(
    run: Callable[[_Block, slice, slice, slice, slice], None],
    bits: int,
    n: int,
    k: int,
    nbytes: int,
) -> None:
    """Calls ``run(block, rows, columns, tile rows, units)`` for every block of an n x k weight.

    The slices are of the words and of the tiles, both seen as 64-bit units.
    """
    tiles, runs, wide = k // TILE_K, n // TILE_N, bits // 4  # wide: units of a row and K tile
    width = _round_up(-(-tiles // -(-tiles * wide // _BLOCK_TILES)), 8)  # blocks of one width
    fitting = 2 * _GRAIN // (TILE_N * wide * (width + _ROW_PADDING))
    height = max(min(fitting, runs, _MAX_RUNS), 1)

    def work(blocks: Sequence[tuple[int, int]]) -> None:
        made: dict[tuple[int, int], _Block] = {}
        for tile, row in blocks:
            size = min(height, runs - row), min(width, tiles - tile)
            if size not in made:
                made[size] = _Block(bits, *size)
            run(
                made[size],
                slice(row * TILE_N, (row + size[0]) * TILE_N),
                slice(tile * wide, (tile + size[1]) * wide),
                slice(tile, tile + size[1]),
                slice(row * TILE_N * wide, (row + size[0]) * TILE_N * wide),
            )

    # K outermost: the pages of a row of tiles are filled while they are in the TLB.
    blocks = [(t, r) for t in range(0, tiles, width) for r in range(0, runs, height)]
    _spread(work, blocks, nbytes)


def _spread(
    work: Callable[[Sequence[tuple[int, int]]], None],
    items: Sequence[tuple[int, int]],
    nbytes: int,
) -> None:
    """Calls ``work`` on consecutive shares of ``items``, one share a thread.

    A caller that is itself a worker thread gets no further threads: it has its own share of the
    cores. The error raised is that of the first share that has one.
    """
    workers = 1
    if nbytes >= _THREADED_BYTES and threading.current_thread() is threading.main_thread():
        workers = min(torch.get_num_threads(), len(items), 8)  # beyond 8 the GIL is the limit
    if workers == 1:
        work(items)
        return
    cuts = [len(items) * i // workers for i in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        for share in [pool.submit(work, items[a:b]) for a, b in itertools.pairwise(cuts)]:
            share.result()


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
    if _has_kernels(scales):
        return _reorder(scales, _CHANNELWISE if channelwise else _grouped_then((0,)))
    run = (4, 4, 2) if channelwise else (8, 8)
    return scales.unflatten(1, (-1, *run)).transpose(2, 3).contiguous().flatten(1)


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
    if _has_kernels(rows):
        from ctconvert.transforms import marlin_triton

        return marlin_triton.reorder_triton(rows, order)
    runs = rows.reshape(-1, TILE_N)
    index = torch.tensor(order, device=rows.device).expand(runs.shape)
    return runs.gather(1, index).view(rows.shape)


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
    if _has_kernels(codes):
        from ctconvert.transforms import marlin_triton

        words, in_range = marlin_triton.pack_zero_points_triton(codes, order, bits)
        if in_range:
            return words
    return pack(_reorder(codes, order), bits)  # names a code that is not in range


def marlin_unpack_zero_points(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`marlin_pack_zero_points`: i32 [groups, N/f] to u8 [groups, N].

    Raises ValueError for another dtype, rank or width, or N that is not a multiple of 64.
    """
    _check_words(words, bits)
    order = _inverse(_grouped_then(_INTERLEAVE[bits]))
    n = words.shape[1] * codes_per_word(bits)
    _check_runs((words.shape[0], n), "zero points")
    if _has_kernels(words):
        from ctconvert.transforms import marlin_triton

        return marlin_triton.unpack_zero_points_triton(words, order, bits)
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
    perm[j] of the weight. The kernel's own ``g_idx`` is then ``g_idx[perm]``. On the CPU it works
    on blocks of rows of 256 KiB of codes; on an accelerator it needs 32 MiB beside its output, or
    128 rows where those are more.

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
    if _has_kernels(words):
        from ctconvert.transforms import marlin_triton

        return marlin_triton.take_columns_triton(words.contiguous(), perm, bits)
    n, k = words.shape[0], perm.shape[0]
    out = torch.empty_like(words, memory_format=torch.contiguous_format)
    rows = max(_SORT_CODES // k, 1)

    columns = perm.to(torch.int64)

    def work(blocks: Sequence[tuple[int, int]]) -> None:
        for start, stop in blocks:
            codes = unpack(words[start:stop], bits, k)
            out[start:stop] = pack(codes.gather(1, columns.expand(codes.shape)), bits)

    _spread(work, [(row, min(row + rows, n)) for row in range(0, n, rows)], words.nbytes)
    return out


# ---------------------------------------------------------------------------------- padding


def marlin_padded_shape(n: int, k: int) -> tuple[int, int]:
    """The smallest shape that holds ``n`` x ``k`` and that the kernel runs: (n_padded, k_padded).

    The kernel's tiles need K % 128 == 0 and N % 64 == 0, or K % 64 == 0 and N % 128 == 0. Of the
    two shapes the one with fewer elements is taken, then the one with fewer rows N.

    Raises ValueError for a size under 1.
    """
    if n < 1 or k < 1:
        raise ValueError(f"a weight of {n} x {k} has no elements to pad")
    shapes = [(_round_up(n, 64), _round_up(k, 128)), (_round_up(n, 128), _round_up(k, 64))]
    return min(shapes, key=lambda shape: (shape[0] * shape[1], shape[0]))


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
    fill = _signed(fill_code * _ONES[bits])
    if _has_kernels(words):
        from ctconvert.transforms import marlin_triton

        return marlin_triton.pad_words_triton(
            words.contiguous(), bits, n, k, n_padded, k_padded, fill
        )
    width = words.shape[1]
    padded = words.new_empty((n_padded, k_padded // f))
    padded[:n, :width] = words
    padded[:n, width:] = fill
    padded[n:] = fill
    if k % f:
        held = (1 << bits * (k % f)) - 1  # the bits of the last word that hold codes
        last = padded[:n, k // f]
        last.bitwise_and_(held).bitwise_or_(fill & _signed(held ^ 0xFFFFFFFF))
    return padded


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _signed(word: int) -> int:
    """The i32 that has the bits of an unsigned 32-bit word."""
    return word - (1 << 32) if word >= 1 << 31 else word


#: A word with code 1 everywhere.
_ONES = {4: 0x11111111, 8: 0x01010101}


# ----------------------------------------------------------------------------------- checks


def _has_kernels(tensor: torch.Tensor) -> bool:
    return tensor.device.type in ("cuda", "xpu")


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and viewable as 64-bit units; itself wherever it already is."""
    tensor = tensor.contiguous()
    return tensor if tensor.storage_offset() % 2 == 0 else tensor.clone()


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
