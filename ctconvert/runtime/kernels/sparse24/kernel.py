"""2:4 sparse matmul on the layout ``cutlass-sparse24`` (SM90, CUTLASS 3.x).

Before, in the layout (N = output features, K = input features, Np = N rounded up to 64,
Kp = K rounded up to 128):

- ``weight`` [N, K/2]: the two values kept of every four columns, in column order; f16, bf16, i8
  or f8_e4m3
- ``meta`` u8 [Np, Kp/8]: a nibble ``i0 | i1 << 2`` for every four columns, in the compressed
  metadata order of CUTLASS's SM90 kernels
- ``weight_scale`` f32 [N, 1] (8-bit weights) or [1]
- ``x`` [M, K] in the weight's dtype, ``x_scale`` f32 [M, 1] (per token) or [1] (static)

After: ``out`` [M, N] f16 or bf16 = ``x_scale * (weight_scale * (x @ W^T)) + bias``.

The kernel is CUTLASS's sparse warp-specialised GEMM with our epilogue (``sparse24.cu``), compiled
at first use, one library for each element type and output type. It accumulates in f32, for i8 in
i32. f8_e4m3 products are accumulated by the tensor cores alone, as ``torch._scaled_mm`` does with
``use_fast_accum=True``: they keep fewer bits than an f32 between steps.
"""

from __future__ import annotations

import torch

from ctconvert.runtime import activations
from ctconvert.runtime.kernels.base import (
    SPARSE,
    Binding,
    Kernel,
    Tensors,
    like,
    product_in_8_bits,
)
from ctconvert.runtime.kernels.ops import Result, check_tensor, op
from ctconvert.runtime.kernels.quantize.kernel import quantize_per_token, quantize_static
from ctconvert.runtime.kernels.sparse24.reference import sparse24_mm_reference
from ctconvert.specs import WeightSpec

_WEIGHTS = (torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
_OUT_DTYPES = (torch.float16, torch.bfloat16)


@op(sparse24_mm_reference, "ctconvert.runtime.kernels.sparse24.cutlass:sparse24_mm")
def sparse24_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    meta: torch.Tensor,
    *,
    k: int,
    weight_scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype,
) -> Result:
    """``x @ W^T`` for a 2:4 sparse W, with scales and bias in the kernel's epilogue.

    ``weight`` and ``meta`` are as in the module's docstring. The registered op is
    ``ctconvert::sparse24_mm``; on the CPU it runs the reference. The first call on a GPU compiles
    the kernels of its types (about a minute) and keeps them in the user's cache.

    Args:
        x: [M, K] in the weight's dtype (for i8 and f8_e4m3: already quantised).
        weight: [N, K/2], f16, bf16, i8 or f8_e4m3.
        meta: u8 [Np, Kp/8].
        k: K, which neither ``weight`` nor ``meta`` tells where it is padded.
        weight_scale: f32 [N, 1] or [1]; None is 1.
        x_scale: f32 [M, 1] or [1]; None is 1.
        bias: [N] in ``out_dtype``.
        out_dtype: torch.float16 or torch.bfloat16.

    Returns:
        [M, N] in ``out_dtype``.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device, a stride or an alignment does not fit. N must be a multiple
            of 8, K of 16 (16-bit weights) or 32 (8-bit), which is what the copy engine needs. The
            reference also looks at the metadata themselves.
        KernelUnavailableError: on a GPU that is not SM90, or without nvcc or the package
            ``nvidia-cutlass``.
    """
    check_tensor("weight", weight, dtypes=_WEIGHTS, shape=(None, None))
    n, multiple = weight.shape[0], 32 // weight.element_size()
    if k <= 0 or k % multiple or n <= 0 or n % 8:
        raise ValueError(
            f"N = {n}, K = {k}: the kernel needs N a multiple of 8 and, for {weight.dtype}, "
            f"K a multiple of {multiple}"
        )
    if out_dtype not in _OUT_DTYPES:
        raise TypeError(f"out_dtype is {out_dtype}; the result is float16 or bfloat16")
    device = x.device
    check_tensor("x", x, dtypes=(weight.dtype,), shape=(None, k))
    check_tensor("weight", weight, dtypes=(x.dtype,), shape=(n, k // 2), device=device)
    meta_shape = (-(-n // 64) * 64, -(-k // 128) * 16)
    check_tensor("meta", meta, dtypes=(torch.uint8,), shape=meta_shape, device=device)
    for name, scale, rows in (("weight_scale", weight_scale, n), ("x_scale", x_scale, x.shape[0])):
        if scale is not None:
            shape = (1,) if scale.dim() == 1 else (rows, 1)
            check_tensor(name, scale, dtypes=(torch.float32,), shape=shape, device=device)
    if bias is not None:
        check_tensor("bias", bias, dtypes=(out_dtype,), shape=(n,), device=device)
    return Result((x.shape[0], n), out_dtype)


def sparse24_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    meta: torch.Tensor,
    *,
    k: int,
    weight_scale: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A linear layer on the layout: quantises the activations as it asks, then :func:`sparse24_mm`.

    8-bit weights: x becomes ``round(x / s)`` in i8 (half to even, clamped to -128..127) or
    ``x / s`` in f8_e4m3 (clamped to +-448), where s is ``input_scale`` or, where that is None, per
    token the largest magnitude over 127 or 448. 16-bit weights: x is used as it is, and
    ``input_scale``, which the layout stores as ones, is not.

    Args:
        x: f16 or bf16 [..., K].
        weight, meta, k, weight_scale, bias: as for :func:`sparse24_mm`.
        input_scale: f32 [1], or None for dynamic per-token scales.
        out_dtype: torch.float16 or torch.bfloat16; x's dtype by default.

    Returns:
        [..., N] in ``out_dtype``.

    Raises:
        TypeError, ValueError, KernelUnavailableError: as :func:`sparse24_mm`.
    """
    if x.dtype not in _OUT_DTYPES:
        raise TypeError(f"x is {x.dtype}; activations are f16 or bf16")
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x is {list(x.shape)}; its last dimension must be K = {k}")
    if input_scale is not None and (
        tuple(input_scale.shape) != (1,) or input_scale.dtype != torch.float32
    ):
        raise ValueError(
            f"input_scale is {input_scale.dtype} {list(input_scale.shape)}; it is f32 [1]"
        )
    flat, x_scale = x.reshape(-1, k), None
    if weight.element_size() == 1:
        if input_scale is None:
            flat, x_scale = quantize_per_token(flat.contiguous(), weight.dtype)
        else:
            flat = quantize_static(flat.contiguous(), input_scale, None, weight.dtype)
            x_scale = input_scale
    out = sparse24_mm(
        flat.contiguous(),
        weight,
        meta,
        k=k,
        weight_scale=weight_scale,
        x_scale=x_scale,
        bias=bias,
        out_dtype=out_dtype or x.dtype,
    )
    return out.view(*x.shape[:-1], weight.shape[0])


def _run(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return sparse24_linear(
        x,
        tensors["weight"],
        tensors["meta"],
        k=bound.spec.k,
        weight_scale=tensors["weight_scale"],
        input_scale=tensors.get("input_scale"),
        bias=like(bias, x),
    )


def _product(spec: WeightSpec) -> str:
    return f"{product_in_8_bits(spec)}{SPARSE}"


CUTLASS_SPARSE24 = Kernel("cutlass-sparse24", _run, 2e-2, activations.eight_bit, product=_product)
