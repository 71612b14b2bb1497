"""Int4 matmul of the ``xpu-w4a8`` layout: oneDNN on an Intel GPU, a reference everywhere else.

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

import importlib.util

import torch

from ctconvert.runtime.kernels._common import check_tensor

_FLOATS = (torch.float16, torch.bfloat16)


def xpu_kernels_available() -> bool:
    """Whether vLLM's oneDNN kernels are installed, so that XPU tensors take them.

    Loads ``vllm_xpu_kernels`` if it is installed and its ops are not registered yet.
    """
    if hasattr(torch.ops._xpu_C, "int4_gemm_w4a8"):
        return True
    if importlib.util.find_spec("vllm_xpu_kernels") is None:
        return False
    importlib.import_module("vllm_xpu_kernels._xpu_C")
    return hasattr(torch.ops._xpu_C, "int4_gemm_w4a8")


def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 with one scale for each token, as vLLM's XPU path computes it.

    The scale is max(abs(x)) / 127 in float32, at least 1e-5, rounded to x's dtype before x is
    divided by it.

    Args:
        x: f16 or bf16 [..., K].

    Returns:
        q i8 [..., K] and scale [..., 1] in x's dtype.
    """
    largest = x.float().abs().amax(dim=-1, keepdim=True)
    scale = (largest / 127).clamp(min=1e-5).to(x.dtype)
    q = torch.round(x.float() / scale.float()).clamp(-128, 127).to(torch.int8)
    return q, scale


