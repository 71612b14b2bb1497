"""Buffers that are used again: never while anything still refers to one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from ctconvert.memory import LEAST, Pool, buffer
from ctconvert.transforms.dtypes import empty, raw_bytes

SIZE = LEAST + 12


def tensor(data: Any) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch.uint8, count=SIZE)


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda data: data,
    "a slice": lambda data: memoryview(data)[5:9],
    "an array": lambda data: numpy.frombuffer(data, dtype=numpy.uint8)[3:],
    "a tensor": tensor,
    "a view": lambda data: tensor(data)[4:12].view(torch.int32),
    "a transposed view": lambda data: tensor(data).view(2, -1).t()[1:],
    "a tensor's bytes": lambda data: raw_bytes(tensor(data)[8:]),
    "a detached tensor": lambda data: tensor(data).detach().unflatten(0, (-1, 2))[:, 0],
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_buffer_is_given_out_again_when_nobody_holds_it(holder: str) -> None:
    pool = Pool()
    data = pool.take(SIZE)
    view = HOLDERS[holder](data)
    data[:4] = b"mine"
    place = id(data)
    del data
    other = pool.take(SIZE)
    assert id(other) != place
    other[:4] = b"else"
    del view
    again = pool.take(SIZE)
    assert id(again) == place and again[:4] == b"mine"


def test_what_fits_badly_is_not_used_and_idle_buffers_are_bounded() -> None:
    pool = Pool(kept=3 * LEAST)
    large, small = pool.take(8 * LEAST), pool.take(LEAST)
    del large, small
    held = pool.take(2 * LEAST)
    assert sorted(map(len, pool._buffers)) == [LEAST, 2 * LEAST]
    pool.clear()
    assert pool._buffers == [held]


def test_threads_share_no_buffer() -> None:
    pool = Pool()
    wrong = []

    def work(mark: int) -> None:
        for _ in range(200):
            data = memoryview(pool.take(SIZE))
            data[::4096] = bytes([mark]) * len(data[::4096])
            if any(value != mark for value in data[::4096]):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(pool._buffers) <= 8  # one is taken while the last is held


def test_tensors_and_buffers_of_any_size() -> None:
    assert len(buffer(0)) == 0 and len(buffer(SIZE)) == SIZE
    for shape in ((0,), (3, 5), (SIZE, 1), (2, SIZE)):
        made = empty(shape, torch.int16)
        assert made.shape == shape and made.is_contiguous() and made.dtype == torch.int16
        assert made.data_ptr() % 8 == 0
