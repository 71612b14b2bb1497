"""``gather``: quantised embedding tables, dequantised on look-up.

Before (logical weight, V rows x H columns, 2 to 8 bits or FP8)::

    codes       i32 [V, words]      packed along H, dense or padded as in the source
                f8_e4m3 [V, H]      FP8, channel-wise or per tensor
    scale       [V, H/G] or [V, 1]
    zero_point  u8 [V, groups]      asymmetric

After::

    weight_packed      i32 [V, words]  the same words, in the source's packing
    weight             f8_e4m3 [V, H]  the same bytes   FP8
    weight_scale       [V, groups]     in the source's dtype
    weight_zero_point  u8 [V, groups]  unsigned codes   asymmetric

The spec's ``packing`` says which of the two packings 3, 5, 6 and 7 bits have. The layout of
vLLM's embedding gather kernel for compressed-tensors, which takes no FP8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ctconvert.layouts.base import Layout
from ctconvert.specs import QuantizedWeight, Support, TensorSpec, WeightSpec
from ctconvert.transforms.shapes import row_words

if TYPE_CHECKING:
    import torch


def _fp8(spec: WeightSpec) -> bool:
    return spec.family == "other" and spec.element == "F8_E4M3"


class Gather(Layout):
    name = "gather"
    takes = "embedding tables, INT of 2 to 8 bits, grouped or channel-wise; FP8, channel-wise"
    writes = "weight_packed or weight, weight_scale, weight_zero_point"
    read_by = "embedding gather kernels"

    def supports(self, spec: WeightSpec) -> Support:
        if not spec.embedding:
            return Support("it is no embedding table", other_kind=True)
        if _fp8(spec):
            if spec.strategy != "channel":
                return Support(f"scale strategy {spec.strategy} of FP8; it takes channel-wise")
        elif spec.family != "embedding" or not 2 <= spec.bits <= 8:
            return Support(f"{spec.label} codes; it takes INT of 2 to 8 bits and FP8")
        if spec.strategy not in ("channel", "group"):
            return Support(f"scale strategy {spec.strategy} is not channel-wise or grouped")
        if spec.has_g_idx:
            return Support("act-order columns (weight_g_idx); its groups are contiguous")
        if spec.activations:
            return Support(f"activations {spec.activations}; a look-up has none")
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        assert spec.scale_dtype is not None
        assert spec.scale_shape is not None
        scale = TensorSpec(spec.scale_dtype, spec.scale_shape)
        if _fp8(spec):
            return {"weight": TensorSpec(spec.element, (spec.n, spec.k)), "weight_scale": scale}
        words = row_words(spec.k, spec.bits, spec.packing)
        specs = {"weight_packed": TensorSpec("I32", (spec.n, words)), "weight_scale": scale}
        if not spec.symmetric:
            specs["weight_zero_point"] = TensorSpec("U8", spec.scale_shape)
        return specs

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        from ctconvert.transforms.packed import pack

        spec = weight.spec
        assert weight.scale is not None
        codes = weight.codes
        if _fp8(spec):
            return {"weight": codes, "weight_scale": weight.scale}
        if spec.storage == "plain":
            offset = 1 << (spec.bits - 1)
            codes = pack((codes.view(torch.uint8) + offset).bitwise_and_(2 * offset - 1), spec.bits)
        made = {"weight_packed": codes, "weight_scale": weight.scale}
        if weight.zero_point is not None:
            made["weight_zero_point"] = weight.zero_point
        return made

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        import torch

        from ctconvert.transforms.packed import unpack

        if _fp8(spec):
            return QuantizedWeight(spec, codes=tensors["weight"], scale=tensors["weight_scale"])
        codes = tensors["weight_packed"]
        if spec.storage == "plain":
            offset = 1 << (spec.bits - 1)
            codes = (unpack(codes, spec.bits, spec.k) - offset).view(torch.int8)
        return QuantizedWeight(
            spec,
            codes=codes,
            scale=tensors["weight_scale"],
            zero_point=tensors.get("weight_zero_point"),
        )
