"""The errors of a wrong group, found again in the few rows that have it."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor


def raise_mask_error(bitmask: Tensor, k: int, first_row: int) -> NoReturn:
    """Raise ValueError for the first group of these bitmask rows that does not keep two columns."""
    counts = _popcount(_split_nibbles(bitmask))
    wrong = counts != 2
    wrong[:, k // 4 :] = counts[:, k // 4 :] != 0
    row, group = _first(wrong)
    raise ValueError(_mask_message(int(counts[row, group]), first_row + row, 4 * group, k))


def _mask_message(count: int, row: int, column: int, k: int) -> str:
    where = f"row {row}, column {column}: the bitmask keeps {count} of 4 columns"
    if column >= k:
        return f"{where}, but the weight has only {k} columns"
    return f"{where}, 2:4 needs exactly 2"


def raise_dense_error(dense: Tensor, first_row: int) -> NoReturn:
    """Raise ValueError for the first group of these rows that has more than two nonzeros."""
    counts = _is_nonzero(dense).unflatten(1, (-1, 4)).sum(2)
    row, group = _first(counts > 2)
    raise ValueError(
        f"row {first_row + row}, column {4 * group}: {int(counts[row, group])} of 4 columns are "
        "nonzero, 2:4 allows 2"
    )


def raise_drop_error(dense: Tensor, bitmask: Tensor, first_row: int) -> NoReturn:
    """Raise ValueError for the first group whose bitmask is wrong or would drop a nonzero."""
    k = dense.shape[1]
    nibbles = _split_nibbles(bitmask)
    counts = _popcount(nibbles)
    wrong = counts != 2
    wrong[:, k // 4 :] = counts[:, k // 4 :] != 0
    kept = (nibbles[:, : k // 4, None] >> torch.arange(4, dtype=torch.uint8)) & 1
    dropped = _is_nonzero(dense) & (kept.flatten(1) == 0)
    wrong[:, : k // 4] |= dropped.unflatten(1, (-1, 4)).any(2)
    row, group = _first(wrong)
    count = int(counts[row, group])
    if count != 2 or 4 * group >= k:
        raise ValueError(_mask_message(count, first_row + row, 4 * group, k))
    column = 4 * group + int(dropped[row, 4 * group : 4 * group + 4].nonzero()[0, 0])
    raise ValueError(f"row {first_row + row}, column {column}: nonzero, but the bitmask drops it")


def raise_meta_error(values: Tensor, nibbles: Tensor, n: int, k: int, first_row: int) -> NoReturn:
    """Raise ValueError for the first invalid nibble of a row-major meta tensor of n rows."""
    codes = _split_nibbles(nibbles)
    low, high = codes & 3, codes >> 2
    wrong = codes != 0
    inside = wrong[:n, : k // 4]
    empty = (_bits(values) == 0).unflatten(1, (-1, 2)).all(2)
    inside &= low[:n, : k // 4] >= high[:n, : k // 4]
    inside |= (codes[:n, : k // 4] == 0) & ~empty
    row, group = _first(wrong)
    where = f"row {first_row + row}, column {4 * group}"
    pair = f"({int(low[row, group])}, {int(high[row, group])})"
    if row >= n or 4 * group >= k:
        raise ValueError(f"{where}: padding of the metadata is not 0 but the pair {pair}")
    if int(codes[row, group]) == 0:
        raise ValueError(f"{where}: the index pair is (0, 0) but the values are not both zero")
    raise ValueError(f"{where}: {pair} is no index pair of the metadata")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int8 if tensor.element_size() == 1 else torch.int16)


def _is_nonzero(dense: Tensor) -> Tensor:
    bits = _bits(dense)
    return bits != 0 if dense.element_size() == 1 else (bits & 0x7FFF) != 0


def _split_nibbles(packed: Tensor) -> Tensor:
    """u8 [R, C] -> its nibbles u8 [R, 2C], low nibble first."""
    return torch.stack((packed & 0x0F, packed >> 4), 2).flatten(1)


def _popcount(nibbles: Tensor) -> Tensor:
    return (nibbles & 1) + (nibbles >> 1 & 1) + (nibbles >> 2 & 1) + (nibbles >> 3)


def _first(wrong: Tensor) -> tuple[int, int]:
    """Row and column of the first true element, row by row."""
    position = int(wrong.flatten().to(torch.uint8).argmax())
    row, column = divmod(position, wrong.shape[1])
    if not bool(wrong[row, column]):
        raise RuntimeError("a 2:4 transform reported an error that its tensors do not show")
    return row, column
