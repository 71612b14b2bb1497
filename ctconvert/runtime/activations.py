"""What a scheme makes of activations, in plain torch: the proof's side, which shares no code with
the kernels.

Each function takes the weight's spec, the layout's tensors and x [M, K] f16 or bf16, and returns
float64 [M, K].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)

from ctconvert.specs import WeightSpec

Tensors = Mapping[str, torch.Tensor]


def unchanged(spec: WeightSpec, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    """Weight-only schemes."""
    return x.double()


def fake_quantised(spec: WeightSpec, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    """Static INT8 fake quantisation, where ``input_scale`` is there."""
    scale = tensors.get("input_scale")
    return (x if scale is None else static_int8(x, scale)).double()


def static_int8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Fake quantisation in x's dtype, half to even."""
    step = scale.to(x.dtype)
    return (x / step).round().clamp(-128, 127) * step


def eight_bit(spec: WeightSpec, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    """INT8 or FP8 by a static scale, per token, or per token and the columns of a block.

    Unchanged where the scheme quantises no activations.
    """
    if spec.input_type is None or spec.scale_shape is None:
        return x.double()
    # The scheme's own steps, which are float32's: another precision would round some the other way.
    wide = x.float()
    # In a tensor: CUDA multiplies by the reciprocal of a plain number, which is another scale and
    # moves every quotient that lies between two codes to the same side.
    limit = wide.new_tensor(127.0 if spec.kind == "int" else 448.0)
    zero = torch.zeros((), device=x.device)
    if "input_scale" in tensors:
        scale = tensors["input_scale"]
        zero = tensors["input_zero_point"].float() if "input_zero_point" in tensors else zero
    else:
        rows = wide if spec.block is None else _blocks(wide, spec.block[1])
        scale = rows.abs().amax(-1, keepdim=True) / limit
        scale = torch.where(scale > 0, scale, 1.0)
        if spec.block is not None:
            scale = scale.expand_as(rows).flatten(-2)[:, : spec.k]
    if spec.kind == "int":
        codes = ((wide / scale).round() + zero).clamp(-128, 127) - zero
    else:
        codes = (wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.double() * scale.double()


def _blocks(x: torch.Tensor, columns: int) -> torch.Tensor:
    padded = F.pad(x, (0, -x.shape[-1] % columns))
    return padded.unflatten(-1, (-1, columns))


def token_int8(spec: WeightSpec, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    """INT8 a token, its scale rounded to x's dtype: what the caller of vLLM's XPU kernel makes."""
    scale = (x.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-5).to(x.dtype)
    return (x.float() / scale.float()).round().clamp(-128, 127).double() * scale.double()


def dynamic_int8(spec: WeightSpec, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    """INT8 a token, its scale float32: of a kernel that has no other, whatever the scheme says."""
    wide = x.float()
    scale = _token_scale(wide, 127.0)
    return (wide / scale).round().double() * scale.double()


def dynamic_fp8(spec: WeightSpec, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    """FP8 a token, its scale float32."""
    wide = x.float()
    scale = _token_scale(wide, 448.0)
    return (wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()


def _token_scale(wide: torch.Tensor, limit: float) -> torch.Tensor:
    scale = wide.abs().amax(-1, keepdim=True) / wide.new_tensor(limit)  # see eight_bit
    return torch.where(scale > 0, scale, 1.0)
