"""Several devices: which thread has which, what is shared, and that the bytes are the CPU's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cli import program
from support.paths import CHECKPOINTS, EXAMPLE

import ctconvert
from ctconvert import codec
from ctconvert.errors import ConversionError
from ctconvert.transforms.device import every
from ctconvert.work import choosing, lanes, transforming
from ctconvert.work.lanes import Lane, Lanes

TWO = (torch.device("cuda", 0), torch.device("cuda", 1))


def files(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")}
    assert len(found) > 2
    return found


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that says it sees two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("name", "wanted", "given"),
    [
        ("auto", TWO, "auto"),
        ("cuda", TWO, "cuda"),
        ("cuda:0", TWO[:1], "cuda:0"),
        ("cuda:1", TWO[1:], "cuda:1"),
        ("cpu", (torch.device("cpu"),), "cpu"),
    ],
)
def test_a_name_without_an_index_is_all(
    name: str, wanted: tuple[torch.device, ...], given: str, two: None
) -> None:
    assert every(name) == wanted
    assert choosing.device_named(name) == given
    assert every(given) == wanted


class Fake:
    """Two devices whose streams and current ones are noted; what they compute, the CPU does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pause: float = 0.01) -> None:
        self.here = threading.local()
        self.seen: list[tuple[int, torch.device, object]] = []
        self.streams: list[object] = []
        module = SimpleNamespace(device=self.device, Stream=self.stream, stream=self.streaming)
        monkeypatch.setattr(torch, "get_device_module", lambda _: module)
        monkeypatch.setattr(lanes, "every", lambda _: TWO)
        right: Callable[..., Any] = codec.encode

        def encode(item: Any, unit: int, read: Any, device: torch.device, power: Any) -> Any:
            assert self.here.device == device
            self.seen.append((threading.get_ident(), device, self.here.stream))
            time.sleep(pause)
            return right(item, unit, read, torch.device("cpu"), power)

        monkeypatch.setattr(codec, "encode", encode)
        self.pinned: list[bool] = []
        read = transforming.read_tensor

        def read_tensor(store: Any, entry: Any, pinned: bool = False) -> torch.Tensor:
            self.pinned.append(pinned)
            return read(store, entry)

        monkeypatch.setattr(transforming, "read_tensor", read_tensor)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.here.device = device
        yield
        self.here.device = None

    def stream(self) -> object:
        self.streams.append(self.here.device)
        return (len(self.streams), self.here.device)

    @contextmanager
    def streaming(self, stream: object) -> Iterator[None]:
        self.here.stream = stream
        yield
        self.here.stream = None


def test_modules_are_shared_among_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctconvert.repack(EXAMPLE, tmp_path / "cpu", target="cuda", device="cpu")
    with monkeypatch.context() as patched:
        fake = Fake(patched)
        ctconvert.repack(EXAMPLE, tmp_path / "two", target="cuda", device="cpu", workers=4)
    assert files(tmp_path / "two") == files(tmp_path / "cpu")
    assert len(fake.seen) == 14
    assert {device for _, device, _ in fake.seen} == set(TWO)
    assert all(stream[1] == device for _, device, stream in fake.seen)  # type: ignore[index]
    of_thread = {thread: (device, stream) for thread, device, stream in fake.seen}
    assert all(of_thread[thread] == (device, stream) for thread, device, stream in fake.seen)
    assert len({stream for _, stream in of_thread.values()}) == len(of_thread)
    counts = [fake.streams.count(device) for device in TWO]
    assert sum(counts) == len(of_thread) and max(counts) - min(counts) <= 1
    assert all(fake.pinned)


def test_the_device_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fake(monkeypatch)
    right = codec.encode

    def encode(item: Any, unit: int, read: Any, device: torch.device, power: Any) -> Any:
        if device.index == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return right(item, unit, read, device, power)

    monkeypatch.setattr(codec, "encode", encode)
    with pytest.raises(ConversionError, match=r": out of memory on cuda:1; use device='cpu'$"):
        ctconvert.repack(EXAMPLE, tmp_path / "out", target="cuda", device="cpu", workers=4)


def test_the_device_that_has_no_room_to_begin_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program has all of it: the driver says so, not torch's allocator."""
    fake = Fake(monkeypatch)

    def stream() -> object:
        if fake.here.device.index == 1:
            raise torch.AcceleratorError("CUDA error: out of memory\nSearch for")
        return fake.stream()

    torch.get_device_module(TWO[0]).Stream = stream
    with pytest.raises(ConversionError, match=r": out of memory on cuda:1; use device='cpu'$"):
        ctconvert.repack(EXAMPLE, tmp_path / "out", target="cuda", device="cpu", workers=4)


