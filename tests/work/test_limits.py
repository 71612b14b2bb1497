"""Full disks, failing reads, memory, interrupts: a run ends in one line and holds on to nothing."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from support import faults
from support.executors import Inline
from support.models import (
    config,
    module_name,
    options,
    plan_of,
    repack,
    restore,
    tree,
    write_json,
)
from support.stores import Plain, WatchedStore

from ctconvert import api
from ctconvert.errors import ConversionError, UsageError, VerificationError
from ctconvert.memory import POOL
from ctconvert.output import Output
from ctconvert.planning.memory import budget, comparison_bytes, item_bytes
from ctconvert.store.base import CHUNK
from ctconvert.store.local import LocalStore
from ctconvert.transforms.compiled import LOOPS, WORTH
from ctconvert.work.budget import Budget, CancelledError
from ctconvert.work.executors import Threads
from ctconvert.work.jobs import Context
from ctconvert.work.transforming import CompareJob, ConvertJob, RestoreJob

if TYPE_CHECKING:
    from .conftest import Place

Whole = dict[str, str]
MIB = 1 << 20


# --- the disk ------------------------------------------------------------------------------------


def test_a_file_size_limit_midway(place: Place, whole: Whole) -> None:
    """One shard is larger than the limit, the ones before it are not."""

    sizes = [shard.size for shard in plan_of(LocalStore(place.model)).shards]
    limit = max(sizes) - 1
    assert sizes[0] < limit

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        repack(place.model, place.out)

    ended = faults.run(limited)
    assert re.fullmatch(
        r"ConversionError: .*out\.partial/checkpoint/.*: File too large; .*resume=True", ended.end
    )
    finished = len(place.finished())
    assert finished >= 1 and not place.out.exists()
    assert not (place.built / "ctconvert.json").exists()
    assert repack(place.model, place.out, resume=True).resumed_shards == finished
    assert tree(place.out) == whole and place.is_clean


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_midway(
    place: Place, whole: Whole, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There seemed to be space enough, and then somebody else took it."""
    out = small_disk / "out"
    usage = shutil.disk_usage(small_disk)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 40))
        with pytest.raises(ConversionError, match=r"No space left on device.*resume=True"):
            repack(place.model, out)
    assert not out.exists()
    with pytest.raises(ConversionError, match="are free"):
        repack(place.model, out, resume=True)
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert repack(place.model, out, resume=True).resumed_shards >= 1  # kept for this
    assert tree(out) == whole


def test_free_space_is_looked_at_before_anything_is_written(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(place.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=40_000))
    executor = Inline()
    with pytest.raises(ConversionError, match=r"out: the output needs .* GB and .* GB are free"):
        repack(place.model, place.out, executor=executor)
    assert executor.ran == [] and place.is_clean


def test_every_read_may_fail(place: Place, whole: Whole) -> None:
    """One line, nothing half-made under OUT, no file left open, and the next run goes on."""
    watched = WatchedStore(LocalStore(place.model))
    repack(watched, place.out)
    total = len(watched.reads)
    shutil.rmtree(place.out)
    opened = faults.descriptors()
    begun = 0
    for at in range(1, total + 1):
        store = WatchedStore(LocalStore(place.model), fail_at=at)
        with pytest.raises(ConversionError, match=r"cannot read: Input/output error"):
            repack(store, place.out, overwrite=True)
        store.close()
        begun += place.partial.exists()
        assert not place.out.exists() and faults.descriptors() == opened
    assert begun > 10
    assert repack(place.model, place.out, resume=True).resumed_shards == 3
    assert tree(place.out) == whole and place.is_clean


# --- what a run holds on to ----------------------------------------------------------------------


