"""W8A8 matmul (the ``scaled-mm`` layout): 8-bit weight and activations, scaled afterwards.

Before (N = output features, K = input features):

    weight        i8 or f8_e4m3 [N, K] contiguous; the product takes its .t() view
    weight_scale  f32 [N, 1] (or [1]), or for f8 one for each 128 x 128 block,
                  [ceil(N/128), ceil(K/128)]; blocks of another size are not for this kernel
    x_q           [M, K] of the weight's dtype, quantised by a static scale f32 [1], per token
                  f32 [M, 1], or (block-wise weights) per token and 128 columns
                  f32 [M, ceil(K/128)]
    x_zero_point  i8 [1], int8 static only: x = (x_q - zero) * scale

After: out[m, n] = x_scale[m] * weight_scale[n] * sum over k of (x_q[m, k] - zero) * weight[n, k]
+ bias[n]. The zero point is taken out of the sum, as sum(x_q * weight) - zero * sum(weight), so
the tensor cores see 8-bit operands only (vLLM's ``cutlass_scaled_mm_azp`` does the same). A
weight's zero point, i8 [N, 1], is taken out likewise, by :func:`scaled_linear`.

int8 is summed in int32, f8 in float32. Hopper's tensor cores add up to 128 f8 products in fewer
bits before they reach the float32 sum: about 1e-4 of the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)

from ctconvert.runtime import activations
from ctconvert.runtime.kernels.base import Binding, Kernel, Tensors, like, product_in_8_bits
from ctconvert.runtime.kernels.ops import Result, check_last, check_tensor, op
from ctconvert.runtime.kernels.quantize.kernel import quantize_per_token, quantize_static
from ctconvert.runtime.kernels.scaled_mm.reference import (
    BLOCK,
    blocks,
    is_blockwise,
    scaled_mm_reference,
)
from ctconvert.specs import WeightSpec

_QUANTIZED = (torch.int8, torch.float8_e4m3fn)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_F32 = (torch.float32,)
# Largest K for which sum((x_q - zero) * weight) cannot leave int32.
_MAX_INT8_K = 65536


@op(scaled_mm_reference, "ctconvert.runtime.kernels.scaled_mm.triton:scaled_mm")
def scaled_mm(
    x_q: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    x_zero_point: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
    out_dtype: torch.dtype,
) -> Result:
    """Matmul of quantised activations and weight, scaled: the ``scaled-mm`` layout.

    The custom op is ``ctconvert::scaled_mm``. On a CPU it is :func:`scaled_mm_reference`;
    elsewhere a Triton kernel, or torch's own product where that was measured faster (see
    ``triton.py``).

    Args:
        x_q: i8 or f8_e4m3 [M, K].
        weight: [N, K] of x_q's dtype; int8 takes K up to 65536.
        x_scale: f32 [1], [M, 1], or with a block-wise weight [M, ceil(K/128)].
        weight_scale: f32 [1], [N, 1], or for f8 [ceil(N/128), ceil(K/128)].
        x_zero_point: i8 [1], int8 with a static scale only.
        bias: f16, bf16 or f32 [N], added in float32.
        weight_sum: i32 [N], the weight summed over K: only with ``x_zero_point``, to save
            computing it on every call.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        [M, N] in ``out_dtype``.

    Raises:
        TypeError: an argument has a dtype the kernel does not take.
        ValueError: an argument has a wrong shape or device or is not contiguous, or a zero
            point is given where there can be none.
    """
    if out_dtype not in _FLOATS:
        raise TypeError(f"out_dtype must be float16, bfloat16 or float32, got {out_dtype}")
    check_tensor("x_q", x_q, dtypes=_QUANTIZED, shape=(None, None))
    device = x_q.device
    m, k = x_q.shape
    check_tensor("weight", weight, dtypes=(x_q.dtype,), shape=(None, k), device=device)
    n = weight.shape[0]
    int8 = weight.dtype == torch.int8
    if int8 and k > _MAX_INT8_K:
        raise ValueError(f"weight has K = {k}; above {_MAX_INT8_K} an int32 sum could overflow")
    check_tensor("weight_scale", weight_scale, dtypes=_F32, device=device)
    shape = tuple(weight_scale.shape)
    blockwise = not int8 and shape == (blocks(n), blocks(k))
    if shape not in ((1,), (n, 1)) and not blockwise:
        wanted = f"[1] or [{n}, 1]" + ("" if int8 else f" or [{blocks(n)}, {blocks(k)}]")
        raise ValueError(f"weight_scale must have shape {wanted}, got {list(shape)}")
    check_tensor("x_scale", x_scale, dtypes=_F32, device=device)
    shape = tuple(x_scale.shape)
    if shape not in ((1,), (m, 1)) and not (blockwise and shape == (m, blocks(k))):
        wanted = f"[1] or [{m}, 1]" + (f" or [{m}, {blocks(k)}]" if blockwise else "")
        raise ValueError(f"x_scale must have shape {wanted}, got {list(shape)}")
    if x_zero_point is not None:
        if not int8:
            raise ValueError("x_zero_point needs an int8 weight: f8 is symmetric")
        check_tensor("x_zero_point", x_zero_point, dtypes=(torch.int8,), shape=(1,), device=device)
        if x_scale.dim() != 1:
            raise ValueError("x_zero_point needs a static x_scale of shape [1]")
    if bias is not None:
        check_tensor("bias", bias, dtypes=_FLOATS, shape=(n,), device=device)
    if weight_sum is not None:
        check_tensor("weight_sum", weight_sum, dtypes=(torch.int32,), shape=(n,), device=device)
    return Result((m, n), out_dtype)


def scaled_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    input_scale: torch.Tensor | None = None,
    input_zero_point: torch.Tensor | None = None,
    weight_zero_point: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer of the ``scaled-mm`` layout: quantise x, multiply, scale.

    x is quantised with ``input_scale`` where it is given; otherwise per token, and by 128 of its
    columns where the weight is block-wise.

    Args:
        x: f16, bf16 or f32 [..., K].
        weight: i8 or f8_e4m3 [N, K].
        weight_scale: as for :func:`scaled_mm`.
        input_scale: f32 [1] (static), or None (dynamic).
        input_zero_point: i8 [1], with a static int8 scale only.
        weight_zero_point: i8 [N, 1] of an asymmetric int8 weight, or None.
        bias: [N].
        weight_sum: i32 [N], as for :func:`scaled_mm`.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError: an argument has a dtype the kernel does not take.
        ValueError: an argument has a wrong shape or device or is not contiguous; a weight zero
            point with f8; an input zero point without a static scale.
    """
    if input_zero_point is not None and input_scale is None:
        raise ValueError("input_zero_point needs a static input_scale")
    check_tensor("weight", weight, dtypes=_QUANTIZED, shape=(None, None))
    check_tensor("x", x, dtypes=_FLOATS)
    n, k = weight.shape
    check_last("x", x, k)
    if weight_zero_point is not None:
        if weight.dtype != torch.int8:
            raise ValueError("weight_zero_point needs an int8 weight: f8 is symmetric")
        check_tensor(
            "weight_zero_point",
            weight_zero_point,
            dtypes=(torch.int8,),
            shape=(n, 1),
            device=x.device,
        )
    if input_scale is not None:
        x_q = quantize_static(x, input_scale, input_zero_point, weight.dtype)
        x_scale = input_scale
    else:
        blockwise = is_blockwise(weight, weight_scale)
        x_q, x_scale = quantize_per_token(x, weight.dtype, BLOCK if blockwise else None)
        x_scale = x_scale.reshape(-1, x_scale.shape[-1])
    x_q = x_q.reshape(-1, k)
    shifted = weight_zero_point is not None
    out = scaled_mm(
        x_q,
        weight,
        x_scale,
        weight_scale,
        x_zero_point=input_zero_point,
        bias=None if shifted else bias,
        weight_sum=weight_sum,
        out_dtype=torch.float32 if shifted else x.dtype,
    )
    if weight_zero_point is not None:
        # W = (q - zero) * scale: the symmetric product less zero * sum over k of x.
        sums = x_q.sum(-1, keepdim=True, dtype=torch.int32)
        if input_zero_point is not None:
            sums = sums - k * input_zero_point.to(torch.int32)
        scaled_zero = weight_zero_point.float() * weight_scale.reshape(-1, 1)
        out = out - (sums.float() * x_scale) * scaled_zero.t()
        if bias is not None:
            out = out + bias.float()
        out = out.to(x.dtype)
    return out.reshape(*x.shape[:-1], n)


