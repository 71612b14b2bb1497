"""``machete``: prepacked weights of the Machete mixed-precision GEMM on Hopper.

Before (logical weight, N x K, b = 4 or 8 bits, f = 32/b)::

    codes       i32 [N, K/f]         K-packed
    scale       [N, K/G] or [N, 1]
    zero_point  u8 [N, groups]       asymmetric

After::

    qweight            i32 [K*b/32, N]   prepacked
    scales             [groups, N]       in the source's dtype
    zeros              [groups, N]       -scale * zero_point in that dtype    asymmetric
    zero_point_source  u8 [N, groups]    the zero points' codes               asymmetric

The kernel takes ``zeros`` and not the codes, which rounding may have lost: they are kept beside.
N x K is what the kernel's tiles fit: other weights are padded before, with code, scale and zero
point 0. The order is that of :mod:`ctconvert.transforms.machete`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ctconvert.layouts.base import (
    Layout,
    decode_side,
    encode_side,
    packed_codes,
    side_specs,
    weight_only,
)
from ctconvert.specs import QuantizedWeight, Support, TensorSpec, WeightSpec

if TYPE_CHECKING:
    import torch

#: Group sizes the kernel is built for, besides channel-wise.
GROUP_SIZES = (64, 128)


class Machete(Layout):
    name = "machete"
    takes = "INT 4, 8 bits, symmetric or not, groups of 64, 128 or channel-wise"
    writes = "qweight, scales, zeros, zero_point_source"
    read_by = "Machete GEMM, SM90; plain torch here"

    def padded_shape(self, spec: WeightSpec) -> tuple[int, int]:
        """N to a multiple of 128, K of 64."""
        from ctconvert.transforms.machete import machete_padded_shape

        return machete_padded_shape(spec.n, spec.k)

    def supports(self, spec: WeightSpec) -> Support:
        if not (general := weight_only(spec)):
            return general
        if spec.bits not in (4, 8):
            return Support(f"{spec.bits}-bit codes; it takes 4 and 8")
        if spec.scale_dtype not in ("F16", "BF16"):
            return Support(f"{spec.scale_dtype} scales; it takes F16 and BF16")
        if spec.has_g_idx:
            return Support("act-order columns (weight_g_idx); its groups are contiguous")
        if spec.strategy == "group" and spec.group_size not in GROUP_SIZES:
            return Support(f"group size {spec.group_size}; it takes 64, 128 and channel-wise")
        if spec.k % spec.codes_per_word:
            return Support(f"K = {spec.k} is no multiple of {spec.codes_per_word} codes a word")
        _, k = self.padded_shape(spec)
        if spec.group_size and k % spec.group_size:
            return Support(f"K = {spec.k} padded to {k} is no multiple of the group size")
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        assert spec.scale_dtype is not None
        per_group = TensorSpec(spec.scale_dtype, (spec.groups, spec.n))
        specs = {
            "qweight": TensorSpec("I32", (spec.k * spec.bits // 32, spec.n)),
            "scales": per_group,
        }
        if not spec.symmetric:
            specs["zeros"] = per_group
            specs["zero_point_source"] = TensorSpec("U8", (spec.n, spec.groups))
        return specs | side_specs(spec)

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        from ctconvert.transforms import machete

        assert weight.scale is not None
        scales = weight.scale.t().contiguous()
        made = {
            "qweight": machete.machete_pack(packed_codes(weight), weight.spec.bits),
            "scales": scales,
        }
        if weight.zero_point is not None:
            zero_point = weight.zero_point.contiguous()
            made["zeros"] = machete.machete_zero_points(scales, zero_point.t())
            made["zero_point_source"] = zero_point
        return made | encode_side(weight)

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        from ctconvert.transforms import machete
        from ctconvert.transforms.dtypes import same_bits
        from ctconvert.transforms.packed import unpack_int8

        codes = machete.machete_unpack(tensors["qweight"], spec.bits, spec.n, spec.k)
        if spec.storage == "plain":
            codes = unpack_int8(codes, spec.bits, spec.k)
        zero_point = None
        if not spec.symmetric:
            zero_point = tensors["zero_point_source"]
            made = machete.machete_zero_points(tensors["scales"], zero_point.t())
            if not same_bits(made, tensors["zeros"]):
                raise ValueError("zeros are not the product of scales and zero_point_source")
        return QuantizedWeight(
            spec,
            codes=codes,
            scale=tensors["scales"].t().contiguous(),
            zero_point=zero_point,
            side=decode_side(tensors, spec),
        )
