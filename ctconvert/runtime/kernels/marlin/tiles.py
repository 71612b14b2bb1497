"""Matmul on Marlin tiles of other weights than Marlin's INT: FP4, FP8, and Humming's.

The layouts are ``kernel.py``'s but for what ``forms.py`` says of each form.
"""

from __future__ import annotations

import torch

from ctconvert.runtime.kernels.marlin.checks import check_activations, check_weight
from ctconvert.runtime.kernels.marlin.reference import marlin_tiles_gemm_reference
from ctconvert.runtime.kernels.ops import Result, op


@op(marlin_tiles_gemm_reference, "ctconvert.runtime.kernels.marlin.triton:tiles_gemm")
def marlin_tiles_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    form: str,
    n: int,
    k: int,
    group_size: int,
) -> Result:
    """Matmul on Marlin tiles of any form: x @ W.T + bias, summed in float32.

    The custom op is ``ctconvert::marlin_tiles_gemm``. On a CPU it is
    :func:`marlin_tiles_gemm_reference`; elsewhere a Triton kernel that reads the tiles directly.
    A weight 2**(s - 127) * code of E8M0 scales is exact in bf16, so an f16 x is split into two bf16
    parts rather than the weight being rounded to f16's narrower range.

    Args:
        x: f16 or bf16 [..., K].
        weight: i32 [K/16, N*16/f], f = 8 or 4 codes a word: Marlin tiles.
        scale: [K/G, N] in the form's dtype and order: f16, bf16 (but for ``fp8``, f32); u8 or
            f8_e8m0; u8; u8 or f8_e4m3.
        zeros: i32 [K/G, N/f] in the form's packing, or None: zero = 2**(b - 1).
        factor: f32 [1], where the form has one.
        bias: [N] in x's dtype and plain order.
        form: a name in ``forms.FORMS``.
        n: output features, a multiple of 64.
        k: input features, a multiple of 16.
        group_size: a multiple of 16 that divides K, the form's own where it has one; -1 or K:
            channel-wise.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError: an argument has a dtype the kernel does not take.
        ValueError: an argument has a wrong shape or device or is not contiguous, or a size or
            a form the layout does not have.
    """
    check_weight(x.device, (), weight, scale, zeros, factor, form, n, k, group_size)
    check_activations(x, bias, n, k)
    return Result((*x.shape[:-1], n), x.dtype)
