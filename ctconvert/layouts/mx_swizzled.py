"""``mxfp8-swizzled`` and ``mxfp4-swizzled``: MX weights for Blackwell's block-scaled tensor cores.

Before (logical weight, N x K)::

    codes  MXFP8: f8_e4m3 [N, K]; MXFP4: i32 [N, K/8], K-packed E2M1
    scale  E8M0 bytes [N, K/32]

After::

    weight        MXFP8: f8_e4m3 [N, K]; MXFP4: u8 [N, K/2]   the source's bytes
    weight_scale  E8M0 bytes [Np, Q]                          swizzled in tiles of 128 x 4

N is padded before to a multiple of 32 with code 0 and scale 0 (byte 0 of E8M0 is the smallest
scale; code 0 is 0.0); Np is N rounded up to 128, Q is K/32 rounded up to 4
(:mod:`ctconvert.transforms.swizzle`). The layout of FlashInfer's ``mm_mxfp8`` and ``mm_fp4``, which
quantise the activations. Derived from their sources; not compared with a kernel on its hardware.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from ctconvert.layouts.base import Layout, of_family
from ctconvert.specs import Dtype, Family, QuantizedWeight, Support, TensorSpec, WeightSpec

if TYPE_CHECKING:
    import torch


#: Of which N must be a multiple.
ALIGNED = 32


class _MXSwizzled(Layout):
    writes = "weight, weight_scale"
    family: ClassVar[Family]
    #: The activations the kernel quantises, as ``WeightSpec.activations`` names them.
    activations: ClassVar[str]
    #: Of ``weight``, and how many codes one element holds.
    element: ClassVar[Dtype]
    codes: ClassVar[int]

    def padded_shape(self, spec: WeightSpec) -> tuple[int, int]:
        """N to a multiple of 32; K, whole groups of 32, is one already."""
        return -(-spec.n // ALIGNED) * ALIGNED, spec.k

    def supports(self, spec: WeightSpec) -> Support:
        if not (general := of_family(spec, self.family)):
            return general
        if spec.activations != self.activations:
            return Support(
                f"activations {spec.activations or 'of 16 bits'}; it takes {self.activations}"
            )
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        from ctconvert.transforms.swizzle import swizzled_shape

        assert spec.scale_dtype is not None
        return {
            "weight": TensorSpec(self.element, (spec.n, spec.k // self.codes)),
            "weight_scale": TensorSpec(spec.scale_dtype, swizzled_shape(spec.n, spec.k // 32)),
        }

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        from ctconvert.transforms.dtypes import torch_dtype
        from ctconvert.transforms.swizzle import swizzle_scales

        assert weight.scale is not None
        return {
            "weight": weight.codes.contiguous().view(torch_dtype(self.element)),
            "weight_scale": swizzle_scales(weight.scale),
        }

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        from ctconvert.transforms.dtypes import torch_dtype
        from ctconvert.transforms.swizzle import unswizzle_scales

        return QuantizedWeight(
            spec,
            codes=tensors["weight"].view(torch_dtype(spec.element)),
            scale=unswizzle_scales(tensors["weight_scale"], spec.n, spec.k // 32),
        )


class MXFP8Swizzled(_MXSwizzled):
    name = "mxfp8-swizzled"
    takes = "MXFP8 weights with MXFP8 activations"
    read_by = "block-scaled MXFP8 matmul kernels, SM100 and newer; none here"
    family = "mxfp8"
    activations = "fp8 dynamic group in"
    element, codes = "F8_E4M3", 1


class MXFP4Swizzled(_MXSwizzled):
    name = "mxfp4-swizzled"
    takes = "MXFP4 weights with MXFP4 activations"
    read_by = "block-scaled FP4 matmul kernels, SM100 and newer; none here"
    family = "mxfp4"
    activations = "fp4 dynamic group in"
    element, codes = "U8", 2