def _values(weight_packed: torch.Tensor, weight_zero_point: torch.Tensor) -> torch.Tensor:
    """q i32 [N, K] of packed words."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight_packed.device)
    codes = (weight_packed.unsqueeze(-1) >> shifts) & 15
    return codes.reshape(weight_packed.shape[0], -1) - weight_zero_point.int()


def int4_gemm_w4a8_reference(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
) -> torch.Tensor:
    """:func:`int4_gemm_w4a8` in plain torch."""
    n, k = weight_packed.shape[0], weight_packed.shape[1] * 8
    q, x_scale = quantize_activations(x.reshape(-1, k))
    groups = weight_scale.shape[0]
    # The integer sum of a group is exact in float32: at most 2**24 / (128 * 8) = 16384 columns
    # are summed at once.
    weight = _values(weight_packed, weight_zero_point).float()
    out = torch.zeros((q.shape[0], n), dtype=torch.float32, device=x.device)
    size = k // groups
    for group in range(groups):
        for start in range(group * size, (group + 1) * size, 16384):
            part = slice(start, min(start + 16384, (group + 1) * size))
            out += (q[:, part].float() @ weight[:, part].t()) * weight_scale[group].float()
    out *= x_scale.float()
    if bias is not None:
        out += bias.float()
    return out.to(torch.float16).reshape(*x.shape[:-1], n)


def int4_gemm_w4a16_reference(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
) -> torch.Tensor:
    """:func:`int4_gemm_w4a16` in plain torch."""
    size = weight_packed.shape[1] * 8 // weight_scale.shape[0]
    scale = weight_scale.t().float().repeat_interleave(size, dim=1)
    weight = _values(weight_packed, weight_zero_point).float() * scale
    out = x.float() @ weight.t()
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)


def _check(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> None:
    check_tensor("weight_packed", weight_packed, dtypes=(torch.int32,), shape=(None, None))
    n, k = weight_packed.shape[0], weight_packed.shape[1] * 8
    if n == 0 or n % 8 or k == 0:
        raise ValueError(
            f"weight_packed must be [N, K/8] with N a positive multiple of 8, got "
            f"{list(weight_packed.shape)}"
        )
    check_tensor("x", x, dtypes=_FLOATS, device=weight_packed.device)
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must have shape [..., {k}], got {list(x.shape)}")
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


def _group(weight_packed: torch.Tensor, group_size: int) -> int:
    """The group size oneDNN wants: K, not -1, where the scales are channel-wise."""
    return weight_packed.shape[1] * 8 if group_size == -1 else group_size


def onednn_w4a8(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """Call ``torch.ops._xpu_C.int4_gemm_w4a8``; arguments as for :func:`int4_gemm_w4a8`."""
    q, scale = quantize_activations(x.reshape(-1, x.shape[-1]))
    out: torch.Tensor = torch.ops._xpu_C.int4_gemm_w4a8(
        q,
        scale,
        torch.zeros_like(scale, dtype=torch.int32),
        weight_packed.t(),
        weight_scale.to(x.dtype),
        weight_zero_point,
        _group(weight_packed, group_size),
        None,
        bias.to(torch.float16) if bias is not None else None,
    )
    return out.reshape(*x.shape[:-1], weight_packed.shape[0])


def onednn_w4a16(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """Call ``torch.ops._xpu_C.int4_gemm_w4a16``; arguments as for :func:`int4_gemm_w4a16`."""
    out: torch.Tensor = torch.ops._xpu_C.int4_gemm_w4a16(
        x.reshape(-1, x.shape[-1]),
        weight_packed.t(),
        bias.to(x.dtype) if bias is not None else None,
        weight_scale.to(x.dtype),
        weight_zero_point,
        _group(weight_packed, group_size),
        None,
    )
    return out.to(x.dtype).reshape(*x.shape[:-1], weight_packed.shape[0])


@torch.library.custom_op("ctconvert::int4_gemm_w4a8", mutates_args=())
def _w4a8_op(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    _check(x, weight_packed, weight_scale, weight_zero_point, bias, group_size)
    arguments = (x, weight_packed, weight_scale, weight_zero_point, bias)
    if x.device.type == "xpu" and xpu_kernels_available():
        return onednn_w4a8(*arguments, group_size)
    return int4_gemm_w4a8_reference(*arguments, group_size=group_size)


@_w4a8_op.register_fake
def _(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    _check(x, weight_packed, weight_scale, weight_zero_point, bias, group_size)
    return x.new_empty((*x.shape[:-1], weight_packed.shape[0]), dtype=torch.float16)


@torch.library.custom_op("ctconvert::int4_gemm_w4a16", mutates_args=())
def _w4a16_op(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    _check(x, weight_packed, weight_scale, weight_zero_point, bias, group_size)
    arguments = (x, weight_packed, weight_scale, weight_zero_point, bias)
    if x.device.type == "xpu" and xpu_kernels_available():
        return onednn_w4a16(*arguments, group_size)
    return int4_gemm_w4a16_reference(*arguments, group_size=group_size)


@_w4a16_op.register_fake
def _(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    _check(x, weight_packed, weight_scale, weight_zero_point, bias, group_size)
    return x.new_empty((*x.shape[:-1], weight_packed.shape[0]))


def int4_gemm_w4a8(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
) -> torch.Tensor:
    """Int4 weight, int8 activations: the ``xpu-w4a8`` layout.

    x is quantised by :func:`quantize_activations`; a group's products are summed as integers,
    the groups in float32. On an XPU where :func:`xpu_kernels_available` says so this is oneDNN's
    ``int4_gemm_w4a8``, anywhere else :func:`int4_gemm_w4a8_reference`. The custom op is
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
    out: torch.Tensor = _w4a8_op(
        x, weight_packed, weight_scale, weight_zero_point, bias, group_size
    )
    return out


def int4_gemm_w4a16(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
) -> torch.Tensor:
    """Int4 weight, 16-bit activations: the ``xpu-w4a16`` layout.

    On an XPU where :func:`xpu_kernels_available` says so this is oneDNN's ``int4_gemm_w4a16``,
    anywhere else :func:`int4_gemm_w4a16_reference`, summed in float32. The custom op is
    ``ctconvert::int4_gemm_w4a16``. Arguments and errors are those of :func:`int4_gemm_w4a8`.

    Returns:
        [..., N] in x's dtype.
    """
    out: torch.Tensor = _w4a16_op(
        x, weight_packed, weight_scale, weight_zero_point, bias, group_size
    )
    return out