def test_no_file_stays_open(place: Place) -> None:
    """A program that calls it in a loop must neither run out of files nor meet its own lock."""

    def refused(action: Callable[[], object]) -> None:
        with pytest.raises((UsageError, ConversionError, VerificationError)):
            action()

    back = place.folder / "converted"
    for _ in range(2):  # what is opened once, is opened in the first turn
        opened = faults.descriptors()
        api.repack(place.model, place.out, target="triton", workers=2)
        refused(lambda: api.repack(place.model, place.out, target="triton"))
        refused(lambda: api.repack(place.model, place.out, target="cuda", resume=True))
        api.repack(place.model, place.out, target="triton", resume=True)
        api.verify(place.out, against=place.model)
        api.restore(place.out, back, workers=2)
        api.restore(place.out, back, resume=True)
        refused(lambda: api.restore(back, place.folder / "again"))
        api.inspect(place.model, target="triton")
        api.plan(place.model, target="triton")
        (place.out / "model.bin").write_text("")
        refused(lambda: api.verify(place.out))
        refused(lambda: api.repack(place.model, place.out, target="triton", overwrite=True))
        (place.out / "model.bin").unlink()
        with (place.out / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x55")
        refused(lambda: api.verify(place.out))
        refused(lambda: api.restore(place.out, back, overwrite=True))
        shutil.rmtree(place.out)
        shutil.rmtree(back)
    assert faults.descriptors() == opened


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["python", "device", "driver", "triton", "cpu"],
)
def test_out_of_memory_is_one_line(place: Place, error: Exception) -> None:
    class Full(WatchedStore):
        def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
            if len(buffer) == 64 * 16 * 4:  # the codes of a module
                raise error
            super().read_into(name, offset, buffer)

    with pytest.raises(ConversionError, match=r"^model\.layers\.\d.*out of memory.*workers$"):
        repack(Full(LocalStore(place.model)), place.out)
    assert not place.out.exists()


def test_a_bug_is_not_taken_for_a_lack_of_memory(place: Place) -> None:
    class Broken(WatchedStore):
        def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
            if len(buffer) == 64 * 16 * 4:
                raise RuntimeError("shape mismatch")
            super().read_into(name, offset, buffer)

    with pytest.raises(RuntimeError, match="shape mismatch"):
        repack(Broken(LocalStore(place.model)), place.out, executor=Threads(2))
    assert not place.out.exists()


# --- interrupts ----------------------------------------------------------------------------------


class Slow(WatchedStore):
    """Every read takes a while, and says that it has begun."""

    def __init__(self, inner: LocalStore, begun: threading.Event) -> None:
        super().__init__(inner)
        self.begun = begun

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.begun.set()
            time.sleep(0.2)
        super().read_into(name, offset, buffer)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt here, also in a background job, whose shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_run_soon(place: Place, whole: Whole) -> None:
    """Its threads end with it, and what is finished stays."""
    begun = threading.Event()
    store = Slow(LocalStore(place.model), begun)

    def interrupt() -> None:
        begun.wait(30)
        time.sleep(0.1)
        interrupted.append(time.monotonic())
        signal.raise_signal(signal.SIGINT)

    interrupted: list[float] = []
    other = threading.Thread(target=interrupt)
    other.start()
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        repack(store, place.out, executor=Threads(2))
    other.join()
    assert time.monotonic() - interrupted[0] < 2
    assert threading.active_count() < threads and not place.out.exists()
    finished = len(place.finished())
    assert repack(place.model, place.out, resume=True).resumed_shards == finished
    assert tree(place.out) == whole and place.is_clean


@pytest.mark.parametrize("phase", ["converting", "verifying"])
def test_ctrl_c_in_any_phase_keeps_what_is_finished(place: Place, whole: Whole, phase: str) -> None:
    class Impatient(Plain):
        def advance(self, count: int) -> None:
            super().advance(count)
            if self.phases[-1][0] == phase and self.done > self.phases[0][1] * 0.9:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repack(place.model, place.out, progress=Impatient())
    finished = len(place.finished())
    assert finished == (3 if phase == "verifying" else 2) and not place.out.exists()
    assert repack(place.model, place.out, resume=True).resumed_shards == finished
    assert tree(place.out) == whole and place.is_clean


