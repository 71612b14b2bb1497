"""The compiled loops give the torch paths' bits, and are taken where they should be."""

from __future__ import annotations

import threading

import pytest
import torch

from ctconvert.transforms import compiled, marlin, packed, threads
from ctconvert.transforms.marlin import cpu as tiles
from ctconvert.transforms.packed import cpu as words


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled from the first byte on."""
    pytest.importorskip("numba")
    monkeypatch.setattr(compiled, "WORTH", 0)
    monkeypatch.setattr(compiled, "LOOPS", compiled._Loops())


def random(n: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n * width)
    return torch.randint(-(1 << 31), 1 << 31, (n, width), generator=generator, dtype=torch.int32)


# blocks that are whole, cut along either side, and smaller than one
SHAPES = [(8, 16), (64, 128), (72, 1040), (192, 48), (328, 272)]


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


@pytest.mark.parametrize(("n", "k"), [(64, 16), (128, 528), (320, 1040)])
def test_tiles_there_and_back(loops: None, monkeypatch: pytest.MonkeyPatch, n: int, k: int) -> None:
    source = random(n, k // 8)
    want = tiles.pack_tiles(source.view(torch.int64), 4)
    monkeypatch.setattr(compiled, "empty", _poisoned)
    monkeypatch.setattr(tiles, "pack_tiles", None)
    monkeypatch.setattr(tiles, "unpack_tiles", None)
    assert torch.equal(marlin.marlin_pack(source, 4), want)
    assert torch.equal(marlin.marlin_unpack(want, 4, n, k), source)


def test_shared_among_threads(loops: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source = random(448, 272)
    transposed, packed_tiles = words.transpose(source, 4, 2176), marlin.marlin_pack(source, 4)
    monkeypatch.setattr(threads, "THREADED_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(compiled, "empty", _poisoned)
    assert torch.equal(packed.transpose_packed(source, 4), transposed)
    assert torch.equal(marlin.marlin_pack(source, 4), packed_tiles)
    assert torch.equal(marlin.marlin_unpack(packed_tiles, 4, 448, 2176), source)


def test_what_the_loops_do_not_take(loops: None) -> None:
    """Rows and words that fill no group, columns left out, memory that is not theirs."""
    wide = random(64, 18)
    for source, bits, columns in (
        (wide[:63], 4, 144),
        (wide[:, :17].contiguous(), 4, 136),
        (wide, 4, 143),
        (wide, 2, 288),
        (wide[:, 1:17], 4, 128),
        (wide.flatten()[1:-1].view(-1, 10)[:112], 4, 80),
    ):
        assert compiled.transpose(source, bits, columns) is None
        made = packed.transpose_packed(source, bits, columns, pad_rows=True)
        assert torch.equal(made, words.transpose(source, bits, columns))


def test_little_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is what comes before the bound, however many threads ask."""
    pytest.importorskip("numba")
    loops = compiled._Loops()
    monkeypatch.setattr(compiled, "WORTH", 64)
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

    monkeypatch.setattr(compiled, "WORTH", 0)
    monkeypatch.setattr(compiled, "LOOPS", compiled._Loops())
    monkeypatch.setattr(compiled.importlib, "import_module", missing)
    source = random(64, 16)
    assert compiled.transpose(source, 4, 128) is None
    assert torch.equal(packed.transpose_packed(source, 4), words.transpose(source, 4, 128))


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, 0x5A5A5A5A, dtype=dtype)
