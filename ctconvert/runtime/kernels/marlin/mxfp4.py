"""Matmul on Marlin tiles of MXFP4 (``marlin-mxfp4``); the layout is in ``kernel.py``."""

from __future__ import annotations

import torch

from ctconvert.runtime.kernels.base import Binding, Kernel, Tensors, padded
from ctconvert.runtime.kernels.marlin.kernel import check_activations, check_size
from ctconvert.runtime.kernels.marlin.reference import marlin_mxfp4_gemm_reference
from ctconvert.runtime.kernels.ops import Result, check_tensor, op

_SCALES = (torch.uint8, torch.float8_e8m0fnu)


@op(marlin_mxfp4_gemm_reference, "ctconvert.runtime.kernels.marlin.triton:mxfp4_gemm")
def marlin_mxfp4_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    n: int,
    k: int,
) -> Result:
    """Matmul on the ``marlin-mxfp4`` layout: x @ W.T + bias, summed in float32.

    The custom op is ``ctconvert::marlin_mxfp4_gemm``. On a CPU it is
    :func:`marlin_mxfp4_gemm_reference`; elsewhere a Triton kernel that reads the tiles directly.
    A weight 2**(s - 127) * e2m1 is exact in bf16, so an f16 x is split into two bf16 parts
    rather than the weight being rounded to f16's narrower range.

    Args:
        x: f16 or bf16 [..., K].
        weight: i32 [K/16, N*2]: Marlin tiles of E2M1 codes.
        scale: u8 or f8_e8m0 [K/32, N], E8M0 bytes in Marlin's order for MXFP4: by 64, then by 4.
        bias: [N] in x's dtype and plain order.
        n: output features, a multiple of 64.
        k: input features, a multiple of 32.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError: an argument has a dtype the kernel does not take.
        ValueError: an argument has a wrong shape or device or is not contiguous, or a size the
            layout does not have.
    """
    check_size(n, k)
    if k % 32:
        raise ValueError(f"k must be a multiple of 32 (an MXFP4 group), got {k}")
    check_activations(x, bias, n, k)
    check_tensor("weight", weight, dtypes=(torch.int32,), shape=(k // 16, n * 2), device=x.device)
    check_tensor("scale", scale, dtypes=_SCALES, shape=(k // 32, n), device=x.device)
    return Result((*x.shape[:-1], n), x.dtype)


def _run(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    n, k = bound.padded
    wide, wide_bias = padded(bound, x, bias)
    out = marlin_mxfp4_gemm(wide, tensors["weight"], tensors["weight_scale"], wide_bias, n=n, k=k)
    return out[..., : bound.spec.n]


MARLIN_MXFP4 = Kernel("marlin-mxfp4", _run, 1e-2)
