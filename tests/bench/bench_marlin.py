"""The Marlin transforms against a copy of the same bytes, on one device.

``python tests/bench/bench_marlin.py [cpu|cuda|xpu]`` prints a table. Each transform is first
checked: weights against the layout's definition on sample runs and by their inverse, the rest
against a plain reference, whole or on sample rows, and by their inverse. Bytes are those of input
and output. Times are medians of ``triton.testing.do_bench``, which clears the L2 cache before each
run; on the CPU, of five calls after one more, each with an output newly allocated, as the copy's
is. ``copy_tb_s`` is a ``clone`` of a tensor of half as many bytes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ctconvert.transforms import marlin

SHAPES = ((4096, 4096), (28672, 8192))  # N, K
SIDE_SHAPES = ((4096, 4096), (8192, 28672))
GROUP = 32
_INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}


def measure(device: torch.device) -> list[dict[str, Any]]:
    """One row for each transform and shape: times, bandwidth, and the copy beside it."""
    rows = []
    for n, k in SHAPES:
        for bits in (4, 8):
            rows += _weights(n, k, bits, device)
    for n, k in SIDE_SHAPES:
        rows += _side_tensors(n, k, device)
    return rows


def _weights(n: int, k: int, bits: int, device: torch.device) -> list[dict[str, Any]]:
    words = _random_words((n, k * bits // 32), device)
    tiles = marlin.marlin_pack(words, bits)
    for run in (0, n // 128, n // 64 - 1):
        columns = slice(run * 32 * bits, (run + 1) * 32 * bits)
        expected = _definition(words[run * 64 : run * 64 + 64].cpu(), bits)
        _check(torch.equal(tiles[:, columns].cpu(), expected), f"marlin_pack of {bits} bits")
    _check(
        torch.equal(marlin.marlin_unpack(tiles, bits, n, k), words), f"marlin_unpack, {bits} bits"
    )
    g_idx = (torch.arange(k, dtype=torch.int32) // 128)[torch.randperm(k)].to(device)
    ordered, perm = marlin.sort_columns(words, g_idx, bits)
    for row in (0, n // 2, n - 1):
        taken = _codes(words[row], bits)[perm.long()]
        _check(torch.equal(_codes(ordered[row], bits), taken), "sort_columns")
    _check(torch.equal(marlin.unsort_columns(ordered, perm, bits), words), "unsort_columns")
    del ordered
    wide = n + 64, k + 128
    padded = marlin.pad_words(words, bits, n, k, *wide, 8)
    _check(torch.equal(padded[:n, : words.shape[1]], words), "pad_words")
    filled = torch.cat([padded[:n, words.shape[1] :].flatten(), padded[n:].flatten()])
    _check(bool((_codes(filled, bits) == 8).all()), "pad_words")
    del filled
    both, dtype = 2 * words.nbytes, f"int{bits}"
    calls: list[tuple[str, int, Callable[[], Any]]] = [
        ("marlin_pack", both, lambda: marlin.marlin_pack(words, bits)),
        ("marlin_unpack", both, lambda: marlin.marlin_unpack(tiles, bits, n, k)),
        ("sort_columns", both, lambda: marlin.sort_columns(words, g_idx, bits)),
        ("unsort_columns", both, lambda: marlin.unsort_columns(words, perm, bits)),
        ("  without sorting g_idx", both, lambda: marlin._take_columns(words, perm, bits)),
        (
            "pad_words",
            words.nbytes + padded.nbytes,
            lambda: marlin.pad_words(words, bits, n, k, *wide, 8),
        ),
    ]
    return [_row(name, (n, k), dtype, nbytes, call, device) for name, nbytes, call in calls]


def _side_tensors(n: int, k: int, device: torch.device) -> list[dict[str, Any]]:
    grouped = torch.randn(k // GROUP, n, device=device).to(torch.bfloat16)
    single = grouped[:1].clone()
    raw = torch.randint(0, 256, (k // GROUP, n), device=device).to(torch.uint8)
    codes = torch.randint(0, 16, (k // GROUP, n), device=device).to(torch.uint8)
    packed = marlin.marlin_pack_zero_points(codes, 4)
    order = [i + 8 * j for i in range(8) for j in range(8)]
    channel = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    for scales, channelwise in ((grouped, False), (single, True)):
        permuted = marlin.marlin_permute_scales(scales, channelwise)
        expected = _taken(scales, channel if channelwise else order)
        _check(torch.equal(permuted, expected), "marlin_permute_scales")
        back = marlin.marlin_unpermute_scales(permuted, channelwise)
        _check(torch.equal(back, scales), "marlin_unpermute_scales")
    permuted = marlin.marlin_permute_mxfp4_scales(raw)
    expected = _taken(_taken(raw, order), [0, 2, 1, 3])
    _check(torch.equal(permuted, expected), "marlin_permute_mxfp4_scales")
    back = marlin.marlin_unpermute_mxfp4_scales(permuted)
    _check(torch.equal(back, raw), "marlin_unpermute_mxfp4_scales")
    expected = _taken(_taken(codes, order), list(_INTERLEAVE[4]))
    _check(torch.equal(_codes(packed, 4), expected), "marlin_pack_zero_points")
    back = marlin.marlin_unpack_zero_points(packed, 4)
    _check(torch.equal(back, codes), "marlin_unpack_zero_points")
    group = f"G = {GROUP}"
    calls: list[tuple[str, str, int, Callable[[], Any]]] = [
        (
            f"permute_scales, {group}",
            "bfloat16",
            2 * grouped.nbytes,
            lambda: marlin.marlin_permute_scales(grouped, channelwise=False),
        ),
        (
            "permute_scales, channel",
            "bfloat16",
            2 * single.nbytes,
            lambda: marlin.marlin_permute_scales(single, channelwise=True),
        ),
        (
            "permute_mxfp4_scales",
            "uint8",
            2 * raw.nbytes,
            lambda: marlin.marlin_permute_mxfp4_scales(raw),
        ),
        (
            "unpermute_mxfp4_scales",
            "uint8",
            2 * raw.nbytes,
            lambda: marlin.marlin_unpermute_mxfp4_scales(permuted),
        ),
        (
            f"pack_zero_points, {group}",
            "int4",
            codes.nbytes + packed.nbytes,
            lambda: marlin.marlin_pack_zero_points(codes, 4),
        ),
        (
            f"unpack_zero_points, {group}",
            "int4",
            codes.nbytes + packed.nbytes,
            lambda: marlin.marlin_unpack_zero_points(packed, 4),
        ),
    ]
    return [_row(name, (n, k), dtype, nbytes, call, device) for name, dtype, nbytes, call in calls]


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes [..., W*f] of words [..., W]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2).to(torch.uint8)


def _taken(rows: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Every run of len(order) of each row: position p takes what was at order[p]."""
    return rows.unflatten(1, (-1, len(order)))[:, :, order].flatten(1)


