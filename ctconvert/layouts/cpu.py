"""``cpu-w4a16``, ``cpu-w4a8`` and ``cpu-int8``: weights of vLLM's CPU kernels.

Before (logical weight, N x K)::

    codes       i32 [N, K/8]         4 bits, K-packed; INT8: q, i8 [N, K]
    scale       [N, K/G] or [N, 1]
    zero_point  u8 [N, groups]       asymmetric

After, ``cpu-w4a16``::

    qweight  i32 [N/16, 2*K]
    scales   [groups, N]             in the source's dtype
    qzeros   i32 [groups, N/8]       packed along N             asymmetric

After, ``cpu-w4a8``, B = min(128, G)::

    qweight  u8 [N/32, K/B, 16*B + 128]   the codes, and the sums of them
    scales   f32 [N/32, groups, 32]
    qzeros   i8 [N/32, groups, 32]        8 where symmetric

After, ``cpu-int8``::

    weight        i8 [N, K + 4]      the values, and the sums of them
    weight_scale  f32 [N, 1]

N x K is what the kernels' blocks fit: other weights are padded before, with code, scale and zero
point 0. The orders are those of :mod:`ctconvert.transforms.cpu`.
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

_BLOCK = 32


def _int4(spec: WeightSpec) -> Support:
    """What both INT4 layouts ask of a weight-only scheme."""
    if not (general := weight_only(spec)):
        return general
    if spec.bits != 4:
        return Support(f"{spec.bits}-bit codes; it takes 4")
    if spec.has_g_idx:
        return Support("act-order columns (weight_g_idx); its groups are contiguous")
    if spec.k % spec.codes_per_word:
        return Support(f"K = {spec.k} is no multiple of {spec.codes_per_word} codes a word")
    return Support()


class CPUW4A16(Layout):
    name = "cpu-w4a16"
    takes = "INT4, symmetric or not, in groups of an even size or channel-wise"
    writes = "qweight, scales, qzeros"
    read_by = "vLLM cpu_gemm_wna16; plain torch here"

    def padded_shape(self, spec: WeightSpec) -> tuple[int, int]:
        """N and K to multiples of 32."""
        return round_up(spec.n, _BLOCK), round_up(spec.k, _BLOCK)

    def supports(self, spec: WeightSpec) -> Support:
        if not (general := _int4(spec)):
            return general
        if spec.scale_dtype not in ("F16", "BF16"):
            return Support(f"{spec.scale_dtype} scales; it takes F16 and BF16")
        if spec.group_size and spec.group_size % 2:
            return Support(f"group size {spec.group_size}; it takes even ones and channel-wise")
        _, k = self.padded_shape(spec)
        if spec.group_size and k % spec.group_size:
            return Support(f"K = {spec.k} padded to {k} is no multiple of the group size")
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        assert spec.scale_dtype is not None
        specs = {
            "qweight": TensorSpec("I32", (spec.n // 16, 2 * spec.k)),
            "scales": TensorSpec(spec.scale_dtype, (spec.groups, spec.n)),
        }
        if not spec.symmetric:
            specs["qzeros"] = TensorSpec("I32", (spec.groups, spec.n // 8))
        return specs | side_specs(spec)

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        from ctconvert.transforms.cpu import cpu_w4a16_pack
        from ctconvert.transforms.packed import pack

        assert weight.scale is not None
        made = {
            "qweight": cpu_w4a16_pack(packed_codes(weight)),
            "scales": weight.scale.t().contiguous(),
        }
        if weight.zero_point is not None:
            made["qzeros"] = pack(weight.zero_point.t().contiguous(), 4)
        return made | encode_side(weight)

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        from ctconvert.transforms.cpu import cpu_w4a16_unpack
        from ctconvert.transforms.packed import unpack, unpack_int8

        codes = cpu_w4a16_unpack(tensors["qweight"], spec.n, spec.k)
        if spec.storage == "plain":
            codes = unpack_int8(codes, 4, spec.k)
        zero_point = None
        if not spec.symmetric:
            zero_point = unpack(tensors["qzeros"], 4, spec.n).t().contiguous()
        return QuantizedWeight(
            spec,
            codes=codes,
            scale=tensors["scales"].t().contiguous(),
            zero_point=zero_point,
            side=decode_side(tensors, spec),
        )


class CPUW4A8(Layout):
    name = "cpu-w4a8"
    takes = "INT4, symmetric or not, weight-only or with dynamic per-token INT8 activations"
    writes = "qweight, scales, qzeros"
    read_by = "vLLM int4_scaled_mm_cpu, AMX; plain torch here"

    def padded_shape(self, spec: WeightSpec) -> tuple[int, int]:
        """N and K to multiples of 32, K of 128 where one group is longer than that."""
        columns = 128 if spec.group_size is None and spec.k > 128 else _BLOCK
        return round_up(spec.n, _BLOCK), round_up(spec.k, columns)

    def supports(self, spec: WeightSpec) -> Support:
        if not (general := _int4(spec)):
            return general
        if spec.family == "wna8o8":
            return Support("static activation scales; the kernel's are dynamic per token")
        if spec.scale_dtype not in ("F16", "BF16", "F32"):
            return Support(f"{spec.scale_dtype} scales; it takes F16, BF16 and F32")
        size = spec.group_size
        if size and (size % 32 or (size > 128 and size % 128)):
            return Support(
                f"group size {size}; it takes 32, 64, 96, multiples of 128 and channel-wise"
            )
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        columns = min(128, spec.k // spec.groups)
        per_group = (spec.n // _BLOCK, spec.groups, _BLOCK)
        blocks = (spec.n // _BLOCK, spec.k // columns, 16 * columns + 4 * _BLOCK)
        return {
            "qweight": TensorSpec("U8", blocks),
            "scales": TensorSpec("F32", per_group),
            "qzeros": TensorSpec("I8", per_group),
        } | side_specs(spec)

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        from ctconvert.transforms.cpu import cpu_w4a8_group_rows, cpu_w4a8_pack

        assert weight.scale is not None
        zeros = weight.zero_point
        if zeros is None:
            zeros = torch.full_like(weight.scale, 8, dtype=torch.uint8)
        return {
            "qweight": cpu_w4a8_pack(packed_codes(weight), zeros),
            "scales": cpu_w4a8_group_rows(weight.scale.to(torch.float32)),
            "qzeros": cpu_w4a8_group_rows(zeros.view(torch.int8)),
        } | encode_side(weight)

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        import torch

        from ctconvert.transforms.cpu import cpu_w4a8_ungroup_rows, cpu_w4a8_unpack
        from ctconvert.transforms.packed import unpack_int8

        zeros = cpu_w4a8_ungroup_rows(tensors["qzeros"]).view(torch.uint8)
        if spec.symmetric and bool((zeros != 8).any()):
            raise ValueError("qzeros hold another zero point than a symmetric weight's 8")
        codes = cpu_w4a8_unpack(tensors["qweight"], zeros, spec.n, spec.k)
        if spec.storage == "plain":
            codes = unpack_int8(codes, 4, spec.k)
        return QuantizedWeight(
            spec,
            codes=codes,
            scale=_narrowed(cpu_w4a8_ungroup_rows(tensors["scales"]), spec, "scales"),
            zero_point=None if spec.symmetric else zeros,
            side=decode_side(tensors, spec),
        )


class CPUInt8(Layout):
    name = "cpu-int8"
    takes = "INT8 symmetric, per channel or tensor, with dynamic per-token INT8 activations"
    writes = "weight, weight_scale"
    read_by = "vLLM int8_scaled_mm_with_quant, AMX; plain torch here"

    def padded_shape(self, spec: WeightSpec) -> tuple[int, int]:
        """N and K to multiples of 32."""
        return round_up(spec.n, _BLOCK), round_up(spec.k, _BLOCK)

    def supports(self, spec: WeightSpec) -> Support:
        if spec.family != "w8a8" or spec.kind != "int":
            return Support(f"scheme {spec.family} ({spec.label}) is not INT8", other_kind=True)
        if spec.strategy != "channel":
            return Support(f"scale strategy {spec.strategy}; it takes one scale a channel")
        if not spec.symmetric:
            return Support("asymmetric weights; it takes symmetric ones")
        if spec.side:
            return Support(f"static activation scales ({spec.activations}); it takes dynamic ones")
        if not spec.input_symmetric:
            return Support("asymmetric activations; the kernel's are symmetric")
        if spec.storage == "packed" and spec.k % 4:
            return Support(f"K = {spec.k} is no multiple of 4 codes a word")
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec("I8", (spec.n, spec.k + 4)),
            "weight_scale": TensorSpec("F32", (spec.n, 1)),
        }

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        from ctconvert.transforms.cpu import cpu_int8_pack
        from ctconvert.transforms.packed import unpack_int8

        assert weight.scale is not None
        codes = weight.codes
        if weight.spec.storage == "packed":
            codes = unpack_int8(codes, 8, weight.spec.k)
        return {
            "weight": cpu_int8_pack(codes),
            "weight_scale": weight.scale.to(torch.float32).contiguous(),
        }

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        from ctconvert.transforms.cpu import cpu_int8_unpack
        from ctconvert.transforms.packed import pack_int8

        codes = cpu_int8_unpack(tensors["weight"], spec.n, spec.k)
        if spec.storage == "packed":
            codes = pack_int8(codes, 8)
        scale = _narrowed(tensors["weight_scale"], spec, "weight_scale")
        return QuantizedWeight(spec, codes=codes, scale=scale)


def _narrowed(scale: torch.Tensor, spec: WeightSpec, name: str) -> torch.Tensor:
    """Scales f32 in the dtype that they were widened from.

    Raises:
        ValueError: one is not a value of it.
    """
    from ctconvert.transforms.dtypes import same_bits, torch_dtype

    assert spec.scale_dtype is not None
    narrow = scale.to(torch_dtype(spec.scale_dtype))
    if not same_bits(narrow.to(scale.dtype), scale):
        raise ValueError(f"{name} hold a value that is no {spec.scale_dtype}")
    return narrow
