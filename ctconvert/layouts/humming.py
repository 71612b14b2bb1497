"""``humming`` and ``humming-nvfp4``: weights of the Humming GEMM for 16-bit activations.

Before (logical weight, N x K, b = 4 or 8 bits, f = 32/b)::

    codes                i32 [N, K/f]         K-packed
    scale                [N, K/G] or [N, 1]   NVFP4: f8_e4m3 [N, K/16]
    zero_point           u8 [N, groups]       asymmetric
    weight_global_scale  f32 [1]              NVFP4: the divisor of all scales
    input_global_scale   f32 [1]              NVFP4, where the activations are quantised

After, ``humming``::

    weight        i32 [K/16, N*16/f]  tiles; 8 bits beside BF16 scales as sign and magnitude
    weight_scale  [groups, N]         reordered along N, in the source's dtype
    zero_point    i32 [groups, N/8]   reordered and packed along N             asymmetric

After, ``humming-nvfp4``::

    weight               i32 [K/16, N*2]
    weight_scale         f8_e4m3 [K/16, N]  reordered along N
    weight_scale_2       f32 [1]            1 / weight_global_scale
    weight_global_scale  f32 [1]            as it was: several divisors share one reciprocal
    input_global_scale   f32 [1]            as it was; the kernel's activations are 16-bit

The activations are taken to be of the scales' dtype. N x K is what the kernel's tiles fit: other
weights are padded before, with code, scale and zero point 0. The orders are those of
:mod:`ctconvert.transforms.humming`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ctconvert.layouts.base import (
    Layout,
    decode_side,
    encode_side,
    of_family,
    packed_codes,
    side_specs,
    weight_only,
)
from ctconvert.specs import QuantizedWeight, Support, TensorSpec, WeightSpec

if TYPE_CHECKING:
    import torch

#: Group sizes it is offered for, besides channel-wise.
GROUP_SIZES = (32, 64, 128)


class _Humming(Layout):
    read_by = "Humming GEMM, SM90; Triton here"

    def padded_shape(self, spec: WeightSpec) -> tuple[int, int]:
        """N to a multiple of 256, K of 128."""
        from ctconvert.transforms.humming import humming_padded_shape

        return humming_padded_shape(spec.n, spec.k)


class Humming(_Humming):
    name = "humming"
    takes = "INT 4, 8 bits, with 4 also asymmetric, groups of 32, 64, 128 or channel-wise"
    writes = "weight, weight_scale, zero_point"

    def supports(self, spec: WeightSpec) -> Support:
        if not (general := weight_only(spec)):
            return general
        if spec.bits not in (4, 8):
            return Support(f"{spec.bits}-bit codes; it takes 4 and 8")
        if spec.bits == 8 and not spec.symmetric:
            return Support("asymmetric 8-bit weights; it takes symmetric ones")
        if spec.scale_dtype not in ("F16", "BF16"):
            return Support(f"{spec.scale_dtype} scales; it takes F16 and BF16")
        if spec.has_g_idx:
            return Support("act-order columns (weight_g_idx); its groups are contiguous")
        if spec.strategy == "group" and spec.group_size not in GROUP_SIZES:
            return Support(f"group size {spec.group_size}; it takes 32, 64, 128 and channel-wise")
        if spec.k % spec.codes_per_word:
            return Support(f"K = {spec.k} is no multiple of {spec.codes_per_word} codes a word")
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        assert spec.scale_dtype is not None
        specs = {
            "weight": TensorSpec("I32", (spec.k // 16, 16 * spec.n // spec.codes_per_word)),
            "weight_scale": TensorSpec(spec.scale_dtype, (spec.groups, spec.n)),
        }
        if not spec.symmetric:
            specs["zero_point"] = TensorSpec("I32", (spec.groups, spec.n // 8))
        return specs | side_specs(spec)

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        from ctconvert.transforms import humming

        spec = weight.spec
        assert weight.scale is not None
        scale = weight.scale.t().contiguous()
        made = {
            "weight": humming.humming_pack(packed_codes(weight), spec.bits, scale.dtype),
            "weight_scale": humming.humming_permute_scales(scale),
        }
        if weight.zero_point is not None:
            zeros = weight.zero_point.t().contiguous()
            made["zero_point"] = humming.humming_pack_zero_points(zeros, spec.bits)
        return made | encode_side(weight)

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        from ctconvert.transforms import humming
        from ctconvert.transforms.packed import unpack_int8

        scale = humming.humming_unpermute_scales(tensors["weight_scale"])
        codes = humming.humming_unpack(tensors["weight"], spec.bits, spec.n, spec.k, scale.dtype)
        if spec.storage == "plain":
            codes = unpack_int8(codes, spec.bits, spec.k)
        zero_point = None
        if not spec.symmetric:
            zeros = humming.humming_unpack_zero_points(tensors["zero_point"], spec.bits)
            zero_point = zeros.t().contiguous()
        return QuantizedWeight(
            spec,
            codes=codes,
            scale=scale.t().contiguous(),
            zero_point=zero_point,
            side=decode_side(tensors, spec),
        )


class HummingNVFP4(_Humming):
    name = "humming-nvfp4"
    takes = "NVFP4, with or without activation quantisation"
    writes = "weight, weight_scale, weight_scale_2, weight_global_scale, input_global_scale"

    def supports(self, spec: WeightSpec) -> Support:
        if not (general := of_family(spec, "nvfp4")):
            return general
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        assert spec.scale_dtype is not None
        return {
            "weight": TensorSpec("I32", (spec.k // 16, 2 * spec.n)),
            "weight_scale": TensorSpec(spec.scale_dtype, (spec.k // 16, spec.n)),
            "weight_scale_2": TensorSpec("F32", (1,)),
        } | side_specs(spec)

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        from ctconvert.transforms import humming

        assert weight.scale is not None
        scale = weight.scale.view(torch.uint8).t().contiguous()
        return {
            "weight": humming.humming_pack(packed_codes(weight), 4, torch.bfloat16),
            "weight_scale": humming.humming_permute_scales(scale).view(weight.scale.dtype),
            "weight_scale_2": humming.humming_global_scale(weight.side["weight_global_scale"]),
        } | encode_side(weight)

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        import torch

        from ctconvert.transforms import humming
        from ctconvert.transforms.dtypes import same_bits

        side = decode_side(tensors, spec)
        factor = humming.humming_global_scale(side["weight_global_scale"])
        if not same_bits(factor, tensors["weight_scale_2"]):
            raise ValueError("weight_scale_2 is not the reciprocal of weight_global_scale")
        stored = tensors["weight_scale"]
        scale = humming.humming_unpermute_scales(stored.view(torch.uint8))
        return QuantizedWeight(
            spec,
            codes=humming.humming_unpack(tensors["weight"], 4, spec.n, spec.k, torch.bfloat16),
            scale=scale.t().contiguous().view(stored.dtype),
            side=side,
        )
