"""The torch path of :mod:`ctconvert.transforms.nvfp4`, which describes the layout.

A block is some runs of 64 rows by some columns of groups, seen as 64-bit words of eight groups.
Three exchanges of fields between words (Warren, "Hacker's Delight", section 7-3) trade the bits of
a group's number for three bits of the row's; what is left is a transpose of words::

    before: planes [n5, n4, n3, run, n2 n1 n0, word],  byte (g2 g1 g0)
    after:  planes [g2, g0, g1, run, n2 n1 n0, word],  byte (n5 n3 n4)

Blocks are shared among threads, see :mod:`ctconvert.transforms.threads`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ctconvert.transforms.threads import GRAIN, slices, spread

_RUN = 64
_GREATEST = 246  # 448
_LANES = 8
# Words of a row in a block: rows of a whole number of cache lines, and a TLB's worth of them after.
_WIDTH = 64

#: Changes bytes in place, eight groups of a row after one another.
_Change = Callable[[torch.Tensor], None]


def pack_scales(raw: torch.Tensor, power: int) -> tuple[torch.Tensor, torch.Tensor]:
    """u8 [N, G], every byte checked, to (packed u8 [G, N], lost u8 [N, ceil(G/2)])."""
    n, groups = raw.shape
    lost = raw.new_zeros((n, -(-groups // 2)))
    smallest = _smallest_kept(power)  # a power of two: what is not less becomes 0

    def flush(parts: Sequence[slice]) -> None:
        for rows in parts:
            flushed = raw[rows].clamp(max=smallest).bitwise_and_(smallest - 1)
            if int(flushed.max()):
                if groups % 2:
                    flushed = torch.nn.functional.pad(flushed, (0, 1))
                pairs = flushed.view(torch.int16)  # of fields under 8: what is shifted out is 0
                lost[rows] = pairs.bitwise_or_(pairs >> 4)

    spread(flush, _row_chunks(n, groups), raw.nbytes)
    return _tiled(raw, _changer(_e5m3_bytes(power), 8, _offset(power))), lost


def unpack_scales(packed: torch.Tensor, lost: torch.Tensor, power: int) -> torch.Tensor:
    """The inverse: to u8 [N, G]."""
    groups, n = packed.shape
    back = [0] * 256
    for byte, made in enumerate(_e5m3_bytes(power)):
        if made:
            back[made] = byte
    raw = _untiled(packed, _changer(back, _offset(power) + 8, -_offset(power)))

    def fill(parts: Sequence[slice]) -> None:
        for rows in parts:
            nibbles = lost[rows]
            if int(nibbles.max()):
                pairs = nibbles.to(torch.int16)
                pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F)
                raw[rows] |= pairs.view(torch.uint8)[:, :groups]

    spread(fill, _row_chunks(n, groups), raw.nbytes)
    return raw


def tile_scales(raw: torch.Tensor) -> torch.Tensor:
    """u8 [N, G] to u8 [G, N]."""
    return _tiled(raw, lambda bytes_: None)


def untile_scales(tiled: torch.Tensor) -> torch.Tensor:
    """The inverse: u8 [G, N] to u8 [N, G]."""
    return _untiled(tiled, lambda bytes_: None)


# ------------------------------------------------------------------------------------- bytes


def _offset(power: int) -> int:
    """What a normal's byte is greater by in E5M3, whose exponent has another bias."""
    return (15 + power) * 8


def _smallest_kept(power: int) -> int:
    """The smallest byte that is not flushed: of a subnormal from p = 1 on."""
    return max(8 >> power, 1)


def _e5m3_bytes(power: int) -> list[int]:
    """The E5M3 byte of every E4M3 byte up to 448 that 2**p does not make greater than that."""
    made = [0] * 128
    for byte in range(_smallest_kept(power), 8):
        log2 = byte.bit_length() - 1
        value = (log2 + 13 + power) << 3 | ((byte << (3 - log2)) & 7)
        made[byte] = value if value <= _GREATEST else 0
    for byte in range(8, 127 - 8 * power):
        made[byte] = byte + _offset(power)
    return made


def _changer(values: list[int], lowest: int, shift: int) -> _Change:
    """Bytes to ``values``, which from ``lowest`` on is adding ``shift``, modulo 256."""
    table = torch.tensor(values + [0] * (256 - len(values)), dtype=torch.uint8)
    zeros = not any(values[:lowest])

    def change(bytes_: torch.Tensor) -> None:
        for chunk in bytes_.split(GRAIN):
            if int(chunk.min()) >= lowest:
                chunk.add_(shift & 255)
            elif zeros:
                # Comparing is some ten times slower than arithmetic on bytes.
                changed = chunk.clamp(lowest - 1, lowest).sub_(lowest - 1)
                chunk.add_(shift & 255).mul_(changed)
            else:
                chunk.copy_(table.index_select(0, chunk.to(torch.int32)))

    return change


