"""The dense weight of a logical one: what every kernel must agree with."""

from __future__ import annotations

import torch

from ctconvert.specs import QuantizedWeight
from ctconvert.transforms.cuts import with_zeros
from ctconvert.transforms.packed import unpack

#: E2M1 values by code; bit 3 is the sign (OCP Microscaling Formats specification 1.0).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dense_weight(weight: QuantizedWeight) -> torch.Tensor:
    """f32 [N, K]: ``(code - zero) * scale``, each product rounded once.

    Args:
        weight: a logical weight of any scheme, on any device.
    """
    spec = weight.spec
    if spec.family == "mxfp4":
        codes = unpack(weight.codes, 4, spec.k)
        table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=codes.device)
        assert weight.scale is not None
        exponent = weight.scale.view(torch.uint8).to(torch.int32) - 127
        scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
        return table[codes.long()] * scale.repeat_interleave(32, 1)
    if spec.family == "nvfp4":
        return _dense_nvfp4(weight)
    if spec.family == "mxfp8":
        return _dense_mxfp8(weight)
    offset = 1 << (spec.bits - 1)
    if spec.storage == "packed":
        values = unpack(weight.codes, spec.bits, spec.k, spec.packing).float() - offset
    else:
        values = with_zeros(weight).codes.float()
    if weight.scale is None:
        return values
    columns = torch.arange(spec.k, device=values.device)
    if weight.g_idx is not None:
        index = weight.g_idx.long()
    elif spec.block is not None:
        index = columns // spec.block[1]
    else:
        index = columns // (spec.group_size or spec.k)
    if weight.zero_point is not None:
        values = values - (weight.zero_point.float() - offset)[:, index]
    scale = weight.scale.float()[:, index]
    if spec.block is not None:
        scale = scale.repeat_interleave(spec.block[0], 0)[: spec.n]
    return values * scale


def _dense_nvfp4(weight: QuantizedWeight) -> torch.Tensor:
    """``code * (scale / global scale)``, the quotient and the product rounded once each."""
    codes = weight.codes.contiguous().view(torch.uint8).to(torch.int64)
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=codes.device)
    values = torch.stack((table[codes & 15], table[codes >> 4]), 2).flatten(1)
    assert weight.scale is not None
    scale = weight.scale.float() / weight.side["weight_global_scale"]
    return values * scale.repeat_interleave(16, 1)


def _dense_mxfp8(weight: QuantizedWeight) -> torch.Tensor:
    """``code * 2**(byte - 127)``: exact but for overflow."""
    assert weight.scale is not None
    exponent = weight.scale.view(torch.uint8).to(torch.int32) - 127
    return torch.ldexp(weight.codes.float(), exponent.repeat_interleave(32, 1))
