"""``w4a8-fp8``: INT4 weights with FP8 activations for CUTLASS on SM90.

Before (logical weight, N x K)::

    codes  i32 [N, K/8]     K-packed, code q + 8
    scale  [N, K/128]

After::

    weight               i32 [N, K/8]               the kernel takes its .t() view
    weight_chan_scale    f32 [N, 1]
    weight_scale         f8_e4m3 [K/128 * N * 8]    for each scale its multiples by -8 .. -1
    weight_scale_source  [N, K/128]                 the scales, which FP8 has rounded

N is a multiple of 128: other weights are padded before, with code and scale 0. The order and the
scales are those of :mod:`ctconvert.transforms.w4a8_fp8`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ctconvert.layouts.base import Layout, no_table, packed_codes
from ctconvert.specs import SCALE_DTYPES, QuantizedWeight, Support, TensorSpec, WeightSpec

if TYPE_CHECKING:
    import torch

GROUP_SIZE = 128
#: The activations the kernel is made for, as ``WeightSpec.activations`` names them.
ACTIVATIONS = "fp8 dynamic token in"


class W4A8FP8(Layout):
    name = "w4a8-fp8"
    takes = "INT4 symmetric in groups of 128 with dynamic per-token FP8 activations"
    writes = "weight, weight_chan_scale, weight_scale, weight_scale_source"
    read_by = "CUTLASS W4A8 GEMM, SM90; plain torch here"

    def padded_shape(self, spec: WeightSpec) -> tuple[int, int]:
        """N to a multiple of 128; whole groups are multiples already."""
        return -(-spec.n // 128) * 128, spec.k

    def supports(self, spec: WeightSpec) -> Support:
        if not (general := no_table(spec)):
            return general
        if (spec.kind, spec.bits, spec.input_type) != ("int", 4, "F8_E4M3") or spec.sparse:
            return Support(f"scheme {spec.family} ({spec.label}) is not W4A8-FP8", other_kind=True)
        if spec.activations != ACTIVATIONS or spec.side:
            return Support(f"activations {spec.activations}; it takes {ACTIVATIONS}")
        if not spec.symmetric:
            return Support("asymmetric weights; it takes symmetric ones")
        if spec.has_g_idx:
            return Support("act-order columns (weight_g_idx); its groups are contiguous")
        if spec.strategy != "group" or spec.group_size != GROUP_SIZE:
            return Support(
                f"scale strategy {spec.strategy}, group size {spec.group_size}; it takes groups "
                f"of {GROUP_SIZE}"
            )
        if spec.scale_dtype not in SCALE_DTYPES:
            return Support(f"{spec.scale_dtype} scales; it takes {', '.join(SCALE_DTYPES)}")
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        assert spec.scale_dtype is not None
        return {
            "weight": TensorSpec("I32", (spec.n, spec.k // 8)),
            "weight_chan_scale": TensorSpec("F32", (spec.n, 1)),
            "weight_scale": TensorSpec("F8_E4M3", (spec.groups * spec.n * 8,)),
            "weight_scale_source": TensorSpec(spec.scale_dtype, (spec.n, spec.groups)),
        }

    def views(self, spec: WeightSpec) -> dict[str, str]:
        return {"weight": "t"}

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        from ctconvert.transforms.w4a8_fp8 import w4a8_fp8_pack, w4a8_fp8_scales

        assert weight.scale is not None
        scale, channel = w4a8_fp8_scales(weight.scale)
        return {
            "weight": w4a8_fp8_pack(packed_codes(weight)),
            "weight_chan_scale": channel,
            "weight_scale": scale,
            "weight_scale_source": weight.scale.contiguous(),
        }

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        from ctconvert.transforms.dtypes import same_bits
        from ctconvert.transforms.packed import unpack_int8
        from ctconvert.transforms.w4a8_fp8 import w4a8_fp8_scales, w4a8_fp8_unpack

        source = tensors["weight_scale_source"]
        made = w4a8_fp8_scales(source)
        for name, tensor in zip(("weight_scale", "weight_chan_scale"), made, strict=True):
            if not same_bits(tensor, tensors[name]):
                raise ValueError(f"{name} is not made of weight_scale_source")
        codes = w4a8_fp8_unpack(tensors["weight"], spec.n, spec.k)
        if spec.storage == "plain":
            codes = unpack_int8(codes, 4, spec.k)
        return QuantizedWeight(spec, codes=codes, scale=source)
