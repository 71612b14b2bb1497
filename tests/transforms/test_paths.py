"""What all transforms share: two paths with one result, any autograd mode, threads of their own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import GPU

from ctconvert.transforms import (
    cpu,
    dispatch,
    marlin,
    nvfp4,
    packed,
    shapes,
    sparse24,
    threads,
    w4a8_fp8,
)
from ctconvert.transforms.cpu.sums import byte_sums

PACKAGES = (packed, marlin, sparse24)
N, K = 64, 128


def examples() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Every transform and arguments for it."""
    generator = torch.Generator().manual_seed(0)

    def random(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)

    codes, zeros, scales = random(16, N, K), random(16, 4, N), random(255, 4, N)
    words, g_idx = packed.pack(codes, 4), random(4, K).int()
    ordered, perm = marlin.sort_columns(words, g_idx, 4)
    dense = random(100, N, K).view(torch.int8)
    dense[:, 0::4] = dense[:, 2::4] = 0
    bitmask = sparse24.bitmask_of(dense)
    values, meta = sparse24.sm90_compress(dense)
    _, pairs = sparse24.pairs_of_sm90(values, meta, N, K)
    arguments: dict[str, list[Any]] = {
        "pack": [codes, 4],
        "unpack": [words, 4, K],
        "pack_int8": [codes.view(torch.int8) - 8, 4],
        "unpack_int8": [words, 4, K],
        "transpose_packed": [words, 4],
        "marlin_pack": [words, 4],
        "marlin_unpack": [marlin.marlin_pack(words, 4), 4, N, K],
        "marlin_permute_scales": [scales.float(), False],
        "marlin_unpermute_scales": [scales.float(), True],
        "marlin_permute_mxfp4_scales": [scales],
        "marlin_unpermute_mxfp4_scales": [scales],
        "marlin_pack_zero_points": [zeros, 4],
        "marlin_unpack_zero_points": [marlin.marlin_pack_zero_points(zeros, 4), 4],
        "sort_columns": [words, g_idx, 4],
        "unsort_columns": [ordered, perm, 4],
        "pad_words": [words, 4, N, K - 3, N + 64, K + 64, 5],
        "bitmask_of": [dense],
        "bitmask_compress": [dense, bitmask],
        "bitmask_decompress": [sparse24.bitmask_compress(dense, bitmask), bitmask, K],
        "bitmask_of_pairs": [values, pairs, K],
        "dense_of_pairs": [values, pairs, K],
        "pairs_of_bitmask": [sparse24.bitmask_compress(dense, bitmask), bitmask, K],
        "pairs_of_sm90": [values, meta, N, K],
        "sm90_compress": [dense],
        "sm90_meta": [values, pairs, K],
        "sm90_decompress": [values, meta, N, K],
    }
    return {
        name: (getattr(package, name), arguments[name])
        for package in PACKAGES
        for name in package.__all__
        if not hasattr(shapes, name)
    }


EXAMPLES = examples()
PLAIN = {  # the widths that have a torch path of their own
    "pack, 3 bits": (packed.pack, [EXAMPLES["pack"][1][0] >> 1, 3]),
    "unpack, 3 bits": (packed.unpack, [EXAMPLES["unpack"][1][0][:, :12], 3, K]),
}


def same(made: Any, expected: Any) -> bool:
    if isinstance(made, torch.Tensor):
        return made.dtype == expected.dtype and torch.equal(made, expected)
    return all(same(one, other) for one, other in zip(made, expected, strict=True))


@pytest.mark.skipif(GPU, reason="the kernels are compiled here")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_kernels_give_the_torch_paths_result(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    transform, arguments = EXAMPLES[name]
    expected = transform(*arguments)
    monkeypatch.setattr(dispatch, "has_kernels", lambda tensor: True)
    for package in PACKAGES:
        monkeypatch.setattr(package, "cpu", None)  # so that the kernels make all of it
    with torch.inference_mode():
        inference = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        assert same(transform(*arguments), expected)
    assert same(transform(*inference), expected)


@contextlib.contextmanager
def in_many_blocks(monkeypatch: pytest.MonkeyPatch, workers: int):
    with monkeypatch.context() as patch:
        patch.setattr(threads, "THREADED_BYTES", 1)
        patch.setattr(torch, "get_num_threads", lambda: workers)
        for package in PACKAGES:
            patch.setattr(package.cpu, "GRAIN", 64)
        patch.setattr(marlin.cpu, "_SORT_CODES", 512)
        yield


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, contextlib.nullcontext])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", [*EXAMPLES, *PLAIN])
def test_any_autograd_mode(
    monkeypatch: pytest.MonkeyPatch, name: str, workers: int, mode: Callable[[], Any]
) -> None:
    """Of the caller and of the inputs, on one thread and on several."""
    transform, arguments = (EXAMPLES | PLAIN)[name]
    expected = transform(*arguments)
    with torch.inference_mode():
        inference = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    with in_many_blocks(monkeypatch, workers), mode():
        made = transform(*arguments)
        assert same(made, expected)
        assert same(transform(*inference), expected)
    first = made if isinstance(made, torch.Tensor) else made[0]
    if mode is not torch.inference_mode:
        first.view(torch.uint8).add_(1)  # a normal tensor, which the caller may write to


