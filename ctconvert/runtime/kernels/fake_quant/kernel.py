"""Static per-tensor INT8 fake-quantisation of activations.

Before: x [...] f16 or bf16, any shape, contiguous; scale f32 [1].
After:  the same shape and dtype, every value on the grid s * {-128, ..., 127}.

``fq(x) = clamp(round_half_even(x / s), -128, 127) * s``, every step in x's dtype, with s cast to
it first: what compressed-tensors computes for a static INT8 activation scheme. One pass over x;
the GEMM of ``wna16`` fuses it where that is cheaper than a pass of its own.
"""

from __future__ import annotations

import torch

from ctconvert.runtime.kernels.fake_quant.reference import fake_quant_int8_reference
from ctconvert.runtime.kernels.ops import Result, check_tensor, op

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16)


@op(fake_quant_int8_reference, "ctconvert.runtime.kernels.fake_quant.triton:fake_quant")
def fake_quant_int8(x: torch.Tensor, scale: torch.Tensor) -> Result:
    """Round x to the static INT8 grid of one scale and back; the dtype stays.

    x: [...] f16 or bf16, contiguous. scale: f32 [1], same device. Returns a new tensor like x.
    Inference only: there is no gradient. Semantics: the module docstring.
    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or memory layout.
    """
    check_tensor("x", x, dtypes=ACTIVATION_DTYPES)
    check_tensor("scale", scale, dtypes=(torch.float32,), shape=(1,), device=x.device)
    return Result(x.shape, x.dtype)