def _random_words(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32, device=device)


def permutation(bits: int) -> list[int]:
    """Which code of a 16 x 64 tile stands where, as the layout's definition has it."""
    positions = [
        16 * r + i // 4 + 8 * blk + 256 * j
        for i in range(32)
        for j in range(4)
        for blk in (0, 1)
        for r in (2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4) + 8, 2 * (i % 4) + 9)
    ]
    order = _INTERLEAVE[bits]
    return [positions[at + p] for at in range(0, 1024, len(order)) for p in order]


def _definition(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Tiles of one run of 64 rows, code by code from the layout's permutation of 1024."""
    f = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words[:, :, None] >> shifts & (1 << bits) - 1).flatten(1)
    flat = codes.view(4, 16, -1, 16).permute(2, 0, 3, 1).reshape(-1, 1024)[:, permutation(bits)]
    return (flat.view(-1, 1024 // f, f) << shifts).sum(2).to(torch.int32)


def _check(ok: bool, what: str) -> None:
    if not ok:
        raise SystemExit(f"{what}: wrong result, nothing is timed")


def _row(
    name: str,
    shape: tuple[int, int],
    dtype: str,
    nbytes: int,
    call: Callable[[], Any],
    device: torch.device,
) -> dict[str, Any]:
    source = torch.zeros(max(nbytes // 2, 1), dtype=torch.uint8, device=device)
    microseconds, copy = _time(call, device), _time(source.clone, device)
    return {
        "name": name,
        "shape": f"{shape[0]} x {shape[1]}",
        "dtype": dtype,
        "bytes": nbytes,
        "us": microseconds,
        "tb_s": nbytes / microseconds / 1e6,
        "copy_tb_s": nbytes / copy / 1e6,
        "share": copy / microseconds,
    }


def _time(call: Callable[[], Any], device: torch.device) -> float:
    """Microseconds."""
    if device.type != "cpu":
        from triton.testing import do_bench

        milliseconds: float = do_bench(call, return_mode="median")
        return milliseconds * 1e3
    call()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e6


def main() -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else default)
    print("| transform | N x K | type | MB | us | TB/s | copy TB/s | share |")
    print("|---|---|---|---|---|---|---|---|")
    for row in measure(device):
        print(
            f"| {row['name']} | {row['shape']} | {row['dtype']} | {row['bytes'] / 1e6:.2f} "
            f"| {row['us']:.1f} | {row['tb_s']:.4f} | {row['copy_tb_s']:.4f} "
            f"| {row['share']:.0%} |"
        )


if __name__ == "__main__":
    main()