# ------------------------------------------------------------------------------------- order


def _tiled(raw: torch.Tensor, change: _Change) -> torch.Tensor:
    n, groups = raw.shape
    if not raw.numel():
        return raw.new_empty((groups, n))
    words = _words(raw, 1)
    made = raw.new_empty((words.shape[1] * _LANES, n))
    target = made.view(torch.int64)

    def work(parts: Sequence[tuple[slice, slice]]) -> None:
        for rows, columns, block in _with_scratch(parts):
            block.planes.copy_(block.shaped(words[rows, columns]))
            change(block.bytes)
            block.exchange(_EXCHANGES)
            _places(target, rows, columns).copy_(block.placed)

    spread(work, _blocks(*words.shape), raw.nbytes)
    return made[:groups]


def _untiled(tiled: torch.Tensor, change: _Change) -> torch.Tensor:
    groups, n = tiled.shape
    if not tiled.numel():
        return tiled.new_empty((n, groups))
    source = _words(tiled, 0)
    made = tiled.new_empty((n, source.shape[0]))
    words = made.view(torch.int64)

    def work(parts: Sequence[tuple[slice, slice]]) -> None:
        for rows, columns, block in _with_scratch(parts):
            block.placed.copy_(_places(source, rows, columns))
            block.exchange(_EXCHANGES[::-1])
            change(block.bytes)
            block.shaped(words[rows, columns]).copy_(block.planes)

    spread(work, _blocks(*words.shape), tiled.nbytes)
    return made if made.shape[1] == groups else made[:, :groups].contiguous()


#: Axis of the planes, width of the fields, and the lower of every two fields.
_EXCHANGES = (
    (1, 8, 0x00FF00FF00FF00FF),  # n4 and g0
    (2, 16, 0x0000FFFF0000FFFF),  # n3 and g1
    (0, 32, 0x00000000FFFFFFFF),  # n5 and g2
)


class _Block:
    """Scratch for blocks of ``rows`` rows by ``width`` words: fresh memory costs page faults."""

    def __init__(self, rows: int, width: int) -> None:
        self.planes = torch.zeros((2, 2, 2, rows // _RUN, 8, width), dtype=torch.int64)
        self.bytes = self.planes.view(-1).view(torch.uint8)
        self.placed = self.planes.permute(5, 0, 2, 1, 3, 4)  # as _places has them
        self.swap = torch.zeros_like(self.planes[0])

    @staticmethod
    def shaped(words: torch.Tensor) -> torch.Tensor:
        """Words of rows, viewed in the order of the planes."""
        return words.unflatten(0, (-1, 2, 2, 2, 8)).permute(1, 2, 3, 0, 4, 5)

    def exchange(self, exchanges: tuple[tuple[int, int, int], ...]) -> None:
        for axis, shift, mask in exchanges:
            low, high = self.planes.select(axis, 0), self.planes.select(axis, 1)
            # The shift is arithmetic; the mask is zero where it brings in copies of the sign.
            torch.bitwise_right_shift(low, shift, out=self.swap)
            self.swap.bitwise_xor_(high).bitwise_and_(mask)
            high.bitwise_xor_(self.swap)
            low.bitwise_xor_(self.swap.bitwise_left_shift_(shift))


def _words(raw: torch.Tensor, groups: int) -> torch.Tensor:
    """Bytes as 64-bit words, with zeros up to whole words along dimension ``groups``."""
    if missing := -raw.shape[groups] % _LANES:
        raw = torch.nn.functional.pad(raw, (0, missing) if groups else (0, 0, 0, missing))
    elif raw.storage_offset() % _LANES:
        raw = raw.clone()
    return raw.view(torch.int64)


def _blocks(n: int, words: int) -> list[tuple[slice, slice]]:
    """Rows and words of each block of [N, words]."""
    width = min(_WIDTH, words)
    height = GRAIN // (width * _RUN) * _RUN
    return [(rows, columns) for columns in slices(words, width) for rows in slices(n, height)]


def _with_scratch(
    parts: Sequence[tuple[slice, slice]],
) -> Iterator[tuple[slice, slice, _Block]]:
    """Each block with its scratch."""
    made: dict[tuple[int, int], _Block] = {}
    for rows, columns in parts:
        size = rows.stop - rows.start, columns.stop - columns.start
        if size not in made:
            made[size] = _Block(*size)
        yield rows, columns, made[size]


def _row_chunks(n: int, groups: int) -> list[slice]:
    return slices(n if groups else 0, GRAIN // max(groups, 1))


def _places(words: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    """Where a block's words are in the rows of groups: [word, g2, g1, g0, run, n2 n1 n0]."""
    part = words[
        columns.start * _LANES : columns.stop * _LANES, rows.start // _LANES : rows.stop // _LANES
    ]
    return part.unflatten(1, (-1, 8)).unflatten(0, (-1, 2, 2, 2))