def test_a_run_that_is_not_verified_makes_the_same_bytes(place: Place, whole: Whole) -> None:
    progress = Plain()
    repack(place.model, place.out, verify=False, progress=progress)
    assert [label for label, _ in progress.phases] == ["converting"]
    assert tree(place.out) == whole


def test_waiting_for_memory_ends_when_the_run_does() -> None:
    held = Budget(10)
    ended: list[str] = []

    def wait() -> None:
        try:
            with held.hold(6):
                ended.append("held")
        except CancelledError:
            ended.append("cancelled")

    with held.hold(6):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive() and ended == []
        held.cancel()
        thread.join(5)
    assert ended == ["cancelled"]


def test_what_is_larger_than_the_budget_is_let_through_alone() -> None:
    budget = Budget(10)
    order: list[str] = []
    with budget.hold(25):
        thread = threading.Thread(target=lambda: _note(budget, 1, order))
        thread.start()
        thread.join(0.05)
        order.append("large")
    thread.join(5)
    assert order == ["large", "small"]


def _note(budget: Budget, count: int, order: list[str]) -> None:
    with budget.hold(count):
        order.append("small")


# --- memory --------------------------------------------------------------------------------------


def write_sparse_model(folder: Path, modules: int, n: int, k: int, plain: int = 4096) -> Path:
    """A checkpoint that takes next to no disk: codes and scales are zeros, in holes of the file."""
    header: dict[str, object] = {}
    position = 0
    shapes = []

    def add(name: str, dtype: str, shape: list[int], nbytes: int) -> int:
        nonlocal position
        start, position = position, position + nbytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, position]}
        return start

    for index in range(modules):
        name = module_name(index)
        shapes.append(add(f"{name}.weight_shape", "I64", [2], 16))
        add(f"{name}.weight_packed", "I32", [n, k // 8], n * k // 2)
        add(f"{name}.weight_scale", "BF16", [n, k // 32], n * k // 16)
    add("model.norm.weight", "F32", [plain // 4], plain)
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for offset in shapes:
            file.seek(start + offset)
            file.write(struct.pack("<qq", n, k))
        file.truncate(start + position)
    write_json(folder / "config.json", config())
    return folder


def _memory(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+) kB", text)[0]) * 1024


#: glibc's M_MMAP_THRESHOLD: larger blocks go back to the system when they are freed.
_MMAP_THRESHOLD = -3


def peak_of(action: Callable[[], object], warm: Callable[[], object]) -> int:
    """How much a child process grows at most while it does something, as the kernel counts.

    ``warm`` is something like it, that brings in the code which a fork does not have.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, MIB)  # else it grows with what came before
            LOOPS.after(WORTH)  # loading Numba takes memory of its own, once
            warm()
            POOL.clear()
            ctypes.CDLL(None).malloc_trim(0)  # what is free, but was not given back, hides growth
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
            before = _memory("VmRSS")
            action()
            os.write(writer, str(_memory("VmHWM") - before).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    assert os.waitpid(child, 0)[1] == 0
    return int(text)


needs_peak = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the system does not count peaks anew"
)
#: Memory that a run takes whatever it converts: threads, pieces of files, pages copied by a fork.
BASE = 24 * MIB


@needs_peak
def test_a_run_holds_the_modules_in_flight_and_no_more(place: Place) -> None:
    """However many modules there are, and however large what is copied."""
    model = write_sparse_model(place.folder / "big", 24, 1024, 4096, plain=48 * MIB)
    (item, *_) = plan_of(LocalStore(model)).modules
    total = sum(module.input_bytes for module in plan_of(LocalStore(model)).modules)
    allowed = BASE + 2 * item_bytes(item)
    assert total > 1.2 * allowed
    out, back = place.folder / "warm", place.folder / "warm back"
    peak = peak_of(
        lambda: repack(model, place.out, executor=Threads(2)),
        lambda: repack(place.model, out, executor=Threads(2)),
    )
    assert item.input_bytes < peak < allowed
    peak = peak_of(
        lambda: restore(place.out, place.folder / "back", executor=Threads(2)),
        lambda: restore(out, back, executor=Threads(2)),
    )
    assert item.input_bytes < peak < BASE + 2 * item_bytes(item) * 2
    peak = peak_of(
        lambda: api.verify(place.out, against=model, workers=2),
        lambda: api.verify(out, against=place.model, workers=2),
    )
    assert peak < BASE + 2 * comparison_bytes(item)


@needs_peak
def test_a_module_takes_no_more_than_is_reserved_for_it(place: Place) -> None:
    """What the budget of a run counts with is what a module really takes."""
    model = write_sparse_model(place.folder / "big", 1, 4096, 4096)
    source = LocalStore(model)
    repack(model, place.out)
    made = Output.open(place.out)
    (convert,) = made.plan.modules
    restored = place.folder / "converted"
    restore(place.out, restored)
    (back,) = (item for item in Output.open(restored).plan.items if hasattr(item, "modules"))
    sink = _Nowhere()
    for job, context, reserved in (
        (ConvertJob(convert), Context(source, sink), item_bytes(convert)),
        (RestoreJob(back), Context(made.store, sink), item_bytes(back)),
        (CompareJob(convert), Context(made.store, against=source), comparison_bytes(convert)),
    ):
        peak = peak_of(
            lambda job=job, context=context: job.run(context),
            lambda job=job, context=context: job.run(context),
        )
        assert convert.input_bytes < peak < reserved + 8 * MIB, job


def write_sparse_experts(folder: Path, count: int, size: int, hidden: int) -> Path:
    """Experts one by one, as :func:`write_sparse_model` has modules."""
    header: dict[str, object] = {}
    position = 0
    shapes: list[tuple[int, int, int]] = []
    for number in range(count):
        for leaf, n, k in (
            ("gate_proj", size, hidden),
            ("up_proj", size, hidden),
            ("down_proj", hidden, size),
        ):
            name = f"model.layers.0.mlp.experts.{number}.{leaf}"
            shapes.append((position, n, k))
            for local, dtype, shape, nbytes in (
                ("weight_shape", "I64", [2], 16),
                ("weight_packed", "I32", [n, k // 8], n * k // 2),
                ("weight_scale", "BF16", [n, k // 32], n * k // 16),
            ):
                end = position + nbytes
                header[f"{name}.{local}"] = {
                    "dtype": dtype,
                    "shape": shape,
                    "data_offsets": [position, end],
                }
                position = end
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for offset, n, k in shapes:
            file.seek(start + offset)
            file.write(struct.pack("<qq", n, k))
        file.truncate(start + position)
    write_json(folder / "config.json", config())
    return folder


@needs_peak
@pytest.mark.parametrize("size", [512, 544])
def test_a_stack_holds_the_experts_in_flight_and_no_more(place: Place, size: int) -> None:
    """However many experts there are; 544 are padded to 576 in each of gate and up."""
    few, many = (
        write_sparse_experts(place.folder / name, count, size, 3584)
        for name, count in (("few", 3), ("many", 40))
    )
    asked = options(target="cuda", fuse=True, max_shard_size=1 << 40)
    plan = plan_of(LocalStore(many), asked)
    up, down = sorted(plan.modules, key=lambda item: -item.input_bytes)
    assert up.experts == down.experts == 40 and up.name.endswith("w13")
    out, back = place.folder / "warm", place.folder / "warm back"
    allowed = BASE + 2 * item_bytes(up)
    assert up.input_bytes * 40 > 1.2 * allowed
    peak = peak_of(
        lambda: repack(many, place.out, asked=asked, executor=Threads(2)),
        lambda: repack(few, out, asked=asked, executor=Threads(2)),
    )
    assert up.input_bytes < peak < allowed
    peak = peak_of(
        lambda: restore(place.out, place.folder / "back", executor=Threads(2)),
        lambda: restore(out, back, executor=Threads(2)),
    )
    assert up.input_bytes < peak < BASE + 2 * 2 * item_bytes(up)
    peak = peak_of(
        lambda: api.verify(place.out, against=many, workers=2),
        lambda: api.verify(out, against=few, workers=2),
    )
    assert peak < BASE + 2 * comparison_bytes(up)


@needs_peak
def test_a_layer_of_384_experts(place: Place) -> None:
    """As Kimi-K2 has them, an eighth of each side: 149 MB, of which few experts are held."""
    model = write_sparse_experts(place.folder / "layer", 384, 256, 896)
    few = write_sparse_experts(place.folder / "few", 3, 256, 896)
    asked = options(target="cuda", fuse=True, max_shard_size=1 << 40)
    plan = plan_of(LocalStore(model), asked)
    assert sorted(item.experts or 0 for item in plan.modules) == [384, 384]
    peak = peak_of(
        lambda: repack(model, place.out, asked=asked, executor=Threads(2)),
        lambda: repack(few, place.folder / "warm", asked=asked, executor=Threads(2)),
    )
    assert peak < 2 * BASE  # the plan and the manifest of 1152 modules too


@needs_peak
@pytest.mark.parametrize("size", [8192, 8224])
def test_an_expert_takes_no_more_than_is_reserved_for_it(place: Place, size: int) -> None:
    """Gate and up joined, and each padded before: 8224 to 8256."""
    model = write_sparse_experts(place.folder / "big", 2, size, 4096)
    plan = plan_of(LocalStore(model), options(target="cuda", fuse=True))
    source, sink = LocalStore(model), _Nowhere()
    for item in plan.modules:
        job = ConvertJob(item, 0, 1)
        peak = peak_of(
            lambda job=job: job.run(Context(source, sink)),
            lambda job=job: job.run(Context(source, sink)),
        )
        assert item.input_bytes < peak < item_bytes(item) + BASE, item.name


class _Nowhere:
    def write(self, name: str, offset: int, data: memoryview) -> None:
        pass


@pytest.mark.parametrize(("room", "wanted"), [(1.9, 1), (4.1, 4)])
def test_jobs_reserve_what_they_take(place: Place, room: float, wanted: int) -> None:
    """As many modules are worked on at once as there is room for, whatever the threads."""
    plan = plan_of(LocalStore(place.model))
    assert budget(plan, 1) > max(item_bytes(item) for item in plan.items)
    (size,) = {item_bytes(module) for module in plan.modules}
    lock, enough = threading.Lock(), threading.Event()
    reading: list[int] = [0]

    class Store(WatchedStore):
        """Jobs read while they hold their bytes; they wait here for one another."""

        def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
            with lock:
                reading.append(reading[-1] + 1)
                if reading[-1] == wanted:
                    enough.set()
            assert enough.wait(30)
            time.sleep(0.001)
            super().read_into(name, offset, buffer)
            with lock:
                reading.append(reading[-1] - 1)

    store = Store(LocalStore(place.model))
    context = Context(store, _Nowhere(), memory=int(room * size))
    jobs = [ConvertJob(item) for item in plan.modules]
    assert len(list(Threads(6).run(jobs, context))) == len(jobs)
    assert max(reading) == wanted


def test_a_large_side_file_is_copied_in_pieces(place: Place) -> None:
    with (place.model / "video.mp4").open("wb") as file:
        file.truncate(3 * CHUNK + 5)
    store = WatchedStore(LocalStore(place.model))
    repack(store, place.out)
    assert (place.out / "video.mp4").stat().st_size == 3 * CHUNK + 5
    assert max(length for _, _, length in store.reads) == CHUNK
