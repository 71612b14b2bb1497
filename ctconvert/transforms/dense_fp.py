"""The dense weights of NVFP4, MXFP8 and FP8: what every kernel of theirs must agree with."""

from __future__ import annotations

import torch

from ctconvert.specs import QuantizedWeight

#: E2M1 values by code; bit 3 is the sign (OCP Microscaling Formats specification 1.0).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dense(weight: QuantizedWeight) -> torch.Tensor:
    """f32 [N, K] of a weight of family ``nvfp4``, ``mxfp8`` or FP8 ``w8a8``, on its device.

    Raises:
        ValueError: it is of another family.
    """
    family = weight.spec.family
    if family == "nvfp4":
        return dense_nvfp4(weight)
    if family == "mxfp8":
        return dense_mxfp8(weight)
    if family == "w8a8" and weight.spec.kind == "float":
        return dense_fp8(weight)
    raise ValueError(f"{weight.spec.label} weights of family {family} are made elsewhere")


def dense_nvfp4(weight: QuantizedWeight) -> torch.Tensor:
    """``code * (scale / global scale)``, the quotient and the product rounded once each."""
    codes = weight.codes.contiguous().view(torch.uint8).to(torch.int64)
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=codes.device)
    values = torch.stack((table[codes & 15], table[codes >> 4]), 2).flatten(1)
    assert weight.scale is not None
    scale = weight.scale.float() / weight.side["weight_global_scale"]
    return values * scale.repeat_interleave(16, 1)


def dense_mxfp8(weight: QuantizedWeight) -> torch.Tensor:
    """``code * 2**(byte - 127)``: exact but for overflow."""
    assert weight.scale is not None
    exponent = weight.scale.view(torch.uint8).to(torch.int32) - 127
    return torch.ldexp(weight.codes.float(), exponent.repeat_interleave(32, 1))


def dense_fp8(weight: QuantizedWeight) -> torch.Tensor:
    """``code * scale``, rounded once; the scale per tensor, per channel or block-wise."""
    spec, scale = weight.spec, weight.scale
    assert scale is not None
    scale = scale.float()
    if spec.block is not None:
        rows, columns = spec.block
        scale = scale.repeat_interleave(rows, 0)[: spec.n]
        scale = scale.repeat_interleave(columns, 1)[:, : spec.k]
    return weight.codes.float() * scale
