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

from ctconvert.runtime.kernels._common import check_tensor
from ctconvert.runtime.kernels.fake_quant import ACTIVATION_DTYPES, fake_quant_int8_reference

__all__ = ["dequantize_wna16", "wna16_gemm", "wna16_gemm_reference"]

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def dequantize_wna16(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """The dense weight, transposed, in plain torch: f32 [K, N] from the arguments of the GEMM."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=qweight.device)
    mask = (1 << bits) - 1
    codes = ((qweight.unsqueeze(-1) >> shifts) & mask).flatten(1)
    if qzeros is None:
        zeros = torch.full_like(scales, 1 << (bits - 1), dtype=torch.int32)
    else:
        zeros = ((qzeros.unsqueeze(-1) >> shifts) & mask).flatten(1)
    zeros = zeros.repeat_interleave(group_size, dim=0)
    return (codes - zeros).float() * scales.float().repeat_interleave(group_size, dim=0)


def wna16_gemm_reference(
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
) -> torch.Tensor:
    """:func:`wna16_gemm` in plain torch: dequantise to f32, multiply in f32, round once."""
    if input_scale is not None:
        x = fake_quant_int8_reference(x, input_scale)
    weight = dequantize_wna16(qweight, scales, qzeros, bits=bits, group_size=group_size)
    out = x.float() @ weight
    if bias is not None:
        out += bias.float()
    out = out.to(x.dtype)
    return out if output_scale is None else fake_quant_int8_reference(out, output_scale)


def _check(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    output_scale: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> None:
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


def _wna16_gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    output_scale: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    _check(x, qweight, scales, qzeros, bias, input_scale, output_scale, bits, group_size)
    if x.device.type == "cpu":
        return wna16_gemm_reference(
            x,
            qweight,
            scales,
            qzeros,
            bias,
            bits=bits,
            group_size=group_size,
            input_scale=input_scale,
            output_scale=output_scale,
        )
    from ctconvert.runtime.kernels import wna16_triton

    out = wna16_triton.gemm(
        x.reshape(-1, x.shape[-1]),
        qweight,
        scales,
        qzeros,
        bias,
        input_scale,
        output_scale,
        bits=bits,
        group_size=group_size,
    )
    return out.view(*x.shape[:-1], out.shape[1])


def _fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    output_scale: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    _check(x, qweight, scales, qzeros, bias, input_scale, output_scale, bits, group_size)
    return x.new_empty((*x.shape[:-1], qweight.shape[1] * (32 // bits)))


# Defined straight in the dispatcher: the custom_op decorator adds host time to every call, which
# a kernel of ten microseconds feels wherever no CUDA graph hides it.
_LIBRARY = torch.library.Library("ctconvert", "FRAGMENT")
_LIBRARY.define(
    "wna16_gemm(Tensor x, Tensor qweight, Tensor scales, Tensor? qzeros, Tensor? bias, "
    "Tensor? input_scale, Tensor? output_scale, int bits, int group_size) -> Tensor"
)
_LIBRARY.impl("wna16_gemm", _wna16_gemm, "CompositeExplicitAutograd")
torch.library.register_fake("ctconvert::wna16_gemm", _fake, lib=_LIBRARY)


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
) -> torch.Tensor:
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
    return torch.ops.ctconvert.wna16_gemm(
        x, qweight, scales, qzeros, bias, input_scale, output_scale, bits, group_size
    )
