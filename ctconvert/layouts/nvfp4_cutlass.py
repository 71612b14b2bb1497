"""``nvfp4-cutlass``: NVFP4 weights and activations for Blackwell's block-scaled tensor cores.

Before (logical weight, N x K)::

    codes                i32 [N, K/8]       K-packed E2M1
    scale                f8_e4m3 [N, K/16]
    weight_global_scale  f32 [1]            the divisor of the weight's scales
    input_global_scale   f32 [1]            that of the activations'

After::

    weight                      u8 [N, K/2]       the source's bytes
    weight_scale                f8_e4m3 [Np, Q]   swizzled in tiles of 128 x 4
    input_global_scale_inv      f32 [1]           the source's input_global_scale
    alpha                       f32 [1]           (1 / input) * (1 / weight), the output's factor
    weight_global_scale_source  f32 [1]           of which alpha was made

N and K are padded before to multiples of 32 with code 0 and scale 0; Np is N rounded up to 128, Q
is K/16 rounded up to 4 (:mod:`ctconvert.transforms.swizzle`). The kernel reads the first four. The
layout of vLLM's ``cutlass_scaled_fp4_mm`` and FlashInfer's ``mm_fp4`` (vllm/model_executor/layers/
quantization/compressed_tensors/schemes/compressed_tensors_w4a4_nvfp4.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ctconvert.layouts.base import Layout, of_family
from ctconvert.specs import QuantizedWeight, Support, TensorSpec, WeightSpec

if TYPE_CHECKING:
    import torch

#: Of which N and K must be multiples.
ALIGNED = 32


class NVFP4Cutlass(Layout):
    name = "nvfp4-cutlass"
    takes = "NVFP4 weights with NVFP4 activations"
    writes = "weight, weight_scale, input_global_scale_inv, alpha, weight_global_scale_source"
    read_by = "block-scaled FP4 matmul kernels, SM100 and newer; none here"

    def padded_shape(self, spec: WeightSpec) -> tuple[int, int]:
        return -(-spec.n // ALIGNED) * ALIGNED, -(-spec.k // ALIGNED) * ALIGNED

    def supports(self, spec: WeightSpec) -> Support:
        if not (general := of_family(spec, "nvfp4")):
            return general
        if "input_global_scale" not in dict(spec.side):
            return Support(
                "it has no input_global_scale, without which the kernel cannot quantise its "
                "activations"
            )
        if spec.input_type != "float4":
            return Support(f"activations ({spec.activations}) that are not FP4")
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        from ctconvert.transforms.swizzle import swizzled_shape

        one = TensorSpec("F32", (1,))
        return {
            "weight": TensorSpec("U8", (spec.n, spec.k // 2)),
            "weight_scale": TensorSpec("F8_E4M3", swizzled_shape(spec.n, spec.k // 16)),
            "input_global_scale_inv": one,
            "alpha": one,
            "weight_global_scale_source": one,
        }

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        from ctconvert.transforms.nvfp4 import nvfp4_power
        from ctconvert.transforms.swizzle import swizzle_scales

        assert weight.scale is not None
        nvfp4_power(
            weight.scale
        )  # names a scale that is negative or NaN: the kernel's have no sign
        inputs, divisor = weight.side["input_global_scale"], weight.side["weight_global_scale"]
        alpha = inputs.reciprocal() * divisor.reciprocal()
        if not 0 < float(alpha) < float("inf"):
            raise ValueError(
                f"input_global_scale {float(inputs)} and weight_global_scale {float(divisor)} "
                f"give a factor of {float(alpha)} in float32, no scale the kernel can use"
            )
        return {
            "weight": weight.codes.contiguous().view(torch.uint8),
            "weight_scale": swizzle_scales(weight.scale),
            "input_global_scale_inv": inputs,
            "alpha": alpha,
            "weight_global_scale_source": divisor,
        }

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        import torch

        from ctconvert.transforms.swizzle import unswizzle_scales

        return QuantizedWeight(
            spec,
            codes=tensors["weight"].view(torch.int32),
            scale=unswizzle_scales(tensors["weight_scale"], spec.n, spec.k // 16),
            side={
                "weight_global_scale": tensors["weight_global_scale_source"],
                "input_global_scale": tensors["input_global_scale_inv"],
            },
        )
