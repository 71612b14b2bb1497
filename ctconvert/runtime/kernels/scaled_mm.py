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

import torch

from ctconvert.runtime.kernels._common import check_tensor

_INT8 = torch.int8
_FP8 = torch.float8_e4m3fn
_QUANTIZED = (_INT8, _FP8)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_F32 = (torch.float32,)
_BLOCK = 128
# Largest K for which sum((x_q - zero) * weight) cannot leave int32.
_MAX_INT8_K = 65536
_LARGEST = {_INT8: 127.0, _FP8: 448.0}


def _blocks(size: int) -> int:
    return -(-size // _BLOCK)


def _is_blockwise(weight: torch.Tensor, weight_scale: torch.Tensor) -> bool:
    """Whether the weight has a scale for each 128 x 128 block (and not one for each row)."""
    return weight_scale.dim() == 2 and tuple(weight_scale.shape) != (weight.shape[0], 1)


# --- quantisation of the activations ----------------------------------------------------------


def _to_quantized(
    scaled: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Round x / scale (float32) to ``dtype``, half to even; NaN becomes 0 where it has no place."""
    if dtype == _FP8:
        return scaled.clamp(-448.0, 448.0).to(_FP8)
    rounded = torch.nan_to_num(scaled, nan=0.0).clamp(-512.0, 512.0).round()
    if zero is not None:
        rounded = rounded + zero.float()
    return rounded.clamp(-128.0, 127.0).to(_INT8)


def quantize_per_token_reference(
    x: torch.Tensor, dtype: torch.dtype, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_per_token` in plain torch."""
    k = x.shape[-1]
    size = group_size or max(k, 1)
    groups = -(-k // size)
    values = torch.nn.functional.pad(x.float(), (0, groups * size - k))
    values = values.reshape(*x.shape[:-1], groups, size)
    largest = torch.nan_to_num(values.abs(), nan=torch.inf, posinf=torch.inf).amax(-1, keepdim=True)
    # In a tensor: CUDA multiplies by the reciprocal of a plain number, which is another scale.
    scale = largest / largest.new_tensor(_LARGEST[dtype])
    scale = torch.where(scale == 0, 1.0, scale)
    quantized = _to_quantized(values / scale, None, dtype)
    quantized = quantized.reshape(*x.shape[:-1], groups * size)[..., :k].contiguous()
    return quantized, scale.squeeze(-1)


def quantize_static_reference(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """:func:`quantize_static` in plain torch."""
    return _to_quantized(x.float() / scale, zero_point, dtype)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _QUANTIZED:
        raise TypeError(f"dtype must be int8 or float8_e4m3fn, got {dtype}")


def _check_per_token(x: torch.Tensor, dtype: torch.dtype, group_size: int | None) -> int:
    """Check the arguments; return the number of groups of a token."""
    _check_dtype(dtype)
    check_tensor("x", x, dtypes=_FLOATS)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., K] with K > 0, got {list(x.shape)}")
    if group_size is not None and group_size <= 0:
        raise ValueError(f"group_size must be positive or None, got {group_size}")
    return 1 if group_size is None else -(-x.shape[-1] // group_size)


@torch.library.custom_op("ctconvert::quantize_per_token", mutates_args=())
def _quantize_per_token_op(
    x: torch.Tensor, dtype: torch.dtype, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_per_token(x, dtype, group_size)
    if x.device.type == "cpu":
        return quantize_per_token_reference(x, dtype, group_size)
    from ctconvert.runtime.kernels import scaled_mm_triton

    return scaled_mm_triton.quantize_per_token(x, dtype, group_size)


@_quantize_per_token_op.register_fake
def _(
    x: torch.Tensor, dtype: torch.dtype, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = _check_per_token(x, dtype, group_size)
    scale = x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)
    return torch.empty_like(x, dtype=dtype), scale


def quantize_per_token(
    x: torch.Tensor, dtype: torch.dtype, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
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
    q, scale = _quantize_per_token_op(x, dtype, group_size)
    return q, scale


def _check_static(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, dtype: torch.dtype
) -> None:
    _check_dtype(dtype)
    check_tensor("x", x, dtypes=_FLOATS)
    check_tensor("scale", scale, dtypes=_F32, shape=(1,), device=x.device)
    if zero_point is not None:
        if dtype != _INT8:
            raise ValueError("zero_point needs dtype int8: f8 is symmetric")
        check_tensor("zero_point", zero_point, dtypes=(_INT8,), shape=(1,), device=x.device)


@torch.library.custom_op("ctconvert::quantize_static", mutates_args=())
def _quantize_static_op(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    _check_static(x, scale, zero_point, dtype)
    if x.device.type == "cpu":
        return quantize_static_reference(x, scale, zero_point, dtype)
    from ctconvert.runtime.kernels import scaled_mm_triton

    return scaled_mm_triton.quantize_static(x, scale, zero_point, dtype)


@_quantize_static_op.register_fake
def _(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    _check_static(x, scale, zero_point, dtype)
    return torch.empty_like(x, dtype=dtype)


def quantize_static(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    dtype: torch.dtype = torch.int8,
) -> torch.Tensor:
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
    q: torch.Tensor = _quantize_static_op(x, scale, zero_point, dtype)
    return q


# --- matmul -----------------------------------------------------------------------------------


def scaled_mm_reference(
    x_q: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    x_zero_point: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """:func:`scaled_mm` in plain torch. ``weight_sum`` is not needed here."""
    n, k = weight.shape
    if _is_blockwise(weight, weight_scale):
        rows = weight_scale.repeat_interleave(_BLOCK, dim=0)[:n]
        out = torch.zeros((x_q.shape[0], n), dtype=torch.float32, device=x_q.device)
        for block in range(_blocks(k)):
            part = slice(block * _BLOCK, (block + 1) * _BLOCK)
            product = x_q[:, part].float() @ weight[:, part].float().t()
            x_part = x_scale[:, block : block + 1] if x_scale.numel() > x_q.shape[0] else x_scale
            out += product * x_part * rows[:, block]
    else:
        if weight.dtype == _INT8:
            # float64 holds every int32 sum exactly, and has a matmul on every device.
            values = x_q.double()
            if x_zero_point is not None:
                values = values - x_zero_point.double()
            product = (values @ weight.double().t()).float()
        else:
            product = x_q.float() @ weight.float().t()
        out = product * x_scale * weight_scale.reshape(1, -1)
    if bias is not None:
        out += bias.float()
    return out.to(out_dtype)


def _check_mm(
    x_q: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    if out_dtype not in _FLOATS:
        raise TypeError(f"out_dtype must be float16, bfloat16 or float32, got {out_dtype}")
    check_tensor("x_q", x_q, dtypes=_QUANTIZED, shape=(None, None))
    device = x_q.device
    m, k = x_q.shape
    check_tensor("weight", weight, dtypes=(x_q.dtype,), shape=(None, k), device=device)
    n = weight.shape[0]
    int8 = weight.dtype == _INT8
    if int8 and k > _MAX_INT8_K:
        raise ValueError(f"weight has K = {k}; above {_MAX_INT8_K} an int32 sum could overflow")
    check_tensor("weight_scale", weight_scale, dtypes=_F32, device=device)
    shape = tuple(weight_scale.shape)
    blockwise = not int8 and shape == (_blocks(n), _blocks(k))
    if shape not in ((1,), (n, 1)) and not blockwise:
        wanted = f"[1] or [{n}, 1]" + ("" if int8 else f" or [{_blocks(n)}, {_blocks(k)}]")
        raise ValueError(f"weight_scale must have shape {wanted}, got {list(shape)}")
    check_tensor("x_scale", x_scale, dtypes=_F32, device=device)
    shape = tuple(x_scale.shape)
    if shape not in ((1,), (m, 1)) and not (blockwise and shape == (m, _blocks(k))):
        wanted = f"[1] or [{m}, 1]" + (f" or [{m}, {_blocks(k)}]" if blockwise else "")
        raise ValueError(f"x_scale must have shape {wanted}, got {list(shape)}")
    if x_zero_point is not None:
        if not int8:
            raise ValueError("x_zero_point needs an int8 weight: f8 is symmetric")
        check_tensor("x_zero_point", x_zero_point, dtypes=(_INT8,), shape=(1,), device=device)
        if x_scale.dim() != 1:
            raise ValueError("x_zero_point needs a static x_scale of shape [1]")
    if bias is not None:
        check_tensor("bias", bias, dtypes=_FLOATS, shape=(n,), device=device)
    if weight_sum is not None:
        check_tensor("weight_sum", weight_sum, dtypes=(torch.int32,), shape=(n,), device=device)


@torch.library.custom_op("ctconvert::scaled_mm", mutates_args=())
def _scaled_mm_op(
    x_q: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    _check_mm(x_q, weight, x_scale, weight_scale, x_zero_point, bias, weight_sum, out_dtype)
    if x_q.device.type == "cpu":
        return scaled_mm_reference(
            x_q,
            weight,
            x_scale,
            weight_scale,
            x_zero_point=x_zero_point,
            bias=bias,
            out_dtype=out_dtype,
        )
    from ctconvert.runtime.kernels import scaled_mm_triton

    if x_zero_point is not None and weight_sum is None:
        weight_sum = weight.sum(dim=1, dtype=torch.int32)
    return scaled_mm_triton.scaled_mm(
        x_q, weight, x_scale, weight_scale, x_zero_point, bias, weight_sum, out_dtype
    )


@_scaled_mm_op.register_fake
def _(
    x_q: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    _check_mm(x_q, weight, x_scale, weight_scale, x_zero_point, bias, weight_sum, out_dtype)
    return x_q.new_empty((x_q.shape[0], weight.shape[0]), dtype=out_dtype)


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
) -> torch.Tensor:
    """Matmul of quantised activations and weight, scaled: the ``scaled-mm`` layout.

    The custom op is ``ctconvert::scaled_mm``. On a CPU it is :func:`scaled_mm_reference`;
    elsewhere a Triton kernel, or torch's own product where that was measured faster (see
    ``scaled_mm_triton.py``).

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
    out: torch.Tensor = _scaled_mm_op(
        x_q, weight, x_scale, weight_scale, x_zero_point, bias, weight_sum, out_dtype
    )
    return out


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
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must have shape [..., {k}], got {list(x.shape)}")
    if weight_zero_point is not None:
        if weight.dtype != _INT8:
            raise ValueError("weight_zero_point needs an int8 weight: f8 is symmetric")
        check_tensor(
            "weight_zero_point", weight_zero_point, dtypes=(_INT8,), shape=(n, 1), device=x.device
        )
    if input_scale is not None:
        x_q = quantize_static(x, input_scale, input_zero_point, weight.dtype)
        x_scale = input_scale
    else:
        blockwise = _is_blockwise(weight, weight_scale)
        x_q, x_scale = quantize_per_token(x, weight.dtype, _BLOCK if blockwise else None)
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
