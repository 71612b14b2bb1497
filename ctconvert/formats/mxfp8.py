"""``mxfp8-quantized``: FP8 codes in groups of 32 with power-of-two scales.

Tensors of a module (N x K weight)::

    weight        f8_e4m3 [N, K]
    weight_scale  u8 [N, K/32]    E8M0: byte s means 2^(s - 127); 255 is NaN

Source: compressed-tensors, ``compressors/mxfp8/base.py``; the OCP Microscaling Formats
specification 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ctconvert.formats.base import (
    Format,
    ModuleTensors,
    check_not_empty,
    decode_side,
    scale_spec,
    weight_spec,
    weights_of,
)
from ctconvert.formats.quantization import ModuleScheme
from ctconvert.specs import QuantizedWeight, WeightSpec

if TYPE_CHECKING:
    import torch

_NAN = 255


class MXFP8Quantized(Format):
    name = "mxfp8-quantized"
    weight_name = "weight"

    def spec(self, tensors: ModuleTensors, scheme: ModuleScheme) -> WeightSpec:
        args = weights_of(scheme, tensors)
        if (args.type, args.num_bits, args.group_size) != ("float", 8, 32):
            raise tensors.error(
                f"the config says {args.type}{args.num_bits} with group size {args.group_size}, "
                f"which {self.name} does not store"
            )
        if not args.symmetric:
            raise tensors.error("FP8 codes have no zero points, but the config says asymmetric")
        n, k = tensors.check("weight", ("F8_E4M3",), rank=2).shape
        check_not_empty(tensors, n, k)
        scale = scale_spec(tensors, args, n, k, ("U8", "F8_E8M0"))
        spec = weight_spec(
            scheme, tensors, n=n, k=k, storage="plain", scale=scale, element="F8_E4M3"
        )
        return replace(spec, family="mxfp8")

    def parameter_names(self, spec: WeightSpec) -> tuple[str, ...]:
        return ("weight", "weight_scale")

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        import torch

        scale = tensors["weight_scale"]
        nan = scale.view(torch.uint8) == _NAN
        if bool(nan.any()):
            row, column = nan.nonzero()[0].tolist()
            raise ValueError(f"weight_scale[{row}, {column}] is NaN; the source is damaged")
        side = decode_side(tensors, spec)
        return QuantizedWeight(spec, codes=tensors["weight"], scale=scale, side=side)

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        assert weight.scale is not None
        return {"weight": weight.codes, "weight_scale": weight.scale}
