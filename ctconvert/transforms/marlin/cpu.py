"""The torch path of :mod:`ctconvert.transforms.marlin`, which describes the layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ctconvert.transforms.dtypes import empty
from ctconvert.transforms.packed import pack, unpack
from ctconvert.transforms.shapes import round_up
from ctconvert.transforms.threads import GRAIN, slices, spread
from ctconvert.transforms.words import exchange, signed

# K tiles of a block at most for 4 bits; half of it for 8 bits, whose tiles have twice the bytes.
_BLOCK_TILES = 240
_MAX_RUNS = 16
# 64 bytes more a row of scratch: rows a power of two apart would share the sets of the L1 cache.
_ROW_PADDING = 8
# Codes, a byte each, of one block of the act-order path.
_SORT_CODES = 1 << 18


def pack_tiles(units: torch.Tensor, bits: int) -> torch.Tensor:
    """Words as i64 [N, K*b/64] to tiles i32 [K/16, N*b/2], K % 16 == N % 64 == 0."""
    n, k = units.shape[0], units.shape[1] * 64 // bits
    tiles = empty((k // 16, n * bits // 2), torch.int32, units.device)
    target = tiles.view(torch.int64)

    def run(block: _Block, rows: slice, columns: slice, tile_rows: slice, places: slice) -> None:
        block.pack(units[rows, columns], target[tile_rows, places])

    _run_blocks(run, bits, n, k, tiles.nbytes)
    return tiles


def unpack_tiles(units: torch.Tensor, bits: int, n: int, k: int) -> torch.Tensor:
    """The inverse: tiles as i64 [K/16, N*b/4] to words i32 [N, K*b/32]."""
    words = empty((n, k * bits // 32), torch.int32, units.device)
    target = words.view(torch.int64)

    def run(block: _Block, rows: slice, columns: slice, tile_rows: slice, places: slice) -> None:
        block.unpack(units[tile_rows, places], target[rows, columns])

    _run_blocks(run, bits, n, k, words.nbytes)
    return words


def take_columns(words: torch.Tensor, perm: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of column ``perm[j]`` at column j: words i32 [N, K/f], perm i32 [K]."""
    n, k = words.shape[0], perm.shape[0]
    out = empty(words.shape, words.dtype, words.device)
    columns = perm.to(torch.int64)

    def work(share: Sequence[slice]) -> None:
        for rows in share:
            codes = unpack(words[rows], bits, k)
            taken = torch.empty_like(codes)
            for part in slices(len(codes), GRAIN // k):
                index = columns.expand(codes[part].shape)
                torch.gather(codes[part], 1, index, out=taken[part])
            out[rows] = pack(taken, bits)

    spread(work, slices(n, _SORT_CODES // k), words.nbytes)
    return out


def reorder(rows: torch.Tensor, order: list[int]) -> torch.Tensor:
    """[groups, N], N % 64 == 0: position p of every run of 64 takes what is at order[p] of it."""
    runs = rows.view(-1, len(order))
    index = torch.tensor(order, device=rows.device).expand(runs.shape)
    return runs.gather(1, index).view(rows.shape)


def pad(
    words: torch.Tensor, bits: int, n: int, k: int, n_padded: int, k_padded: int, fill: int
) -> torch.Tensor:
    """Words i32 [n, ceil(k/f)] to [n_padded, k_padded/f]; ``fill``, signed, is a word of codes."""
    width = words.shape[1]
    padded = words.new_empty((n_padded, k_padded * bits // 32))
    padded[:n, :width] = words
    padded[:n, width:] = fill
    padded[n:] = fill
    if used := k * bits % 32:
        held = (1 << used) - 1  # the bits of the last word that hold codes
        last = padded[:n, width - 1]
        last.bitwise_and_(held).bitwise_or_(fill & signed(held ^ 0xFFFFFFFF))
    return padded


# ------------------------------------------------------------------------------------- blocks


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
        rows = max(min(GRAIN // units, tiles), 1)
        self.chunks = slices(tiles, rows)
        # The exchanges and the staging of tile rows never overlap: one scratch serves both.
        half = planes[:, :, 0]
        scratch = torch.zeros(max(half.numel(), rows * (units + _ROW_PADDING)), dtype=torch.int64)
        self.staging = scratch[: rows * (units + _ROW_PADDING)].view(rows, -1)[:, :units]
        swap = scratch[: half.numel()].view(half.shape)
        order = ((2, 32), (2, 4), (2, 16), (3, 8)) if bits == 4 else ((2, 32), (3, 8), (3, 16))
        self.steps = [
            (
                shift,
                0xFFFFFFFFFFFFFFFF // ((1 << shift) + 1),
                planes.select(axis, 0),
                planes.select(axis, 1),
                swap,
            )
            for axis, shift in order
        ]

    def pack(self, words: torch.Tensor, tiles: torch.Tensor) -> None:
        """i64 [64*runs, K units] into ``tiles``, i64 [tiles, units a run * runs]."""
        units = self._planes_of(words)
        for half in (0, 1):
            self.filled[:, :, half].copy_(units[:, :, half])
        for step in self.steps:
            exchange(*step)
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
            exchange(*step)
        units = self._planes_of(words)
        for half in (0, 1):
            units[:, :, half].copy_(self.filled[:, :, half])

    def _planes_of(self, words: torch.Tensor) -> torch.Tensor:
        """The block's words, viewed in the order of the planes."""
        if self.bits == 4:  # [run, j1, j0, blk, a, tile]
            return words.unflatten(0, (self.runs, 2, 2, 2, 8)).permute(0, 4, 2, 3, 1, 5)
        units = words.unflatten(1, (self.tiles, 2))  # [run, j, blk, a, tile, k3]
        return units.unflatten(0, (self.runs, 4, 2, 8)).permute(0, 3, 2, 5, 1, 4)


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
    tiles, runs, wide = k // 16, n // 64, bits // 4  # wide: units of a row and K tile
    width = round_up(-(-tiles // -(-tiles * wide // _BLOCK_TILES)), 8)  # blocks of one width
    fitting = 2 * GRAIN // (64 * wide * (width + _ROW_PADDING))
    height = max(min(fitting, runs, _MAX_RUNS), 1)

    def work(share: Sequence[tuple[int, int]]) -> None:
        made: dict[tuple[int, int], _Block] = {}
        for tile, row in share:
            size = min(height, runs - row), min(width, tiles - tile)
            if size not in made:
                made[size] = _Block(bits, *size)
            run(
                made[size],
                slice(row * 64, (row + size[0]) * 64),
                slice(tile * wide, (tile + size[1]) * wide),
                slice(tile, tile + size[1]),
                slice(row * 64 * wide, (row + size[0]) * 64 * wide),
            )

    # K outermost: the pages of a row of tiles are filled while they are in the TLB.
    blocks = [(t, r) for t in range(0, tiles, width) for r in range(0, runs, height)]
    spread(work, blocks, nbytes)
