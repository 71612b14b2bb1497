"""The compiled loops give the torch paths' bits, and are taken where they should be."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctconvert.transforms import compiled, marlin, packed, sparse24, threads
from ctconvert.transforms.dtypes import same_bits
from ctconvert.transforms.marlin import cpu as tiles
from ctconvert.transforms.packed import cpu as words
from ctconvert.transforms.sparse24 import compiled as sparse_loops
from ctconvert.transforms.sparse24 import cpu as sparse_torch
from ctconvert.transforms.sparse24 import order


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled from the first byte on."""
    pytest.importorskip("numba")
    monkeypatch.setattr(compiled.LOOPS, "least", 0)


def random(n: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n * width)
    return torch.randint(-(1 << 31), 1 << 31, (n, width), generator=generator, dtype=torch.int32)


# blocks that are whole, cut along either side, and smaller than one
SHAPES = [(16, 16), (64, 128), (80, 4368), (192, 48), (336, 272)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_transposed(
    loops: None, monkeypatch: pytest.MonkeyPatch, n: int, k: int, bits: int
) -> None:
    source = random(n, k * bits // 32)
    want = words.transpose(source, bits, k)
    monkeypatch.setattr(compiled, "empty", _poisoned)
    monkeypatch.setattr(words, "transpose", None)  # would fail if it were called
    assert torch.equal(packed.transpose_packed(source, bits), want)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(64, 16), (128, 2576), (320, 1040)])
def test_tiles_there_and_back(
    loops: None, monkeypatch: pytest.MonkeyPatch, n: int, k: int, bits: int
) -> None:
    source = random(n, k * bits // 32)
    want = tiles.pack_tiles(source.view(torch.int64), bits)
    monkeypatch.setattr(compiled, "empty", _poisoned)
    monkeypatch.setattr(tiles, "pack_tiles", None)
    monkeypatch.setattr(tiles, "unpack_tiles", None)
    assert torch.equal(marlin.marlin_pack(source, bits), want)
    assert torch.equal(marlin.marlin_unpack(want, bits, n, k), source)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (48, 1040), (208, 272)])