def test_a_devices_copies_are_of_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from ctconvert.store.local import LocalStore
    from ctconvert.store.safetensors import read_header
    from ctconvert.transforms.dtypes import same_bits

    store = LocalStore(EXAMPLE)
    entry = read_header(store, "model.safetensors").tensors[3]
    plain = transforming._reader(store, torch.device("cpu"))(entry)
    made: list[bool] = []
    right = torch.empty

    def empty(*args: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        made.append(pin_memory)
        return right(*args, **more)

    monkeypatch.setattr(torch, "empty", empty)
    assert same_bits(transforming._reader(store, TWO[1])(entry), plain)
    assert made == [True]


def test_the_first_of_a_kind_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one where it failed; the others go together."""
    monkeypatch.setattr(lanes, "every", lambda _: TWO)
    shared = Lanes("cuda")
    inside: list[int] = []
    most: list[int] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        with shared.compiling("kind"):
            with lock:
                inside.append(number)
                most.append(len(inside))
            time.sleep(0.05)
            with lock:
                inside.remove(number)
                failed = len(most) == 1
            if failed:
                raise ValueError

    with ThreadPoolExecutor(6) as threads:
        ended = [threads.submit(work, number) for number in range(6)]
    assert [type(one.exception()) for one in ended].count(ValueError) == 1
    assert most[:2] == [1, 1]
    assert max(most[2:]) > 1


def test_on_the_cpu_nobody_waits() -> None:
    shared = Lanes("cpu")
    assert shared.mine() == Lane(torch.device("cpu"))
    both = threading.Barrier(2, timeout=10)

    def work(_: int) -> None:
        with shared.compiling("kind"):
            both.wait()

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, range(2)))


# --- on GPUs -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", "cuda"])
@pytest.mark.parametrize(
    ("name", "target", "fuse"),
    [
        ("smol-w4a16-g64-sym", "triton", True),
        ("smol-w4a16-g32-asym", "cuda", False),
        ("smol-mixed-w4-w8-regex-ignore", "cuda-sm90", True),
        ("smol-w8a8o8-static-sym", "triton", False),
        ("old071-smol-sparse24-bf16", "cuda", False),
        ("old071-rand-w4a16-g128-actorder-group-gidx", "cuda", False),
        ("smol-mxfp4a16", "cuda", False),
    ],
)
def test_the_bytes_are_the_cpus(
    name: str, target: str, fuse: bool, device: str, tmp_path: Path
) -> None:
    if device != "cuda:0" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    source = CHECKPOINTS / name
    ctconvert.repack(source, tmp_path / "cpu", target=target, fuse=fuse, device="cpu")
    made = tmp_path / "gpu"
    ctconvert.repack(source, made, target=target, fuse=fuse, device=device, workers=4)
    assert files(made) == files(tmp_path / "cpu")
    ctconvert.restore(made, tmp_path / "back", device=device)
    ctconvert.restore(made, tmp_path / "back-cpu", device="cpu")
    assert files(tmp_path / "back") == files(tmp_path / "back-cpu")


@pytest.mark.gpu
def test_two_gpus_share_the_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    seen = []
    right = codec.encode

    def encode(item: Any, unit: int, read: Any, device: torch.device, power: Any) -> Any:
        seen.append(device)
        assert torch.cuda.current_device() == device.index
        assert torch.cuda.current_stream() != torch.cuda.default_stream()
        time.sleep(0.02)
        return right(item, unit, read, device, power)

    monkeypatch.setattr(codec, "encode", encode)
    ctconvert.repack(EXAMPLE, tmp_path / "out", target="cuda", device="cuda", workers=4)
    assert set(seen) == {torch.device("cuda", i) for i in range(torch.cuda.device_count())}


@pytest.mark.gpu
def test_kernels_are_compiled_once(tmp_path: Path) -> None:
    """The next process finds them in Triton's cache."""
    cache = tmp_path / "cache"
    found = []
    for out in ("first", "second"):
        made = program(
            *("repack", EXAMPLE, tmp_path / out, "--target", "cuda", "--device", "cuda"),
            more={"TRITON_CACHE_DIR": str(cache)},
        )
        assert made.returncode == 0, made.stderr
        kernels = {path: path.stat().st_mtime_ns for path in cache.rglob("*.cubin")}
        assert kernels
        found.append(kernels)
    assert found[0] == found[1]
