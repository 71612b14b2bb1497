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