def test_columns_in_another_order(
    loops: None, monkeypatch: pytest.MonkeyPatch, n: int, k: int, bits: int
) -> None:
    source = random(n, k * bits // 32)
    g_idx = torch.randint(0, 5, (k,), generator=torch.Generator().manual_seed(n)).int()
    perm = torch.argsort(g_idx, stable=True).int()
    want = tiles.take_columns(source, perm, bits)
    codes = packed.unpack(source, bits, k)
    assert torch.equal(packed.unpack(want, bits, k), codes[:, perm.long()])
    monkeypatch.setattr(compiled, "empty", _poisoned)
    monkeypatch.setattr(tiles, "take_columns", None)
    found, order = marlin.sort_columns(source, g_idx, bits)
    assert torch.equal(found, want) and torch.equal(order, perm)
    assert torch.equal(marlin.unsort_columns(want, perm, bits), source)


@pytest.mark.parametrize(("groups", "n"), [(1, 64), (5, 192), (33, 1024)])
def test_zero_points_there_and_back(
    loops: None, monkeypatch: pytest.MonkeyPatch, groups: int, n: int
) -> None:
    codes = torch.randint(0, 16, (groups, n), dtype=torch.uint8)
    with monkeypatch.context() as without:
        without.setattr(compiled.LOOPS, "least", 1 << 60)
        want = marlin.marlin_pack_zero_points(codes, 4)
    monkeypatch.setattr(compiled, "empty", _poisoned)
    monkeypatch.setattr(marlin, "_reorder", None)  # would fail if it were called
    assert torch.equal(marlin.marlin_pack_zero_points(codes, 4), want)
    assert torch.equal(marlin.marlin_unpack_zero_points(want, 4), codes)


def test_a_zero_point_out_of_range(loops: None) -> None:
    codes = torch.zeros((3, 64), dtype=torch.uint8)
    codes[1, 37] = 16
    with pytest.raises(ValueError, match="16"):
        marlin.marlin_pack_zero_points(codes, 4)


@pytest.mark.parametrize("bits", [4, 8])
def test_shared_among_threads(loops: None, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    n, k = 448, 2176
    source, perm = random(n, k * bits // 32), torch.arange(k - 1, -1, -1).int()
    transposed, turned = words.transpose(source, bits, k), tiles.take_columns(source, perm, bits)
    packed_tiles = marlin.marlin_pack(source, bits)
    monkeypatch.setattr(threads, "THREADED_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(compiled, "empty", _poisoned)
    assert torch.equal(packed.transpose_packed(source, bits), transposed)
    assert torch.equal(marlin.marlin_pack(source, bits), packed_tiles)
    assert torch.equal(marlin.marlin_unpack(packed_tiles, bits, n, k), source)
    assert torch.equal(marlin.unsort_columns(source, perm, bits), turned)


def test_what_the_loops_do_not_take(loops: None) -> None:
    """Rows and words that fill no group, columns left out, memory that is not theirs."""
    wide = random(64, 18)
    for source, bits, columns in (
        (wide[:63], 4, 144),
        (wide[:56], 4, 144),
        (wide[:, :17].contiguous(), 4, 136),
        (wide, 4, 143),
        (wide, 2, 288),
        (wide[:, 1:17], 4, 128),
        (wide.flatten()[1:-1].view(-1, 10)[:112], 4, 80),
    ):
        assert compiled.transpose(source, bits, columns) is None
        made = packed.transpose_packed(source, bits, columns, pad_rows=True)
        assert torch.equal(made, words.transpose(source, bits, columns))


def test_little_is_torchs() -> None:
    """And so is what comes before the bound, however many threads ask."""
    pytest.importorskip("numba")
    loops = compiled._Loops()
    loops.least = 64
    found: list[object] = []
    asked = [threading.Thread(target=lambda: found.append(loops.after(8))) for _ in range(16)]
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join()
    assert sum(one is None for one in found) == 7


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(compiled, "LOOPS", compiled._Loops())
    monkeypatch.setattr(compiled.LOOPS, "least", 0)
    monkeypatch.setattr(compiled.importlib, "import_module", missing)
    source = random(64, 16)
    assert compiled.transpose(source, 4, 128) is None
    assert torch.equal(packed.transpose_packed(source, 4), words.transpose(source, 4, 128))


def test_a_damaged_cache_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    numba = pytest.importorskip("numba")
    from ctconvert.transforms import loops
    from ctconvert.transforms.sparse24.loops import order8

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    logger = logging.getLogger("ctconvert")
    monkeypatch.setattr(logger, "propagate", True)

    def right() -> bool:
        """Compiled or loaded in a process of its own, as far as Numba can tell."""
        loops._tell.cache_clear()
        rows, flat = np.arange(256, dtype=np.uint64).reshape(64, 4), np.zeros(256, np.uint64)
        loops.loop(order8.py_func)(rows, flat, False, 0, 1)
        return np.array_equal(flat, np.concatenate([rows[:, :2].ravel(), rows[:, 2:].ravel()]))

    assert right()
    (index,), (code,) = tmp_path.rglob("*.nbi"), tmp_path.rglob("*.nbc")
    for path, content in ((index, b"damaged"), (index, b""), (code, b"\x80\x04"), (code, b"K")):
        path.write_bytes(content)
        assert right()
        (line,) = set(caplog.messages)
        assert "damaged" in line and line.endswith("compiled anew")
        caplog.clear()
        assert right() and not caplog.text  # it was written again

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    index.unlink()
    monkeypatch.setattr(loops.FunctionCache, "_save_overload", full)
    assert right()


@pytest.fixture
def sparse(loops: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_loops, "empty", _filled)


def sparse_weight(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of both signs and fewer than two nonzeros among its groups."""
    generator = torch.Generator().manual_seed(k)
    bits = torch.int16 if dtype.itemsize == 2 else torch.int8
    values = torch.randint(-(1 << 7), 1 << 7, (n, k // 4, 4), generator=generator, dtype=bits)
    values = values * (257 if dtype.itemsize == 2 else 1)
    kept = torch.randint(0, 4, (n, k // 4, 2), generator=generator)
    mask = torch.zeros(values.shape, dtype=torch.bool).scatter_(2, kept, True)
    if dtype.itemsize == 2:
        values[torch.rand(values.shape, generator=generator) < 0.1] = -(1 << 15)
    return torch.where(mask, values, 0).view(n, k).to(bits).view(dtype)


DTYPES = [torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 4), (65, 12), (130, 136), (192, 276)])
def test_sparse_there_and_back(sparse: None, n: int, k: int, dtype: torch.dtype) -> None:
    dense = sparse_weight(n, k, dtype)
    values, meta = sparse_torch.sm90_compress(dense)
    bitmask = sparse_torch.bitmask_of(dense)
    kept = sparse_torch.bitmask_compress(dense, bitmask)
    for found, want in (
        (
            sparse_loops.sm90_decompress(values, meta, n, k),
            sparse_torch.sm90_decompress(values, meta, n, k),
        ),
        (
            sparse_loops.bitmask_decompress(kept, bitmask, k),
            sparse_torch.bitmask_decompress(kept, bitmask, k),
        ),
    ):
        assert found is not None and same_bits(found, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("k", [132, 136])
def test_damage_is_told_as_torch_tells_it(sparse: None, k: int, dtype: torch.dtype) -> None:
    n = 70
    dense = sparse_weight(n, k, dtype)
    bitmask = sparse24.bitmask_of(dense)
    kept = sparse24.bitmask_compress(dense, bitmask)
    values, meta = sparse24.sm90_compress(dense)
    for row in (0, 63, n - 1):
        for byte in (0x01, 0x07, 0x73):
            wrong = bitmask.clone()
            wrong[row, -1] = byte
            assert sparse_loops.bitmask_decompress(kept, wrong, k) is None
            with pytest.raises(ValueError, match=f"row {row}"):
                sparse24.bitmask_decompress(kept, wrong, k)
    empty_weight = torch.zeros_like(dense)
    _, nothing = sparse24.sm90_compress(empty_weight)
    lost = torch.zeros_like(values)
    lost[69, -1] = 1
    assert sparse_loops.sm90_decompress(lost, nothing, n, k) is None
    for bit in range(8):  # wherever the order puts it: a padding nibble, a pair, or another pair
        other = meta.clone().flatten()
        other[bit * 37] ^= 1 << bit
        other = other.view(meta.shape)
        want = _result(sparse_torch.sm90_decompress, values, other, n, k)
        made = sparse_loops.sm90_decompress(values, other, n, k)
        assert (made is None) == isinstance(want, str)
        assert made is None or same_bits(made, want)


def every_group(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and a bitmask: any two of four columns, each 0, -0 or another, beside one another."""
    integer = torch.int16 if dtype.itemsize == 2 else torch.int8
    low, high = (1 << 8 * dtype.itemsize - 1 - bit for bit in (0, 1))
    some = torch.tensor([0, -low, 1, high, -1, low - 1], dtype=integer)
    values = torch.cartesian_prod(some, some)  # [36, 2]
    masks = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8)
    groups = values.repeat_interleave(6, 0)  # every value with every mask
    codes = masks.repeat(36)
    order = torch.randperm(216 * 32, generator=torch.Generator().manual_seed(3)) % 216
    values, codes = groups[order].reshape(72, -1), codes[order].reshape(72, -1, 2)
    return values.view(dtype), codes[..., 0] | codes[..., 1] << 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_of_every_group(
    sparse: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    compressed, bitmask = every_group(dtype)
    n, k = compressed.shape[0], 2 * compressed.shape[1]
    dense = sparse_torch.bitmask_decompress(compressed, bitmask, k)
    values, meta = sparse_torch.sm90_compress(dense)  # which makes any zero of 16 bits +0
    own = sparse_torch.bitmask_of(dense)
    plain = sparse_torch.sm90_decompress(values, meta, n, k)
    kept = sparse_torch.bitmask_compress(plain, own)
    for name in ("bitmask_decompress", "bitmask_compress", "sm90_compress", "sm90_decompress"):
        monkeypatch.setattr(sparse_torch, name, None)  # would fail if it were called
    found, pairs = sparse24.pairs_of_bitmask(compressed, bitmask, k)
    assert same_bits(found, values)
    assert same_bits(sparse24.sm90_meta(found, pairs, k), meta)
    back, again = sparse24.pairs_of_sm90(values, meta, n, k)
    assert back is values and same_bits(again, pairs)
    made, mask = sparse24.bitmask_of_pairs(values, pairs, k)
    assert same_bits(made, kept) and same_bits(mask, own)
    assert same_bits(sparse24.dense_of_pairs(values, pairs, k), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_pairs_of_a_weight_become_one(sparse: None, dtype: torch.dtype) -> None:
    """Index pairs that `sm90_compress` would not choose, and what is no index pair."""
    compressed, bitmask = every_group(dtype)
    n, k = compressed.shape[0], 2 * compressed.shape[1]
    pair_of = torch.zeros(16, dtype=torch.uint8)
    pair_of[[3, 5, 6, 9, 10, 12]] = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8)
    rows = pair_of[(bitmask & 15).int()] | pair_of[(bitmask >> 4).int()] << 4
    meta = sparse24.sm90_meta(compressed, rows, k)
    want = sparse_torch.sm90_compress(sparse_torch.bitmask_decompress(compressed, bitmask, k))
    values, pairs = sparse24.pairs_of_sm90(compressed, meta, n, k)
    assert same_bits(values, want[0])
    assert same_bits(sparse24.sm90_meta(values, pairs, k), want[1])
    for byte, row in ((0x05, 0), (0x50, 63), (0xF4, n - 1), (0x04, n - 1), (0x40, 7)):
        damaged = rows.clone()
        damaged[row, -1] = byte
        moved = sparse24.sm90_meta(compressed, damaged, k)
        made = _result(sparse24.pairs_of_sm90, compressed, moved, n, k)
        told = _result(sparse_torch.sm90_decompress, compressed, moved, n, k)
        assert isinstance(made, str) == isinstance(told, str)
        assert not isinstance(told, str) or made == told
        assert sparse_loops.settle(compressed, damaged, k, "bitmask") is None
    with pytest.raises(ValueError, match="row 63"):
        wrong = bitmask.clone()
        wrong[63, -1] = 0x37
        sparse24.pairs_of_bitmask(compressed, wrong, k)
    assert sparse_loops.settle(compressed[:, :-2], rows[:, :-1], k - 4, "pairs") is None


@pytest.mark.parametrize(("n", "k"), [(1, 4), (65, 12), (130, 136), (192, 276)])
def test_pairs_that_the_loops_do_not_take(n: int, k: int) -> None:
    """And without them: odd numbers of groups, rows and columns that metadata pads."""
    dense = sparse_weight(n, k, torch.float16)
    bitmask = sparse24.bitmask_of(dense)
    kept = sparse24.bitmask_compress(dense, bitmask)
    values, meta = sparse_torch.sm90_compress(dense)
    found, pairs = sparse24.pairs_of_bitmask(kept, bitmask, k)
    assert pairs.shape == (n, -(-k // 8))
    assert same_bits(found, values) and same_bits(sparse24.sm90_meta(found, pairs, k), meta)
    back, again = sparse24.pairs_of_sm90(values, meta, n, k)
    assert same_bits(back, values) and same_bits(again, pairs)
    made, mask = sparse24.bitmask_of_pairs(values, pairs, k)
    assert same_bits(
        sparse24.bitmask_decompress(made, mask, k), sparse24.dense_of_pairs(values, pairs, k)
    )


@pytest.mark.parametrize("size", [1, 2])
def test_order_of_the_metadata(sparse: None, size: int) -> None:
    rows = random(192, 160).view(torch.uint8)
    want = order.to_kernel_order(rows, size)
    made, back = (
        sparse_loops.to_kernel_order(rows, size),
        sparse_loops.from_kernel_order(want, size),
    )
    assert made is not None and same_bits(made, want)
    assert back is not None and same_bits(back, rows)


def _result(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except ValueError as error:
        return str(error)


def _filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    made = torch.empty(shape, dtype=dtype)
    made.view(torch.uint8).fill_(0x5A)
    return made


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, 0x5A if dtype == torch.uint8 else 0x5A5A5A5A, dtype=dtype)
