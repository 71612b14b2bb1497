"""Static INT8 fake-quantisation in plain torch."""

from __future__ import annotations

import torch


def fake_quant_int8_reference(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The definition in plain torch: x [...] f16/bf16, scale f32 [1] -> [...] in x's dtype."""
    s = scale.to(x.dtype)
    return torch.clamp(torch.round(x / s), -128, 127) * s
