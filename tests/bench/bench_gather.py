"""Embedding look-up: time and share of a device copy's bandwidth.

    python tests/bench/bench_gather.py

Bytes counted: the packed rows, scales and ids read, and the output written.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from printing import print_table

from ctconvert.runtime.benchmark import ceilings, median_seconds
from ctconvert.runtime.kernels.gather.kernel import embedding_gather
from ctconvert.runtime.kernels.gather.reference import embedding_gather_reference
from ctconvert.transforms.packed import row_words

VOCABULARY = 131072
GROUP = 128


def measure(device: torch.device) -> list[dict[str, Any]]:
    """One row for each case; raises if a case is not exact."""
    torch.manual_seed(0)
    copy = ceilings(device)[0] / 1e12
    rows = []
    cases = [
        *itertools.product((4,), (4096, 8192), (GROUP, 0), (256, 65536)),
        *itertools.product((2, 3, 8), (4096,), (GROUP,), (65536,)),
    ]
    for bits, hidden, group, count in cases:
        words = row_words(hidden, bits, "dense")
        table = torch.randint(
            -(2**31), 2**31, (VOCABULARY, words), dtype=torch.int32, device=device
        )
        groups = hidden // group if group else 1
        scale = torch.rand(VOCABULARY, groups, device=device).bfloat16()
        ids = torch.randint(0, VOCABULARY, (count,), device=device)
        arguments: dict[str, Any] = {"bits": bits, "hidden": hidden}
        some = ids[:512].contiguous()
        expected = embedding_gather_reference(some, table, scale, **arguments)
        if not torch.equal(embedding_gather(some, table, scale, **arguments), expected):
            raise AssertionError(f"bits {bits}, hidden {hidden}: not the reference's values")
        call = partial(embedding_gather, ids, table, scale, **arguments)
        us = median_seconds(call, device) * 1e6
        moved = count * (words * 4 + groups * 2 + hidden * 2 + 8)
        rows.append(
            {
                "bits": bits,
                "hidden": hidden,
                "group": group or "channel",
                "rows": count,
                "us": round(us, 1),
                "TB/s": round(moved / us / 1e6, 2),
                "of copy": f"{moved / us / 1e6 / copy:.0%}",
                "copy TB/s": round(copy, 2),
            }
        )
    return rows


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    print_table(measure(torch.device("cuda")))
