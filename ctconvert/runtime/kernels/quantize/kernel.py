"""8-bit quantisation of activations, per token or by one scale.

Before: x [..., K] f16, bf16 or f32. After: q [..., K] i8 or f8_e4m3 and, per token, its scales.
"""

from __future__ import annotations

import torch

from ctconvert.runtime.kernels.ops import Result, check_tensor, op
from ctconvert.runtime.kernels.quantize.reference import (
    quantize_per_token_reference,
    quantize_static_reference,
)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _check(x: torch.Tensor, dtype: torch.dtype) -> None:
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        raise TypeError(f"dtype must be int8 or float8_e4m3fn, got {dtype}")
    check_tensor("x", x, dtypes=_FLOATS)


@op(quantize_per_token_reference, "ctconvert.runtime.kernels.quantize.triton:quantize_per_token")
def quantize_per_token(
    x: torch.Tensor, dtype: torch.dtype, group_size: int | None = None
) -> tuple[Result, Result]:
    """Quantise symmetrically with a scale for each token, or for each group of its columns.

    scale = max(abs(x)) / 127 (int8) or / 448 (f8), 1 where all are 0; q = round(x / scale), half
    to even, in float32. A NaN or an infinity makes its scale infinite, and so the product NaN.
    The custom op is ``ctconvert::quantize_per_token``.

    Args:
        x: f16, bf16 or f32 [..., K].
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.
        group_size: columns that share a scale (the last group may be shorter); None: all.

    Returns:
        q [..., K] of ``dtype`` and scale f32 [..., 1], or [..., ceil(K / group_size)].

    Raises:
        TypeError: a dtype the kernel does not take.
        ValueError: x has no columns or is not contiguous, or ``group_size`` is not positive.
    """
    _check(x, dtype)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., K] with K > 0, got {list(x.shape)}")
    if group_size is not None and group_size <= 0:
        raise ValueError(f"group_size must be positive or None, got {group_size}")
    groups = 1 if group_size is None else -(-x.shape[-1] // group_size)
    return Result(x.shape, dtype), Result((*x.shape[:-1], groups), torch.float32)


@op(quantize_static_reference, "ctconvert.runtime.kernels.quantize.triton:quantize_static")
def quantize_static(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    dtype: torch.dtype = torch.int8,
) -> Result:
    """Quantise with one given scale: q = clamp(round(x / scale) + zero_point), half to even.

    The quotient is a float32; f8 is clamped to -448..448. The custom op is
    ``ctconvert::quantize_static``.

    Args:
        x: f16, bf16 or f32, any shape.
        scale: f32 [1].
        zero_point: i8 [1], int8 only, or None.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.

    Returns:
        q of x's shape and ``dtype``.

    Raises:
        TypeError: a dtype the kernel does not take.
        ValueError: a wrong shape or device, a tensor that is not contiguous, or a zero point
            with f8.
    """
    _check(x, dtype)
    check_tensor("scale", scale, dtypes=(torch.float32,), shape=(1,), device=x.device)
    if zero_point is not None:
        if dtype != torch.int8:
            raise ValueError("zero_point needs dtype int8: f8 is symmetric")
        check_tensor("zero_point", zero_point, dtypes=(torch.int8,), shape=(1,), device=x.device)
    return Result(x.shape, dtype)
