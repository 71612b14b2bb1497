"""The Triton path of :mod:`ctconvert.transforms.recode`, which describes the codes.

Before and after: i32 words, one after the other. Each is read once and written once.

The launcher also takes CPU tensors where Triton's interpreter runs the kernel.
"""

# Kernel arguments have Triton's types, not Python's.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ctconvert.transforms.device import on_device


@triton.jit
def _recode_kernel(words, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    inside = at < count - start
    x = tl.load(words + start + at, mask=inside, other=0)
    x = x.to(tl.uint32, bitcast=True)
    if KIND == "negate" or KIND == "unnegate":
        # Codes with a top bit, or nibbles without one: their lower three bits are negated mod 8.
        turned = x if KIND == "negate" else x ^ 0x88888888
        one = (turned >> 3) & 0x11111111
        lower = (((x & 0x77777777) ^ (one * 7)) + one) & 0x77777777
        x = lower | ((x ^ 0x88888888) & 0x88888888)
    else:
        one = (x >> 7) & 0x01010101
        if KIND == "bytes":
            one ^= 0x01010101
        x ^= 0x80808080 ^ (one * 0x7F)
    tl.store(words + start + at, x.to(tl.int32, bitcast=True), mask=inside)


_BLOCK, _WARPS = 4096, 4


def recode(words: torch.Tensor, kind: str) -> None:
    """``kind``: negate, unnegate, bytes or unbytes. i32 words, contiguous, in place."""
    count = words.numel()
    if count:
        with on_device(words.device):
            _recode_kernel[(triton.cdiv(count, _BLOCK),)](
                words, count, KIND=kind, BLOCK=_BLOCK, num_warps=_WARPS
            )
