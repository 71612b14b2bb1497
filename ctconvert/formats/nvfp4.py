"""``nvfp4-pack-quantized``: FP4 codes in groups of 16, FP8 scales and one divisor for all.

Tensors of a module (N x K weight)::

    weight_packed        u8 [N, K/2]        two E2M1 codes a byte, the even k in the low nibble
    weight_scale         f8_e4m3 [N, K/16]
    weight_global_scale  f32 [1]            W = code * weight_scale / weight_global_scale
    input_global_scale   f32 [1]            the same for the activations, where they are quantised

Read as i32 words the codes' bytes are K-packed 4-bit codes, which is what the logical weight holds.
The global scales are side scales of it: weights with different ones cannot be joined. An
``input_global_scale`` of 0 was never calibrated and is not in use.

Source: compressed-tensors, ``compressors/nvfp4/base.py``, and ``generate_gparam``.
"""

from __future__ import annotations

import math
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
from ctconvert.specs import Dtype, QuantizedWeight, WeightSpec

if TYPE_CHECKING:
    import torch


class NVFP4Packed(Format):
    name = "nvfp4-pack-quantized"
    weight_name = "weight_packed"

    def spec(self, tensors: ModuleTensors, scheme: ModuleScheme) -> WeightSpec:
        args = weights_of(scheme, tensors)
        if (args.type, args.num_bits, args.group_size) != ("float", 4, 16):
            raise tensors.error(
                f"the config says {args.type}{args.num_bits} with group size {args.group_size}, "
                f"which {self.name} does not store"
            )
        if not args.symmetric:
            raise tensors.error("FP4 codes have no zero points, but the config says asymmetric")
        packed = tensors.check("weight_packed", ("U8",), rank=2)
        n, k = packed.shape[0], 2 * packed.shape[1]
        check_not_empty(tensors, n, k)
        scale = scale_spec(tensors, replace(args, strategy="group"), n, k, ("F8_E4M3",))
        spec = weight_spec(scheme, tensors, n=n, k=k, storage="packed", scale=scale)
        side: list[tuple[str, Dtype]] = [*spec.side]
        if not _global_scale(tensors, "weight_global_scale"):
            raise tensors.error("weight_global_scale is 0; it is a divisor")
        side.append(("weight_global_scale", "F32"))
        inputs = scheme.scheme.input_activations if scheme.scheme else None
        # Of other activations it is no part; then nothing explains it, if it is there.
        there = inputs is not None and "input_global_scale" in tensors.specs
        needed = inputs is not None and inputs.dynamic == "local"
        if (there or needed) and _global_scale(tensors, "input_global_scale"):
            side.append(("input_global_scale", "F32"))
        return replace(spec, side=tuple(side))

    def parameter_names(self, spec: WeightSpec) -> tuple[str, ...]:
        names = ("weight_packed", "weight_scale", "weight_global_scale")
        return names if spec.input_type is None else (*names, "input_global_scale")

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        import torch

        scale = tensors["weight_scale"]
        nan = (scale.view(torch.uint8) & 0x7F) == 0x7F
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


def _global_scale(tensors: ModuleTensors, name: str) -> float:
    """A global scale by value.

    Raises:
        BadInputError: it is missing, of a wrong shape or dtype, NaN, infinite or negative.
    """
    spec = tensors.check(name, ("F32",))
    if spec.shape not in ((), (1,)):
        raise tensors.error(f"{name} is {spec}, expected one element")
    (value,) = tensors.values[name]
    if not 0 <= value < math.inf:
        raise tensors.error(f"{name} is {value}; a scale must be finite and not negative")
    return value
