"""``xpu-w4a8`` and ``xpu-w4a16``: symmetric INT4 for oneDNN's int4 GEMM on Intel GPUs.

Before (logical weight, N x K)::

    codes  i32 [N, K/8]             K-packed; code q + 8 of column 8c + j in nibble j of word c
    scale  [N, K/G] or [N, 1]

After::

    weight_packed      i32 [N, K/8]  the same words; the kernel takes its .t() view
    weight_scale       [groups, N]   in the source's dtype
    weight_zero_point  i8 [1] = 8

N is a multiple of 8: other weights are padded before, with code and scale 0. K is one as it is, for
the kernels take groups of 32 and whole words.

The kernels are ``torch.ops._xpu_C.int4_gemm_w4a8`` (activations: dynamic per-token symmetric INT8)
and ``int4_gemm_w4a16`` of vLLM's XPU kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

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

_ZERO_POINT = 8


class _XPU(Layout):
    writes = "weight_packed, weight_scale, weight_zero_point"
    families: ClassVar[tuple[str, ...]]

    def padded_shape(self, spec: WeightSpec) -> tuple[int, int]:
        """N to a multiple of 8."""
        return round_up(spec.n, 8), spec.k

    def supports(self, spec: WeightSpec) -> Support:
        if not (general := weight_only(spec)):
            return general
        if spec.family not in self.families:
            return Support(
                f"scheme {spec.family} ({spec.label}) is not {self.name[4:].upper()}",
                other_kind=True,
            )
        if spec.bits != 4:
            return Support(f"{spec.bits}-bit codes; it takes 4")
        if not spec.symmetric:
            return Support("asymmetric weights; it takes symmetric ones")
        if not spec.input_symmetric and spec.family == "w4a8":
            return Support("asymmetric activations; the kernel's are symmetric")
        if spec.has_g_idx:
            return Support("act-order columns (weight_g_idx); its groups are contiguous")
        if spec.group_size and spec.group_size % 32:
            return Support(f"group size {spec.group_size}; it takes multiples of 32")
        if spec.k % 8:
            return Support(f"K = {spec.k} is no multiple of 8 codes a word")
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        assert spec.scale_dtype is not None
        return {
            "weight_packed": TensorSpec("I32", (spec.n, spec.k // 8)),
            "weight_scale": TensorSpec(spec.scale_dtype, (spec.groups, spec.n)),
            "weight_zero_point": TensorSpec("I8", (1,)),
        } | side_specs(spec)

    def views(self, spec: WeightSpec) -> dict[str, str]:
        return {"weight_packed": "t"}

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        assert weight.scale is not None
        zero = torch.full((1,), _ZERO_POINT, dtype=torch.int8, device=weight.codes.device)
        return {
            "weight_packed": packed_codes(weight),
            "weight_scale": weight.scale.t().contiguous(),
            "weight_zero_point": zero,
        } | encode_side(weight)

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        from ctconvert.transforms.packed import unpack_int8

        codes = tensors["weight_packed"]
        if spec.storage == "plain":
            codes = unpack_int8(codes, 4, spec.k)
        return QuantizedWeight(
            spec,
            codes=codes,
            scale=tensors["weight_scale"].t().contiguous(),
            side=decode_side(tensors, spec),
        )


class XPUW4A8(_XPU):
    name = "xpu-w4a8"
    takes = "INT4 symmetric with dynamic per-token INT8 activations"
    read_by = "oneDNN int4_gemm_w4a8"
    families = ("w4a8",)


class XPUW4A16(_XPU):
    name = "xpu-w4a16"
    takes = "INT4 symmetric, weight-only"
    read_by = "oneDNN int4_gemm_w4a16"
    families = ("wna16", "wna8o8")
