"""Weight-only INT GEMM (W2A16, W4A16, W8A16) on the ``triton-wna16`` layout.

Before (N = output features, K = input features, G = group size, b = 2, 4, 8, f = 32/b)::

    x        [..., M, K]     f16 or bf16
    qweight  i32 [K, N/f]    code j of word (k, c) is the unsigned code of weight (n = c*f + j, k)
    scales   [K/G, N]        f16, bf16 or f32
    qzeros   i32 [K/G, N/f]  code j of word (g, c) is the zero point of n = c*f + j; None: 2^(b-1)

After: ``out[..., m, n] = sum_k x[..., m, k] * W[n, k] + bias[n]`` in x's dtype, with
``W[n, k] = (code - zero) * scale`` and f32 accumulation. With static INT8 activations (the
``wna8o8`` scheme) x is fake-quantised first, or the rounded output afterwards, or both.
"""

from __future__ import annotations

import torch

from ctconvert.runtime import activations
from ctconvert.runtime.kernels.base import Binding, Kernel, Tensors, padded_rows
from ctconvert.runtime.kernels.fake_quant.kernel import ACTIVATION_DTYPES
from ctconvert.runtime.kernels.ops import Result, check_tensor, op
from ctconvert.runtime.kernels.wna16.reference import wna16_gemm_reference

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@op(wna16_gemm_reference, "ctconvert.runtime.kernels.wna16.triton:gemm")
def wna16_gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    input_scale: torch.Tensor | None = None,
    output_scale: torch.Tensor | None = None,
) -> Result:
    """``x @ W^T + bias`` with the weight in the ``triton-wna16`` layout.

    Args:
        x: [..., M, K] or [K], f16 or bf16.
        qweight: i32 [K, N/f], f = 32/bits codes a word, neighbours along N.
        scales: f16, bf16 or f32 [K/group_size, N].
        qzeros: i32 [K/group_size, N/f]; None where symmetric (zero = 2^(bits-1)).
        bias: f16, bf16 or f32 [N], added before the result is rounded.
        bits: 2, 4 or 8.
        group_size: rows of K that share a scale; any divisor of K (K itself: channel-wise).
        input_scale: f32 [1]; x becomes fake_quant_int8(x, input_scale).
        output_scale: f32 [1]; the result, bias and rounding done, becomes its fake_quant_int8.

    Returns:
        [..., M, N] in x's dtype. Accumulation is in f32; the kernels may round a dequantised
        weight to x's dtype first, as Marlin and Machete do. The same call gives the same bits.

    All tensors are contiguous and on one device. On the CPU this is the reference; elsewhere
    Triton kernels, or, for many rows of x and for group sizes that are no multiple of 16, one
    dequantising pass into a temporary [K, N] and torch's product (which takes the bias in x's
    dtype). Inference only: no gradient.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, device or memory layout, or a group size that does not divide K.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8, got {bits}")
    check_tensor("x", x, dtypes=ACTIVATION_DTYPES)
    if x.dim() == 0:
        raise ValueError("x must have shape [..., M, K], got a scalar")
    k, device = x.shape[-1], x.device
    check_tensor("qweight", qweight, dtypes=(torch.int32,), shape=(k, None), device=device)
    words = qweight.shape[1]
    n = words * (32 // bits)
    if group_size <= 0 or k % group_size:
        raise ValueError(f"group_size must divide K = {k}, got {group_size}")
    groups = k // group_size
    check_tensor("scales", scales, dtypes=_SCALE_DTYPES, shape=(groups, n), device=device)
    if qzeros is not None:
        shape = (groups, words)
        check_tensor("qzeros", qzeros, dtypes=(torch.int32,), shape=shape, device=device)
    if bias is not None:
        check_tensor("bias", bias, dtypes=_SCALE_DTYPES, shape=(n,), device=device)
    for name, scale in (("input_scale", input_scale), ("output_scale", output_scale)):
        if scale is not None:
            check_tensor(name, scale, dtypes=(torch.float32,), shape=(1,), device=device)
    return Result((*x.shape[:-1], n), x.dtype)


def _run(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return wna16_gemm(
        x,
        tensors["qweight"],
        tensors["scales"],
        tensors.get("qzeros"),
        padded_rows(bound, bias),
        bits=bound.spec.bits,
        group_size=bound.group_size,
        input_scale=tensors.get("input_scale"),
        output_scale=tensors.get("output_scale"),
    )[..., : bound.spec.n]


TRITON_WNA16 = Kernel("triton-wna16", _run, 1e-2, activations.fake_quantised)