def _run(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if bound.spec.input_type is None:  # weight-only: nothing quantises x
        return F.linear(x, _plain(weight, scale, bound.spec).to(x.dtype), like(bias, x))
    return scaled_linear(
        x,
        weight,
        scale,
        input_scale=tensors.get("input_scale"),
        input_zero_point=tensors.get("input_zero_point"),
        weight_zero_point=tensors.get("weight_zero_point"),
        bias=bias,
        weight_sum=tensors.get("weight_sum"),
    )


def _plain(weight: torch.Tensor, scale: torch.Tensor, spec: WeightSpec) -> torch.Tensor:
    """f32 [N, K] of an 8-bit weight and its per-channel or block-wise scale."""
    if spec.block is not None:
        rows, columns = spec.block
        scale = scale.repeat_interleave(rows, 0)[: spec.n]
        scale = scale.repeat_interleave(columns, 1)[:, : spec.k]
    return weight.float() * scale


def _derived(bound: Binding, tensors: Tensors) -> dict[str, torch.Tensor]:
    if "input_zero_point" not in tensors:
        return {}
    return {"weight_sum": tensors["weight"].sum(1, dtype=torch.int32)}


def _takes(spec: WeightSpec) -> bool:
    """No kernel here makes a zero point for every token."""
    dynamic = spec.input_type is not None and "input_scale" not in dict(spec.side)
    return spec.input_symmetric or not dynamic


SCALED_MM = Kernel(
    "scaled-mm",
    _run,
    2e-2,
    activations.eight_bit,
    product=product_in_8_bits,
    derived=_derived,
    takes=_takes,
)
