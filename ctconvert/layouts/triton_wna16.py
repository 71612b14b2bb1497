"""``triton-wna16``: N-packed weight-only INT, as Triton W4A16 kernels read it.

Before (logical weight, N x K, b = 2, 4, 8 bits, G group size, f = 32/b codes a word)::

    codes       i32 [N, K/f]       K-packed
    scale       [N, K/G] or [N, 1]
    zero_point  u8 [N, groups]     asymmetric

After::

    qweight  i32 [K, N/f]       code j of word (k, c) is the unsigned code of weight (c*f + j, k)
    scales   [groups, N]        in the source's dtype
    qzeros   i32 [groups, N/f]  code j of word (g, c) is the zero point of n = c*f + j

``W[n, k] = (code - zero) * scale`` with zero = 2^(b-1) where symmetric. N fills whole words: other
weights are padded before, with code, scale and zero point 0. The layout of vLLM's
``triton_w4a16`` kernel, for three bit widths.
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
from ctconvert.transforms.shapes import round_up

if TYPE_CHECKING:
    import torch


class TritonWNA16(Layout):
    name = "triton-wna16"
    takes = "INT 2, 4, 8 bits, symmetric or not, grouped or channel-wise"
    writes = "qweight, scales, qzeros"
    read_by = "Triton W2/W4/W8A16 kernels"

    def padded_shape(self, spec: WeightSpec) -> tuple[int, int]:
        """N to a multiple of the codes in a word."""
        return round_up(spec.n, spec.codes_per_word), spec.k

    def supports(self, spec: WeightSpec) -> Support:
        if not (general := weight_only(spec)):
            return general
        if spec.bits not in (2, 4, 8):
            return Support(f"{spec.bits}-bit codes; it takes 2, 4 and 8")
        if spec.has_g_idx:
            return Support("act-order columns (weight_g_idx); its groups are contiguous")
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        words, groups = spec.n // spec.codes_per_word, spec.groups
        assert spec.scale_dtype is not None
        specs = {
            "qweight": TensorSpec("I32", (spec.k, words)),
            "scales": TensorSpec(spec.scale_dtype, (groups, spec.n)),
        }
        if not spec.symmetric:
            specs["qzeros"] = TensorSpec("I32", (groups, words))
        return specs | side_specs(spec)

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        from ctconvert.transforms.packed import pack, transpose_packed

        spec = weight.spec
        assert weight.scale is not None
        made = {
            "qweight": transpose_packed(packed_codes(weight), spec.bits, columns=spec.k),
            "scales": weight.scale.t().contiguous(),
        }
        if weight.zero_point is not None:
            made["qzeros"] = pack(weight.zero_point.t().contiguous(), spec.bits)
        return made | encode_side(weight)

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        from ctconvert.transforms.packed import transpose_packed, unpack, unpack_int8

        codes = transpose_packed(tensors["qweight"], spec.bits, columns=spec.n, pad_rows=True)
        if spec.storage == "plain":
            codes = unpack_int8(codes, spec.bits, spec.k)
        zero_point = None
        if not spec.symmetric:
            zero_point = unpack(tensors["qzeros"], spec.bits, spec.n).t().contiguous()
        return QuantizedWeight(
            spec,
            codes=codes,
            scale=tensors["scales"].t().contiguous(),
            zero_point=zero_point,
            side=decode_side(tensors, spec),
        )
