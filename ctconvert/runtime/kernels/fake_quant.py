"""Static per-tensor INT8 fake-quantisation of activations.

Before: x [...] f16 or bf16, any shape, contiguous; scale f32 [1].
After:  the same shape and dtype, every value on the grid s * {-128, ..., 127}.

``fq(x) = clamp(round_half_even(x / s), -128, 127) * s``, every step in x's dtype, with s cast to
it first: what compressed-tensors computes for a static INT8 activation scheme. One pass over x;
the GEMM of ``wna16`` fuses it where that is cheaper than a pass of its own.
"""

from __future__ import annotations

import torch

from ctconvert.runtime.kernels._common import check_tensor

__all__ = ["ACTIVATION_DTYPES", "fake_quant_int8", "fake_quant_int8_reference"]

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16)


def fake_quant_int8_reference(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The definition in plain torch: x [...] f16/bf16, scale f32 [1] -> [...] in x's dtype."""
    s = scale.to(x.dtype)
    return torch.clamp(torch.round(x / s), -128, 127) * s


def _check(x: torch.Tensor, scale: torch.Tensor) -> None:
    check_tensor("x", x, dtypes=ACTIVATION_DTYPES)
    check_tensor("scale", scale, dtypes=(torch.float32,), shape=(1,), device=x.device)


def _fake_quant_int8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    _check(x, scale)
    if x.device.type == "cpu":
        return fake_quant_int8_reference(x, scale)
    from ctconvert.runtime.kernels import fake_quant_triton

    return fake_quant_triton.fake_quant(x, scale)


def _fake(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    _check(x, scale)
    return torch.empty_like(x)


# Defined straight in the dispatcher: the custom_op decorator costs several microseconds a call
# more, which a 10 microsecond kernel would feel outside a CUDA graph.
_LIBRARY = torch.library.Library("ctconvert", "FRAGMENT")
_LIBRARY.define("fake_quant_int8(Tensor x, Tensor scale) -> Tensor")
_LIBRARY.impl("fake_quant_int8", _fake_quant_int8, "CompositeExplicitAutograd")
torch.library.register_fake("ctconvert::fake_quant_int8", _fake, lib=_LIBRARY)


def fake_quant_int8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round x to the static INT8 grid of one scale and back; the dtype stays.

    x: [...] f16 or bf16, contiguous. scale: f32 [1], same device. Returns a new tensor like x.
    Inference only: there is no gradient. Semantics: the module docstring.
    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or memory layout.
    """
    return torch.ops.ctconvert.fake_quant_int8(x, scale)
