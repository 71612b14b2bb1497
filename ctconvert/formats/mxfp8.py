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

from ctconvert.formats.base import (
    Format,
    ModuleTensors,
    check_not_empty,
    decode_side,
    scale_spec,
    storage_of,
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
        fields = storage_of(scheme, tensors)
        if (fields["kind"], fields["bits"], fields["group_size"]) != ("float", 8, 32):
            raise tensors.error(
                f"the config says {fields['kind']}{fields['bits']} with group size "
                f"{fields['group_size']}, which {self.name} does not store"
            )
        if not fields["symmetric"]:
            raise tensors.error("FP8 codes have no zero points, but the config says asymmetric")
        n, k = tensors.check("weight", ("F8_E4M3",), rank=2).shape
        check_not_empty(tensors, n, k)
        scale_dtype, scale_shape = scale_spec(tensors, fields, n, k, ("U8", "F8_E8M0"))
        return WeightSpec(
            format=self.name,
            n=n,
            k=k,
            storage="plain",
            element="F8_E4M3",
            scale_dtype=scale_dtype,
            scale_shape=scale_shape,
            **fields | {"family": "mxfp8"},
        )

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
