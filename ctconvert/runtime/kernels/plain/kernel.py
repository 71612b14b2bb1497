"""Plain torch paths of ``machete``, ``w4a8-fp8``, ``cpu-w4a16``, ``cpu-w4a8`` and ``cpu-int8``.

Their kernels are not here: an engine's, for Hopper or for a CPU's AMX. What runs computes what the
kernel would of the tensors that it would read, on any device, so that a proof shows that they mean
the weight; it shows nothing of the kernel, and how fast it is says nothing of it.

The CPU kernels multiply u8 activations, x + 128, and take 128 times a sum that the layout holds out
again: so does this.
"""

from __future__ import annotations

import torch

from ctconvert.runtime import activations
from ctconvert.runtime.kernels.base import Binding, Kernel, Tensors, fake_quantised, padded
from ctconvert.runtime.kernels.plain import weights
from ctconvert.runtime.kernels.quantize.kernel import quantize_per_token


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ W.T + bias in float32; x [..., K] f32, W [N, K] f32."""
    out = x @ weight.t()
    return out if bias is None else out + bias.float()


def _weight_only(
    bound: Binding,
    tensors: Tensors,
    weight: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    def call(x: torch.Tensor) -> torch.Tensor:
        wide, wide_bias = padded(bound, x, bias)
        return _product(wide.float(), weight, wide_bias).to(x.dtype)[..., : bound.spec.n]

    return fake_quantised(call, tensors, x)


def _machete(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    weight = weights.machete(
        tensors["qweight"], tensors["scales"], tensors.get("zeros"), bound.spec.bits
    )
    return _weight_only(bound, tensors, weight, x, bias)


def _cpu_w4a16(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    weight = weights.cpu_w4a16(tensors["qweight"], tensors["scales"], tensors.get("qzeros"))
    return _weight_only(bound, tensors, weight, x, bias)


def _w4a8_fp8(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    weight = weights.w4a8_fp8(
        tensors["weight"], tensors["weight_chan_scale"], tensors["weight_scale"]
    )
    wide, wide_bias = padded(bound, x, bias)
    q, scale = quantize_per_token(wide, torch.float8_e4m3fn)
    out = _product(q.float() * scale, weight, wide_bias)
    return out.to(x.dtype)[..., : bound.spec.n]


def _cpu_w4a8(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    codes, sums = weights.cpu_w4a8(tensors["qweight"], tensors["qzeros"])
    scales = tensors["scales"].transpose(1, 2).flatten(0, 1)  # [N, K/G]
    wide, _ = padded(bound, x, None)
    q, x_scale = quantize_per_token(wide, torch.int8)
    columns = codes.shape[1] // sums.shape[1]
    out = torch.zeros((*x.shape[:-1], codes.shape[0]), device=x.device)
    for block in range(sums.shape[1]):
        part = slice(block * columns, (block + 1) * columns)
        # Exact in float32: no more than 128 products of 255 * 15.
        whole = (q[..., part].float() + 128) @ codes[:, part].float().t() - 128 * sums[:, block]
        out += whole * scales[:, block * scales.shape[1] // sums.shape[1]]
    out = (out * x_scale)[..., : bound.spec.n]
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _cpu_int8(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    values, sums = weights.cpu_int8(tensors["weight"])
    wide, _ = padded(bound, x, None)
    q, x_scale = quantize_per_token(wide, torch.int8)
    # Integers, exact in float64.
    whole = (q.double() + 128) @ values.double().t() - sums
    out = (whole.float() * x_scale * tensors["weight_scale"].t())[..., : bound.spec.n]
    return (out if bias is None else out + bias.float()).to(x.dtype)


# A zero point times its scale, rounded to 16 bits, is what Machete adds: of a group's weights that
# are all near zero that is more than their own rounding.
MACHETE = Kernel("machete", _machete, 3e-2, activations.fake_quantised, plain=True)
# The kernel's scales are FP8, rounded twice: 1/16 each.
W4A8_FP8 = Kernel("w4a8-fp8", _w4a8_fp8, 0.13, activations.dynamic_fp8, plain=True)
CPU_W4A16 = Kernel("cpu-w4a16", _cpu_w4a16, 1e-2, activations.fake_quantised, plain=True)
CPU_W4A8 = Kernel("cpu-w4a8", _cpu_w4a8, 1e-2, activations.dynamic_int8, plain=True)
CPU_INT8 = Kernel("cpu-int8", _cpu_int8, 1e-2, activations.dynamic_int8, plain=True)
