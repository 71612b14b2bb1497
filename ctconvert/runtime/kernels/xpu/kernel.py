"""Int4 matmuls of the XPU layouts: oneDNN on an Intel GPU, a reference everywhere else.

Before (N = output features, K = input features, G = group size):

    weight_packed      i32 [N, K/8]   word c of row n holds q + 8 of columns 8c..8c+7, low first
    weight_scale       [K/G, N]
    weight_zero_point  i8 [1] = 8

After: out[m, n] = sum over k of x[m, k] * q[n, k] * weight_scale[k // G, n] + bias[n]. W4A8 first
quantises x to int8 with one symmetric scale for each token, and gives f16; W4A16 takes x as it
is and gives its dtype.

On an XPU with vLLM's ``vllm-xpu-kernels`` installed the ops are ``torch.ops._xpu_C``'s
(``csrc/xpu/torch_bindings.cpp`` and ``csrc/xpu/onednn/int4_gemm_w4a8.h`` there):

    int4_gemm_w4a8(Tensor A_, Tensor A_scale, Tensor A_zp, Tensor B, Tensor B_scale, Tensor B_zp,
                   int group_size, Tensor? g_idx, Tensor? bias) -> Tensor
    int4_gemm_w4a16(Tensor A, Tensor B, Tensor? bias, Tensor B_scale, Tensor B_zp, int group_size,
                    Tensor? g_idx) -> Tensor

B is ``weight_packed.t()``, a stride and not a copy: the kernel wants K outermost but contiguous.
The activations are quantised as ``dynamic_per_token_int8_quant_ref`` of vLLM's ``_xpu_ops.py``
does, the caller of the kernel in ``XPUW4A8IntLinearKernel``.
"""

from __future__ import annotations

import torch

from ctconvert.runtime import activations
from ctconvert.runtime.kernels.base import Binding, Kernel, Tensors, fake_quantised, padded_rows
from ctconvert.runtime.kernels.ops import Result, check_last, check_tensor, op
from ctconvert.runtime.kernels.xpu.reference import (
    int4_gemm_w4a8_reference,
    int4_gemm_w4a16_reference,
)

_FLOATS = (torch.float16, torch.bfloat16)


def _check(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> tuple[int, ...]:
    """The shape of the result.

    Raises:
        TypeError, ValueError: as :func:`int4_gemm_w4a8`.
    """
    check_tensor("weight_packed", weight_packed, dtypes=(torch.int32,), shape=(None, None))
    n, k = weight_packed.shape[0], weight_packed.shape[1] * 8
    if n == 0 or n % 8 or k == 0:
        raise ValueError(
            f"weight_packed must be [N, K/8] with N a positive multiple of 8, got "
            f"{list(weight_packed.shape)}"
        )
    check_tensor("x", x, dtypes=_FLOATS, device=weight_packed.device)
    check_last("x", x, k)
    size = k if group_size == -1 else group_size
    if size != k and (size <= 0 or size % 32 or k % size):
        raise ValueError(
            f"group_size must be -1 or {k} (channel-wise) or a multiple of 32 that divides {k}, "
            f"got {group_size}"
        )
    scales = (torch.float16, torch.bfloat16, torch.float32)
    check_tensor("weight_scale", weight_scale, dtypes=scales, shape=(k // size, n), device=x.device)
    check_tensor(
        "weight_zero_point", weight_zero_point, dtypes=(torch.int8,), shape=(1,), device=x.device
    )
    if bias is not None:
        check_tensor("bias", bias, dtypes=(*_FLOATS, torch.float32), shape=(n,), device=x.device)
    return (*x.shape[:-1], n)


@op(int4_gemm_w4a8_reference, "ctconvert.runtime.kernels.xpu.onednn:int4_gemm_w4a8")
def int4_gemm_w4a8(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
) -> Result:
    """Int4 weight, int8 activations: the ``xpu-w4a8`` layout.

    x is quantised by ``quantize_activations``; a group's products are summed as integers,
    the groups in float32. On an XPU where ``xpu_kernels_available`` says so this is oneDNN's
    ``int4_gemm_w4a8``, anywhere else ``int4_gemm_w4a8_reference``. The custom op is
    ``ctconvert::int4_gemm_w4a8``.

    Args:
        x: f16 or bf16 [..., K].
        weight_packed: i32 [N, K/8] contiguous, N a multiple of 8.
        weight_scale: f16, bf16 or f32 [K/G, N]; one row is channel-wise.
        weight_zero_point: i8 [1], 8 in this layout.
        bias: [N], or None.
        group_size: G, a multiple of 32 that divides K; -1 or K: channel-wise.

    Returns:
        f16 [..., N], whatever x's dtype: the kernel's result type.

    Raises:
        TypeError: an argument has a dtype the kernel does not take.
        ValueError: an argument has a wrong shape or device or is not contiguous, or a group size
            the kernel does not take.
    """
    shape = _check(x, weight_packed, weight_scale, weight_zero_point, bias, group_size)
    return Result(shape, torch.float16)


@op(int4_gemm_w4a16_reference, "ctconvert.runtime.kernels.xpu.onednn:int4_gemm_w4a16")
def int4_gemm_w4a16(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
) -> Result:
    """Int4 weight, 16-bit activations: the ``xpu-w4a16`` layout.

    On an XPU where ``xpu_kernels_available`` says so this is oneDNN's ``int4_gemm_w4a16``,
    anywhere else ``int4_gemm_w4a16_reference``, summed in float32. The custom op is
    ``ctconvert::int4_gemm_w4a16``. Arguments and errors are those of :func:`int4_gemm_w4a8`.

    Returns:
        [..., N] in x's dtype.
    """
    shape = _check(x, weight_packed, weight_scale, weight_zero_point, bias, group_size)
    return Result(shape, x.dtype)


def _run_w4a8(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    bias = padded_rows(bound, bias)
    out = int4_gemm_w4a8(x, *_weight(tensors), bias, group_size=bound.group_size).to(x.dtype)
    return out[..., : bound.spec.n]


def _run_w4a16(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    def call(x: torch.Tensor) -> torch.Tensor:
        out = int4_gemm_w4a16(
            x, *_weight(tensors), padded_rows(bound, bias), group_size=bound.group_size
        )
        return out[..., : bound.spec.n]

    return fake_quantised(call, tensors, x)


def _weight(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tensors["weight_packed"], tensors["weight_scale"], tensors["weight_zero_point"]


XPU_W4A8 = Kernel(
    "xpu-w4a8",
    _run_w4a8,
    1e-2,
    activations.token_int8,
    product=lambda spec: "int8",
    result=torch.float16,
)
XPU_W4A16 = Kernel("xpu-w4a16", _run_w4a16, 1e-2, activations.fake_quantised)
