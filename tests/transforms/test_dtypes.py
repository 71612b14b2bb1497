"""Comparison of bit patterns, byte by byte whatever the length and the place in memory."""

from __future__ import annotations

import pytest
import torch

from ctconvert.transforms.dtypes import same_bits


@pytest.mark.parametrize("begin", [0, 1, 4, 8])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 31])
def test_every_byte_is_compared(begin: int, length: int) -> None:
    memory = torch.arange(48, dtype=torch.uint8)
    left = memory[begin : begin + length]
    assert same_bits(left, left.clone())
    for place in range(length):
        right = left.clone()
        right[place] ^= 1 << place % 8
        assert not same_bits(left, right), place
        assert not same_bits(right, left), place


def test_zeros_of_two_signs_differ_and_nan_is_itself() -> None:
    values = torch.tensor([0.0, float("nan"), 1.0])
    assert same_bits(values, values.clone())
    assert not same_bits(values, values * torch.tensor([-1.0, 1.0, 1.0]))


def test_a_tensor_is_itself_but_not_another_shape_or_order_of_its_memory() -> None:
    values = torch.arange(12, dtype=torch.int16).view(3, 4)
    assert same_bits(values, values[:])
    assert not same_bits(values, values.view(4, 3))
    assert not same_bits(values[:, :3], values.t()[:3].t()[:, :3] + 1)
    square = torch.arange(16).view(4, 4)
    assert not same_bits(square, square.t())
