"""The CPU transforms on one core, compiled beside torch, and a copy of as many bytes.

``python tests/bench/bench_cpu.py [N] [K] [NAME]`` prints GB/s, read + written, over the best of
five of one thread's own time, into memory that was written before; NAME picks transforms by a part
of their name. Both paths give the same bits, or the run ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from printing import print_table
from torch import Tensor

from ctconvert.transforms import compiled, marlin, packed, sparse24
from ctconvert.transforms.dtypes import same_bits

Made = Tensor | tuple[Tensor, ...]
GROUP = 128


def calls(n: int, k: int) -> Iterator[tuple[str, int, Callable[[], Made]]]:
    """Name, bytes of the arguments, and the transform."""
    for bits in (4, 8):
        words = torch.randint(-(1 << 31), 1 << 31, (n, k * bits // 32), dtype=torch.int32)
        tiles = marlin.marlin_pack(words, bits)
        g_idx = torch.randint(0, k // GROUP, (k,), dtype=torch.int32)
        ordered, perm = marlin.sort_columns(words, g_idx, bits)
        size = words.nbytes
        yield f"int{bits}, K -> N", size, partial(packed.transpose_packed, words, bits)
        yield f"int{bits}, tiles", size, partial(marlin.marlin_pack, words, bits)
        yield f"int{bits}, tiles back", size, partial(marlin.marlin_unpack, tiles, bits, n, k)
        yield f"int{bits}, act-order", size, partial(marlin.sort_columns, words, g_idx, bits)
        yield (
            f"int{bits}, act-order back",
            size,
            partial(marlin.unsort_columns, ordered, perm, bits),
        )
        zeros = torch.randint(0, 1 << bits, (k // 32, n), dtype=torch.uint8)
        tiled = marlin.marlin_pack_zero_points(zeros, bits)
        pack = partial(marlin.marlin_pack_zero_points, zeros, bits)
        yield f"int{bits}, zero points in tiles", zeros.nbytes, pack
        unpack = partial(marlin.marlin_unpack_zero_points, tiled, bits)
        yield f"int{bits}, zero points in tiles back", tiled.nbytes, unpack
        q = torch.randint(-(1 << bits - 1), 1 << bits - 1, (n, k), dtype=torch.int8)
        yield f"int{bits}, i8 packed", q.nbytes, partial(packed.pack_int8, q, bits)
        unpack = partial(packed.unpack_int8, words, bits, k)
        yield f"int{bits}, i8 unpacked", size, unpack
    scale = torch.rand((k // GROUP, n)).bfloat16()
    permute = partial(marlin.marlin_permute_scales, scale, False)
    yield "scales in Marlin's order", scale.nbytes, permute
    kept = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        low, high = (kept[torch.randint(0, 6, (n, k // 8))] for _ in range(2))
        bitmask = low | high << 4
        integer = torch.int8 if dtype.itemsize == 1 else torch.int16
        raw = torch.randint(1, 1 << 8 * dtype.itemsize - 1, (n, k // 2), dtype=integer)
        values = raw.masked_fill_(torch.rand(raw.shape) < 0.005, 0).view(dtype)
        dense = sparse24.bitmask_decompress(values, bitmask, k)
        sm90, meta = sparse24.sm90_compress(dense)
        settled, pairs = sparse24.pairs_of_bitmask(values, bitmask, k)
        half, name = values.nbytes + bitmask.nbytes, str(dtype).removeprefix("torch.")
        for what, size, call in (
            ("bitmask -> pairs", half, partial(sparse24.pairs_of_bitmask, values, bitmask, k)),
            ("pairs -> bitmask", half, partial(sparse24.bitmask_of_pairs, settled, pairs, k)),
            ("pairs -> SM90", pairs.nbytes, partial(sparse24.sm90_meta, settled, pairs, k)),
            ("SM90 -> pairs", half, partial(sparse24.pairs_of_sm90, sm90, meta, n, k)),
            ("bitmask -> dense", half, partial(sparse24.bitmask_decompress, values, bitmask, k)),
            ("SM90 -> dense", half, partial(sparse24.sm90_decompress, sm90, meta, n, k)),
        ):
            yield f"{name}, {what}", size, call


def best(call: Callable[[], Any]) -> float:
    """Seconds of this thread."""
    call()
    times = []
    for _ in range(5):
        begun = time.thread_time()
        call()
        times.append(time.thread_time() - begun)
    return min(times)


def main() -> None:
    torch.set_num_threads(1)
    n, k = (int(value) for value in sys.argv[1:3]) if len(sys.argv) > 2 else (14336, 4096)
    wanted = sys.argv[3] if len(sys.argv) > 3 else ""
    rows = []
    for name, read, call in calls(n, k):
        if wanted not in name:
            continue
        speeds, found = [], []
        for least in (0, 1 << 60):
            compiled.LOOPS.least = least
            made = call()
            found.append((made,) if isinstance(made, Tensor) else made)
            size = read + sum(tensor.nbytes for tensor in found[-1])
            speeds.append(size / best(call) / 1e9)
        assert all(map(same_bits, *found)), name
        source = torch.ones(size // 2, dtype=torch.uint8)
        target = torch.ones_like(source)
        copied = size / best(lambda source=source, target=target: target.copy_(source)) / 1e9
        fast, slow = speeds
        rows.append(
            {
                "transform": name,
                "MB": size // 10**6,
                "compiled": f"{fast:.1f}",
                "torch": f"{slow:.1f}",
                "copy": f"{copied:.1f}",
            }
        )
    print_table(rows)


if __name__ == "__main__":
    main()
