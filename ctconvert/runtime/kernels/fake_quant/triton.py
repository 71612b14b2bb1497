"""Triton part of ``fake_quant``: one pass over x; imported only when a kernel is launched.

Before: x [...] f16 or bf16; after: the same shape and dtype on the grid of one INT8 scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ctconvert.transforms.device import on_device

BLOCK = 2048


@triton.jit
def _probe():
    pass


#: Whether Triton interprets its kernels (TRITON_INTERPRET=1) instead of compiling them.
INTERPRETED = tl.constexpr(not isinstance(_probe, triton.JITFunction))


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """A f32 tile rounded to DTYPE, to nearest even. Triton's interpreter truncates to bf16."""
    if INTERPRETED:  # noqa: SIM102
        if tl.bfloat16 == DTYPE:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def load_scale(scale_ptr, DTYPE: tl.constexpr):
    """The scale as fake-quantisation uses it: rounded to x's dtype, held in f32."""
    return narrow(tl.load(scale_ptr), DTYPE).to(tl.float32)


@triton.jit
def fake_quant_tile(x, scale):
    """fq of a tile in its dtype; scale from :func:`load_scale`.

    torch rounds x / s to x's dtype before round(): so must this, with a true division. Clamping
    first changes nothing (the bounds are integers) and keeps the value small enough for
    1.5 * 2^23 to push its fraction out, which rounds half to even.
    """
    q = narrow(tl.div_rn(x.to(tl.float32), scale), x.dtype).to(tl.float32)
    q = tl.maximum(q, -128.0, propagate_nan=tl.PropagateNan.ALL)
    q = tl.minimum(q, 127.0, propagate_nan=tl.PropagateNan.ALL)
    q = (q + 12582912.0) - 12582912.0
    return narrow(q * scale, x.dtype)


@triton.jit
def _fake_quant_kernel(x_ptr, scale_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < numel, other=0.0)
    scale = load_scale(scale_ptr, x.dtype)
    tl.store(out_ptr + at, fake_quant_tile(x, scale), mask=at < numel)


def fake_quant(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Launch the kernel: x [...] f16/bf16 contiguous, scale f32 [1] -> a new tensor like x."""
    out = torch.empty_like(x)
    if x.numel():
        grid = (-(-x.numel() // BLOCK),)
        with on_device(x.device):
            _fake_quant_kernel[grid](x, scale, out, x.numel(), BLOCK=BLOCK, num_warps=8)
    return out
