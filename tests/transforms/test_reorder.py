"""The engine behind the reordered layouts: threads, memory it is given, what an op may cost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.naive import random_words

from ctconvert.transforms import cpu, machete, w4a8_fp8
from ctconvert.transforms.reorder import Order, blocks

pytest_plugins = ("support.transform_paths",)
pytestmark = pytest.mark.usefixtures("poisoned")

ORDERS: dict[str, Callable[[int, int], Order]] = {
    "machete 4": lambda n, k: machete._order(n, k, 4),
    "machete 8": lambda n, k: machete._order(n, k, 8),
    "w4a8-fp8": w4a8_fp8._order,
    "cpu-w4a16": cpu.w4a16._order,
    "cpu-w4a8 32": lambda n, k: cpu.w4a8._order(n, k, 32),
    "cpu-w4a8 128": lambda n, k: cpu.w4a8._order(n, k, 128),
    "cpu-int8": cpu.int8._order,
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(("n", "k"), [(128, 128), (640, 4352), (128, 16384), (4096, 128)])
def test_no_op_wakes_other_threads(
    name: str, n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch spreads an op of more than 32768 elements over threads; the blocks stay under it."""
    sizes = set()

    class Recorded(blocks._Planes):
        def __init__(self, order: Order, size: tuple[int, ...]) -> None:
            super().__init__(order, size)
            sizes.update(step[-1].numel() for step in self.steps)

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        sizes.add(target.numel())
        target.copy_(source)

    monkeypatch.setattr(blocks, "_Planes", Recorded)
    monkeypatch.setattr(blocks, "_copy_part", copy)
    order = ORDERS[name](n, k)
    words = random_words(n, k, order.bits)
    flat = torch.zeros(order.words + order.words // (order.run or 1) * order.gap, dtype=torch.int32)
    blocks.reorder(words, flat, order)
    back = torch.empty_like(words)
    blocks.restore(flat, back, order)
    assert torch.equal(back, words)
    assert 0 < max(sizes) <= 32768


def test_several_threads_at_once() -> None:
    words = [random_words(128 * (2 + i), 64 * (30 + i), 4, seed=i) for i in range(6)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda w: machete.machete_pack(w, 4), words))
    for source, packed in zip(words, made, strict=True):
        assert torch.equal(packed, machete.machete_pack(source, 4))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_any_view_of_memory(offset: int, either_path: str) -> None:
    n, k = 128, 192
    words = random_words(n, k, 4)
    packed = machete.machete_pack(words, 4)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        memory = torch.zeros(tensor.numel() + offset, dtype=torch.int32)
        return memory[offset:].view(tensor.shape).copy_(tensor)

    for same in (moved(words), words.t().contiguous().t()):
        assert torch.equal(machete.machete_pack(same, 4), packed)
    for same in (moved(packed), packed.t().contiguous().t()):
        assert torch.equal(machete.machete_unpack(same, 4, n, k), words)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(("n", "k"), [(1024, 256), (640, 384)])
def test_programs_take_every_word_once(name: str, n: int, k: int) -> None:
    """Where a step of the outermost dimension is whole programs, they run across the steps."""
    from ctconvert.transforms.reorder import kernel

    if not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter")
    order = ORDERS[name](n, k)
    words = random_words(n, k, order.bits)
    size = order.words + order.words // (order.run or 1) * order.gap
    made, want = (torch.zeros(size, dtype=torch.int32) for _ in range(2))
    blocks.reorder(words, want, order)
    kernel.reorder(words, made, order)
    assert torch.equal(made, want)
    back = torch.full_like(words, -1)
    kernel.restore(made, back, order)
    assert torch.equal(back, words)


@pytest.mark.gpu
def test_gpu_offsets_of_64_bits() -> None:
    """More than 2**31 words: the last offsets do not fit 32 bits."""
    n, k = (1 << 18) + 128, 1 << 16
    if torch.cuda.mem_get_info()[0] < 36 << 30:
        pytest.skip("needs 36 GiB of free GPU memory")
    torch.use_deterministic_algorithms(False)  # filling every output would take the memory again
    words = torch.empty((n, k // 8), dtype=torch.int32, device="cuda").random_()
    packed = cpu.cpu_w4a16_pack(words)
    for rows in (slice(0, 32), slice(n - 32, n)):
        part = packed[rows.start // 16 : rows.stop // 16]
        assert torch.equal(part.cpu(), cpu.cpu_w4a16_pack(words[rows].cpu()))
    assert torch.equal(cpu.cpu_w4a16_unpack(packed, n, k), words)
