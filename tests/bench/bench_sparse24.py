"""2:4 transforms on a device next to a copy of as many bytes.

``python tests/bench/bench_sparse24.py`` prints a table. Before a transform is timed, rows of its
output at both ends and in the middle are compared bit for bit with the CPU path; a wrong result
ends the run. Times are medians of ``triton.testing.do_bench``, which clears the L2 cache before
each run, of one launch and the allocation of its outputs; the check of the error word, one read of
eight bytes by the host, is not in them. The copy is ``torch.clone`` of half the bytes that the
transform reads and writes, in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ctconvert.transforms import sparse24

SHAPES = ((8192, 8192), (28672, 8192))  # N, K
DTYPES = (torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
_CHECKED_ROWS = 128


def _time(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    milliseconds: float = do_bench(call, return_mode="median")
    return milliseconds * 1e3


def _random_bitmask_weight(
    n: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Kept values, one in fifty of them 0, and a random bitmask."""
    nibbles = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8, device=device)
    low, high = (nibbles[torch.randint(0, 6, (n, k // 8), device=device)] for _ in range(2))
    top = 1 << 8 * dtype.itemsize - 1
    integer = torch.int8 if dtype.itemsize == 1 else torch.int16
    raw = torch.randint(1, top, (n, k // 2), dtype=integer, device=device)
    raw.masked_fill_(torch.rand((n, k // 2), device=device) < 0.02, 0)
    return raw.view(dtype), low | high << 4


def _rows(n: int) -> list[slice]:
    middle = n // 128 * 64
    return [slice(start, start + _CHECKED_ROWS) for start in (0, middle, n - _CHECKED_ROWS)]


def _meta_rows(meta: Tensor, rows: slice) -> Tensor:
    """Metadata of whole blocks of 64 rows as that of a weight of its own."""
    blocks = meta.view(meta.shape[1] // 16, -1, 1024)[:, rows.start // 64 : rows.stop // 64]
    return blocks.reshape(rows.stop - rows.start, -1).cpu()


def _assert_same(name: str, actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8)), name


def measure(device: torch.device) -> list[dict[str, Any]]:
    """One row for each transform, shape and dtype.

    Raises:
        AssertionError: a result is wrong; nothing more is timed then.
    """
    from ctconvert.transforms.sparse24 import triton as kernels

    rows = []
    for n, k in SHAPES:
        for dtype in DTYPES:
            compressed, bitmask = _random_bitmask_weight(n, k, dtype, device)
            dense = sparse24.bitmask_decompress(compressed, bitmask, k)
            values, meta = sparse24.sm90_compress(dense)
            own_mask = sparse24.bitmask_of(dense)
            kept = sparse24.bitmask_compress(dense, bitmask)
            back = sparse24.sm90_decompress(values, meta, n, k)
            for part in _rows(n):
                expected = sparse24.bitmask_decompress(
                    compressed[part].cpu(), bitmask[part].cpu(), k
                )
                _assert_same("bitmask_decompress", dense[part], expected)
                _assert_same("bitmask_compress", kept[part], compressed[part].cpu())
                _assert_same("bitmask_of", own_mask[part], sparse24.bitmask_of(expected))
                sm90 = sparse24.sm90_compress(expected)
                _assert_same("sm90_compress", values[part], sm90[0])
                _assert_same("sm90_compress", _meta_rows(meta, part), sm90[1])
                plain = sparse24.sm90_decompress(*sm90, _CHECKED_ROWS, k)
                _assert_same("sm90_decompress", back[part], plain)
            del own_mask, kept, back

            error = torch.full((1,), torch.iinfo(torch.int64).max, device=device)
            whole = n * k * dtype.itemsize
            half, nibbles = whole // 2, n * k // 8
            decompress = kernels.launch_bitmask_decompress
            compress, mask_of = kernels.launch_bitmask_compress, kernels.launch_bitmask_of
            to_sm90, from_sm90 = kernels.launch_sm90_compress, kernels.launch_sm90_decompress
            both = half + nibbles + whole
            calls: dict[str, tuple[int, Callable[[], Any]]] = {
                "bitmask_decompress": (both, partial(decompress, compressed, bitmask, k, error)),
                "bitmask_compress": (both, partial(compress, dense, bitmask, error)),
                "bitmask_of": (whole + nibbles, partial(mask_of, dense, error)),
                "sm90_compress": (both, partial(to_sm90, dense, error)),
                "sm90_decompress": (both, partial(from_sm90, values, meta, n, k, error)),
            }
            for name, (size, call) in calls.items():
                source = torch.empty(size // 2, dtype=torch.uint8, device=device)
                copy_us = _time(source.clone)
                us = _time(call)
                rows.append(
                    {
                        "name": name,
                        "shape": f"{n} x {k}",
                        "dtype": str(dtype).removeprefix("torch."),
                        "bytes": size,
                        "us": us,
                        "tb_s": size / us / 1e6,
                        "copy_tb_s": size / copy_us / 1e6,
                        "share": copy_us / us,
                    }
                )
    return rows


def main() -> None:
    for row in measure(torch.device("cuda")):
        print(
            f"{row['name']:20s} {row['shape']:14s} {row['dtype']:14s} {row['us']:8.1f} us "
            f"{row['tb_s']:6.2f} TB/s  copy {row['copy_tb_s']:5.2f} TB/s  {row['share']:4.0%}"
        )


if __name__ == "__main__":
    main()
