"""Tensors read in blocks by threads: their bytes, whatever the blocks, on a GPU too; failures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import CHECKPOINTS, EXAMPLE

import ctconvert
from ctconvert.errors import ConversionError
from ctconvert.runtime import load, loading, reading
from ctconvert.store.local import LocalStore
from ctconvert.store.safetensors import TensorEntry, read_header
from ctconvert.transforms.dtypes import same_bits

CPU = torch.device("cpu")


def entries_of(folder: Path) -> list[TensorEntry]:
    store = LocalStore(folder)
    return [
        entry
        for name in store.sizes()
        if name.endswith(".safetensors")
        for entry in read_header(store, name).tensors
    ]


def expected(folder: Path, entry: TensorEntry) -> bytes:
    with (folder / entry.file).open("rb") as file:
        file.seek(entry.offset)
        return file.read(entry.nbytes)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("block", [1 << 12, 99_991, 8 << 20])
@pytest.mark.parametrize("step", [1, 3])
def test_every_byte_is_read(
    block: int, step: int, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """Tensors in several blocks, several in one, and gaps between those that are wanted."""
    monkeypatch.setattr(reading, "CHUNK", block)
    wanted = entries_of(EXAMPLE)[::-step]
    found = reading.read(LocalStore(EXAMPLE), wanted, CPU)
    assert set(found) == {entry.name for entry in wanted}
    for entry in wanted:
        assert list(found[entry.name].shape) == list(entry.spec.shape)
        assert bytes_of(found[entry.name]) == expected(EXAMPLE, entry), entry.name


def test_nothing_is_nothing() -> None:
    assert reading.read(LocalStore(EXAMPLE), [], CPU) == {}


def test_a_buffer_is_not_filled_while_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that are late are those of the bytes that were in the buffer."""
    late: list[tuple[torch.Tensor, torch.Tensor]] = []
    right = torch.Tensor.copy_

    class Event:
        def __init__(self) -> None:
            self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []

        def record(self, stream: Any) -> None:
            self.copies, late[:] = list(late), []

        def synchronize(self) -> None:
            for target, source in self.copies:
                right(target, source)
            self.copies = []

    def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
        late.append((target, source))

    monkeypatch.setattr(torch.cpu, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(reading, "CHUNK", 1 << 14)
    monkeypatch.setattr(reading, "READERS", 1)
    wanted = entries_of(EXAMPLE)
    found = reading.read(LocalStore(EXAMPLE), wanted, CPU)
    for entry in wanted:
        assert bytes_of(found[entry.name]) == expected(EXAMPLE, entry), entry.name


def test_a_file_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and the other threads do not go on."""
    wanted = entries_of(EXAMPLE)
    data = (EXAMPLE / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(reading, "CHUNK", 1 << 12)
    reads = []
    right = LocalStore.read_into

    def counted(self: LocalStore, name: str, offset: int, buffer: memoryview) -> None:
        reads.append(offset)
        right(self, name, offset, buffer)

    monkeypatch.setattr(LocalStore, "read_into", counted)
    with pytest.raises(ConversionError, match="ends at byte"):
        reading.read(LocalStore(tmp_path), wanted[::-1], CPU)
    assert len(reads) < 0.9 * len(data) / (1 << 12)


def made(name: str, target: str, folder: Path, **options: Any) -> Path:
    out = folder / f"{name}-{target}"
    ctconvert.repack(CHECKPOINTS / name, out, target=target, device="cpu", **options)
    return out


def same(a: loading.Modules, b: loading.Modules) -> None:
    assert list(a) == list(b)
    for name, module in a.items():
        left, right = module.tensors(), b[name].tensors()
        assert set(left) == set(right)
        for local, tensor in left.items():
            assert same_bits(tensor.cpu(), right[local].cpu()), f"{name}.{local}"


class Elsewhere(loading.Loader):
    """Loads to the CPU as it does to other devices."""

    def __init__(self, out: Path) -> None:
        super().__init__(out, "cpu")

    def read(self, entries: Any) -> loading.Tensors:
        return reading.read(self.output.store, entries, self.device)


@pytest.mark.parametrize(
    ("name", "target"),
    [("smol-w4a16-g32-asym", "cuda"), ("smol-w4-embed-head-g64", "triton")],
)
def test_a_loader_gives_the_mapped_tensors(name: str, target: str, tmp_path: Path) -> None:
    out = made(name, target, tmp_path)
    with Elsewhere(out) as loader:
        found = loader.load(loader.converted)
        assert loader.output.store._open  # type: ignore[attr-defined]
    assert not loader.output.store._open  # type: ignore[attr-defined]
    same(found, load(out, "cpu"))


def test_a_loader_reads_a_ranks_biases(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tmp_path / "in"
    source.mkdir()
    for path in (CHECKPOINTS / "smol-w4a16-g64-sym").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight_scale")]:
        rows = len(tensors[name])
        tensors[name.replace("weight_scale", "bias")] = torch.arange(rows).bfloat16()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    ctconvert.repack(source, out, target="triton", device="cpu", tensor_parallel=3)
    ranked = load(out, "cpu", rank=1)
    with Elsewhere(out) as loader:
        chosen = [m.name for m in loader.converted.values() if m.rank == 1]
        found = loader.load(chosen)
    biases = 0
    for name, module in found.items():
        want = ranked[name.removeprefix("rank1.")].bias
        assert (module.bias is None) == (want is None)
        if want is not None and module.bias is not None:
            assert torch.equal(module.bias, want)
            biases += 1
    assert biases


# --- on GPUs -------------------------------------------------------------------------------------


def _devices() -> Sequence[str]:
    return [f"cuda:{index}" for index in range(min(2, torch.cuda.device_count()))]


@pytest.mark.gpu
@pytest.mark.parametrize("index", [0, 1])
def test_a_gpu_has_the_files_bytes(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() <= index:
        pytest.skip(f"needs {index + 1} GPUs")
    device = torch.device("cuda", index)
    wanted = entries_of(EXAMPLE)
    for block in (1 << 12, 99_991, 8 << 20):
        monkeypatch.setattr(reading, "CHUNK", block)
        # memory that was freed with work on it still queued
        junk = [torch.empty(e.nbytes, dtype=torch.uint8, device=device) for e in wanted]
        for tensor in junk:
            tensor.fill_(7)
        torch.randn((2048, 2048), device=device) @ torch.randn((2048, 2048), device=device)
        del junk, tensor
        found = reading.read(LocalStore(EXAMPLE), wanted, device)
        for entry in wanted:
            assert found[entry.name].device == device
            assert bytes_of(found[entry.name]) == expected(EXAMPLE, entry), entry.name


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "target"),
    [("smol-w4a16-g32-asym", "cuda"), ("smol-w4-embed-head-g64", "triton")],
)
def test_modules_on_a_gpu_are_those_of_the_cpu(name: str, target: str, tmp_path: Path) -> None:
    out = made(name, target, tmp_path)
    for device in _devices():
        found = load(out, device)
        assert {str(t.device) for m in found.values() for t in m.tensors().values()} == {device}
        same(found, load(out, "cpu"))
