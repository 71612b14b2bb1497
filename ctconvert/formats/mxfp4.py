"""``mxfp4-pack-quantized``: FP4 codes in groups of 32 with power-of-two scales.

Tensors of a module (N x K weight)::

    weight_packed  u8 [N, K/2]    two E2M1 codes a byte, the even k in the low nibble
    weight_scale   u8 [N, K/32]   E8M0: byte s means 2^(s - 127); 255 is NaN

Read as i32 words the bytes are K-packed 4-bit codes, which is what the logical weight holds.
Source: compressed-tensors, ``compressors/mxfp4/base.py``; the OCP Microscaling Formats
specification 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

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


class MXFP4Packed(Format):
    name = "mxfp4-pack-quantized"
    weight_name = "weight_packed"

    def spec(self, tensors: ModuleTensors, scheme: ModuleScheme) -> WeightSpec:
        args = weights_of(scheme, tensors)
        if (args.type, args.num_bits, args.group_size) != ("float", 4, 32):
            raise tensors.error(
                f"the config says {args.type}{args.num_bits} with group size {args.group_size}, "
                f"which {self.name} does not store"
            )
        if not args.symmetric:
            raise tensors.error("FP4 codes have no zero points, but the config says asymmetric")
        packed = tensors.check("weight_packed", ("U8",), rank=2)
        n, k = packed.shape[0], 2 * packed.shape[1]
        check_not_empty(tensors, n, k)
        scale = scale_spec(tensors, args, n, k, ("U8", "F8_E8M0"))
        return weight_spec(scheme, tensors, n=n, k=k, storage="packed", scale=scale)

    def parameter_names(self, spec: WeightSpec) -> tuple[str, ...]:
        return ("weight_packed", "weight_scale")

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        import torch

        scale = tensors["weight_scale"]
        nan = scale.view(torch.uint8) == _NAN
        if bool(nan.any()):
            row, column = nan.nonzero()[0].tolist()
            raise ValueError(f"weight_scale[{row}, {column}] is NaN; the source is damaged")
        codes = tensors["weight_packed"].view(torch.int32)
        return QuantizedWeight(spec, codes=codes, scale=scale, side=decode_side(tensors, spec))

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        assert weight.scale is not None
        return {
            "weight_packed": weight.codes.contiguous().view(torch.uint8),
            "weight_scale": weight.scale,
        }
