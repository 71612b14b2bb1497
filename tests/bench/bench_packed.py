"""INT packing transforms against a copy of the same bytes.

``python tests/bench/bench_packed.py [cpu|cuda]`` prints a table: bytes read plus bytes written
over the median time, beside ``torch.clone`` of a tensor that moves as many bytes. A result is
first compared, whole, with a plain torch reference; a wrong one ends the run. On an accelerator
``triton.testing.do_bench`` clears the L2 cache before each run; on the CPU it is the median of
five runs.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ctconvert.transforms.packed import (
    pack,
    pack_int8,
    row_words,
    transpose_packed,
    unpack,
    unpack_int8,
)

SHAPES = ((4096, 4096), (28672, 8192))  # N, K
WIDTHS = (2, 4, 8)
OTHER_WIDTHS = (3, 5, 6, 7)


def _time(call: Callable[[], Any], device: torch.device) -> float:
    """Microseconds, median."""
    if device.type == "cpu":
        call()
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            runs.append(time.perf_counter() - start)
        return statistics.median(runs) * 1e6
    from triton.testing import do_bench

    milliseconds: float = do_bench(call, return_mode="median")
    return milliseconds * 1e3


def _fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes [..., W*f] of words [..., W], i32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _joined(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The words [..., W] of codes [..., W*f]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)
    return (codes.to(torch.int32).unflatten(-1, (-1, 32 // bits)) << shifts).sum(
        -1, dtype=torch.int32
    )


def _check_transpose(words: torch.Tensor, out: torch.Tensor, bits: int) -> None:
    f, width = 32 // bits, 64
    for w in range(0, words.shape[1], width):
        expected = _joined(_fields(words[:, w : w + width], bits).t(), bits)
        assert torch.equal(out[w * f : (w + width) * f], expected), f"transpose_packed, {bits} bits"


def _check_padded(codes: torch.Tensor, words: torch.Tensor, bits: int) -> None:
    """Padded words against codes, [N, K], f codes a word."""
    f = 32 // bits
    shifts = torch.arange(0, f * bits, bits, dtype=torch.int32, device=codes.device)
    for row in range(0, codes.shape[0], 512):
        block = codes[row : row + 512].to(torch.int32)
        block = torch.nn.functional.pad(block, (0, -block.shape[1] % f)).unflatten(1, (-1, f))
        expected = (block << shifts).sum(-1, dtype=torch.int32)
        assert torch.equal(words[row : row + 512], expected), f"padded pack, {bits} bits"


def _check_packed(codes: torch.Tensor, words: torch.Tensor, bits: int) -> None:
    """Dense words against codes, [N, K], bit by bit (K*bits a multiple of 32)."""
    places = torch.arange(bits, device=codes.device)
    for row in range(0, codes.shape[0], 512):
        string = ((codes[row : row + 512].unsqueeze(-1) >> places) & 1).flatten(-2)
        assert torch.equal(words[row : row + 512], _joined(string, 1)), f"pack, {bits} bits"


def _row(
    name: str,
    shape: tuple[int, int],
    dtype: str,
    nbytes: int,
    call: Callable[[], Any],
    device: torch.device,
) -> dict[str, Any]:
    source = torch.randint(-128, 128, (nbytes // 2,), dtype=torch.int8, device=device)
    copy_us = _time(source.clone, device)
    us = _time(call, device)
    return {
        "name": name,
        "shape": f"{shape[0]}x{shape[1]}",
        "dtype": dtype,
        "bytes": nbytes,
        "us": us,
        "tb_s": nbytes / us / 1e6,
        "copy_tb_s": nbytes / copy_us / 1e6,
        "share": copy_us / us,
    }


def _measure_width(shape: tuple[int, int], bits: int, device: torch.device) -> list[dict[str, Any]]:
    """The transforms of 2, 4 and 8 bits, which have kernels."""
    n, k = shape
    words = torch.randint(
        -(2**31), 2**31, (n, row_words(k, bits)), dtype=torch.int32, device=device
    )
    _check_transpose(words, transpose_packed(words, bits), bits)
    q = unpack_int8(words, bits, k)
    _check_packed(q.view(torch.uint8) + (1 << (bits - 1)), words, bits)
    assert torch.equal(pack_int8(q, bits), words), f"pack_int8, {bits} bits"
    both = words.nbytes + q.nbytes
    calls: tuple[tuple[str, int, Callable[[], Any]], ...] = (
        ("transpose_packed", 2 * words.nbytes, lambda: transpose_packed(words, bits)),
        ("pack_int8", both, lambda: pack_int8(q, bits)),
        ("unpack_int8", both, lambda: unpack_int8(words, bits, k)),
    )
    return [_row(name, shape, f"int{bits}", size, call, device) for name, size, call in calls]


def _measure_packing(
    shape: tuple[int, int], bits: int, packing: str, device: torch.device
) -> list[dict[str, Any]]:
    """Widths whose codes straddle two words or leave bits of one unused."""
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, device=device)
    words = pack(codes, bits, packing)
    (_check_packed if packing == "dense" else _check_padded)(codes, words, bits)
    found = unpack(words, bits, shape[1], packing)
    assert torch.equal(found, codes), f"unpack, {bits} bits, {packing}"
    del found
    both, dtype = words.nbytes + codes.nbytes, f"uint{bits}"
    calls: tuple[tuple[str, Callable[[], Any]], ...] = (
        (f"pack, {packing}", lambda: pack(codes, bits, packing)),
        (f"unpack, {packing}", lambda: unpack(words, bits, shape[1], packing)),
    )
    return [_row(name, shape, dtype, both, call, device) for name, call in calls]


def measure(device: torch.device) -> list[dict[str, Any]]:
    """One row for each transform, width and shape.

    Raises:
        AssertionError: a result is wrong; nothing more is timed then.
    """
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for bits in WIDTHS:
            rows += _measure_width(shape, bits, device)
        for bits in OTHER_WIDTHS:
            for packing in ("dense", "padded"):
                rows += _measure_packing(shape, bits, packing, device)
    return rows


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{'transform':<18}{'N x K':<14}{'dtype':<8}{'us':>10}{'TB/s':>9}{'copy':>9}{'share':>8}")
    for row in measure(torch.device(name)):
        print(
            f"{row['name']:<18}{row['shape']:<14}{row['dtype']:<8}{row['us']:>10.1f}"
            f"{row['tb_s']:>9.4f}{row['copy_tb_s']:>9.4f}{row['share']:>8.1%}"
        )


if __name__ == "__main__":
    main()
