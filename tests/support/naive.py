"""Codes and words for tests, element by element, sharing no code with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "golden"


def random_words(n: int, k: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (n, k * bits // 32)
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator, dtype=torch.int32)


def codes_of(words: torch.Tensor, bits: int) -> np.ndarray:
    """i32 [N, K/f] to the codes u8 [N, K]."""
    unsigned = words.numpy().view(np.uint32)
    f = 32 // bits
    codes = np.zeros((words.shape[0], words.shape[1] * f), dtype=np.uint8)
    for i in range(f):
        codes[:, i::f] = (unsigned >> np.uint32(bits * i)) & np.uint32((1 << bits) - 1)
    return codes


def words_of(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Codes [.., K] to i32 [.., K/f], code i of a word at bit b*i."""
    f = 32 // bits
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // f), dtype=np.uint32)
    for i in range(f):
        words |= codes[..., i::f].astype(np.uint32) << np.uint32(bits * i)
    return torch.from_numpy(words.view(np.int32))


def placed(codes: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Codes [N, K], each at its place in a flat array of as many; every place is taken once."""
    assert sorted(place.ravel().tolist()) == list(range(codes.size))
    flat = np.zeros(codes.size, dtype=np.uint8)
    flat[place] = codes
    return flat


def bit(values: np.ndarray, number: int) -> np.ndarray:
    return values >> number & 1


def marlin_tiles(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Codes [N, K] to Marlin's tiles, i32 [K/16, N*16/f], as its definition has them."""
    order = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}[bits]
    positions = [
        16 * r + i // 4 + 8 * block + 256 * j
        for i in range(32)
        for j in range(4)
        for block in (0, 1)
        for r in (2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4) + 8, 2 * (i % 4) + 9)
    ]
    permutation = [positions[at + place] for at in range(0, 1024, len(order)) for place in order]
    n, k = codes.shape
    tiles = codes.T.reshape(k // 16, 16, n // 16, 16).swapaxes(1, 2).reshape(k // 16, -1, 1024)
    return words_of(tiles[:, :, permutation].reshape(k // 16, -1), bits)


def marlin_scales(scale: torch.Tensor) -> torch.Tensor:
    """Scales [N, groups] to Marlin's [groups, N]; a single row in the channel-wise order."""
    order = [i + 8 * j for i in range(8) for j in range(8)]
    if scale.shape[1] == 1:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    wide = scale.t().contiguous()
    return wide.view(len(wide), -1, len(order))[:, :, order].view(len(wide), -1)


def padded(values: np.ndarray, n: int, k: int) -> np.ndarray:
    """With rows and columns of 0 up to n x k."""
    return np.pad(values, ((0, n - values.shape[0]), (0, k - values.shape[1])))