def reordered() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """The transforms of engines' own layouts, of several blocks each, and arguments for them."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.randint(0, 127, (320, 1030), generator=generator, dtype=torch.uint8)
    packed_scales, lost = nvfp4.nvfp4_pack_scales(scales, 0)
    words = torch.randint(-(1 << 31), 1 << 31, (512, 256), generator=generator).int()
    zeros = torch.randint(0, 16, (512, 16), generator=generator, dtype=torch.uint8)
    n, k = 512, 2048
    return {
        "nvfp4_pack_scales": (nvfp4.nvfp4_pack_scales, [scales, 0]),
        "nvfp4_unpack_scales": (nvfp4.nvfp4_unpack_scales, [packed_scales, lost, 0]),
        "tile_scales": (nvfp4.tile_scales, [scales]),
        "untile_scales": (nvfp4.untile_scales, [nvfp4.tile_scales(scales)]),
        "w4a8_fp8_pack": (w4a8_fp8.w4a8_fp8_pack, [words]),
        "w4a8_fp8_unpack": (w4a8_fp8.w4a8_fp8_unpack, [w4a8_fp8.w4a8_fp8_pack(words), n, k]),
        "cpu_w4a8_pack": (cpu.cpu_w4a8_pack, [words, zeros]),
        "cpu_w4a8_unpack": (cpu.cpu_w4a8_unpack, [cpu.cpu_w4a8_pack(words, zeros), zeros, n, k]),
        "cpu_int8_pack": (cpu.cpu_int8_pack, [words.view(torch.int8)]),
        "byte_sums": (byte_sums, [words.view(torch.int8)]),
    }


REORDERED = reordered()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, contextlib.nullcontext])
@pytest.mark.parametrize("name", REORDERED)
def test_shared_among_threads(
    monkeypatch: pytest.MonkeyPatch, name: str, mode: Callable[[], Any]
) -> None:
    transform, arguments = REORDERED[name]
    expected = transform(*arguments)
    with torch.inference_mode():
        inference = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    shares: list[int] = []
    run = threads._run

    def counted(work: Any, share: Any) -> None:
        shares.append(len(share))
        run(work, share)

    with monkeypatch.context() as patch, mode():
        patch.setattr(threads, "THREADED_BYTES", 1)
        patch.setattr(threads, "_run", counted)
        patch.setattr(torch, "get_num_threads", lambda: 3)
        assert same(transform(*arguments), expected)
        assert same(transform(*inference), expected)
    assert len(shares) >= 4 and all(shares)


def test_large_weights_in_inference_mode() -> None:
    words = torch.randint(-(1 << 31), 1 << 31, (2048, 1024), dtype=torch.int32)
    assert words.nbytes == threads.THREADED_BYTES
    g_idx = torch.arange(8192, dtype=torch.int32) % 64
    with torch.inference_mode():
        tiles = marlin.marlin_pack(words, 4)
        assert torch.equal(marlin.marlin_unpack(tiles, 4, 2048, 8192), words)
        ordered, perm = marlin.sort_columns(words, g_idx, 4)
        assert torch.equal(marlin.unsort_columns(ordered, perm, 4), words)
        back = packed.transpose_packed(packed.transpose_packed(words, 4), 4)
        assert torch.equal(back, words)


# --------------------------------------------------------------------------------- threads


def test_only_the_main_thread_spreads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    shares: list[tuple[str, list[int]]] = []

    def work(items: Any) -> None:
        shares.append((threading.current_thread().name, list(items)))

    def spread(nbytes: int) -> list[list[int]]:
        shares.clear()
        threads.spread(work, range(10), nbytes)
        return sorted(items for _, items in shares)

    assert spread(threads.THREADED_BYTES) == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    assert len({name for name, _ in shares} - {threading.main_thread().name}) > 0
    assert spread(threads.THREADED_BYTES - 1) == [list(range(10))]
    caller = threading.Thread(target=spread, args=(threads.THREADED_BYTES,))
    caller.start()
    caller.join()
    assert shares == [(caller.name, list(range(10)))]


def test_the_first_share_that_fails_is_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)

    def work(items: Any) -> None:
        if items[0] > 0:
            raise ValueError(f"share from {items[0]}")

    with pytest.raises(ValueError, match="share from 2"):
        threads.spread(work, range(8), threads.THREADED_BYTES)


# ---------------------------------------------------------------------------------- shapes


def test_shapes_need_no_torch() -> None:
    code = "import ctconvert.transforms.shapes, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "triton", "numpy"} & set(run.stdout.split())
