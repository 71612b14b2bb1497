"""``scaled-mm``: dense 8-bit weights for W8A8 kernels (INT8 or FP8).

Before (logical weight, N x K)::

    codes       i8 or f8_e4m3 [N, K] (or 8-bit codes packed along K)
    scale       [N, 1], or block-wise [ceil(N/bn), ceil(K/bk)]
    zero_point  u8 [N, 1]     asymmetric

After::

    weight             i8 or f8_e4m3 [N, K]; the kernel takes its .t() view
    weight_scale       f32 [N, 1] or block-wise
    weight_zero_point  i8 [N, 1], signed     asymmetric weights
    input_scale        f32 [1]               static activations
    input_zero_point   i8 [1], signed        static asymmetric activations
    azp_adj            i32 [1, N]            dynamic asymmetric activations: sums of weight over K

``W[n, k] = (weight - weight_zero_point) * weight_scale``. The layout of vLLM's
``cutlass_scaled_mm`` and ``cutlass_scaled_mm_azp``, which makes the zero points of dynamic
activations itself and takes them out of the product by ``azp_adj``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ctconvert.layouts.base import Layout, decode_side, encode_side, side_specs
from ctconvert.specs import QuantizedWeight, Support, TensorSpec, WeightSpec

if TYPE_CHECKING:
    import torch


#: Rows and columns that share a scale in the block-wise kernels.
BLOCK = (128, 128)
#: The largest K for which a sum of (x - zero) * weight, at most 255 * 128 each, stays in int32.
MOST_COLUMNS = 65536


def asymmetric_dynamic(spec: WeightSpec) -> bool:
    """Whether the kernel makes a zero point for every token."""
    return spec.kind == "int" and "asym dynamic" in (spec.activations or "")


class ScaledMM(Layout):
    name = "scaled-mm"
    takes = "dense INT8 and FP8, per tensor, per channel or (FP8) block-wise"
    writes = "weight, weight_scale, weight_zero_point, input_scale, input_zero_point, azp_adj"
    read_by = "W8A8 scaled matmul kernels"

    def supports(self, spec: WeightSpec) -> Support:
        if spec.family != "w8a8":
            return Support(f"scheme {spec.family} ({spec.label}) is not W8A8", other_kind=True)
        if spec.strategy != "channel" and not (spec.strategy == "block" and spec.kind == "float"):
            return Support(
                f"scale strategy {spec.strategy} of {spec.kind}8 weights; it takes per-tensor, "
                "per-channel and block-wise FP8"
            )
        if spec.block is not None and spec.block != BLOCK:
            return Support(f"scale blocks of {spec.block[0]} x {spec.block[1]}; it takes 128 x 128")
        if not spec.input_symmetric and not spec.side and not asymmetric_dynamic(spec):
            return Support(f"activations {spec.activations}, whose zero points nothing here makes")
        if spec.kind == "int" and spec.k > MOST_COLUMNS:
            return Support(
                f"K = {spec.k}: an int32 sum of more than {MOST_COLUMNS} products could overflow"
            )
        for name, value in spec.side_zero_points:
            if not -128 <= value <= 127:
                return Support(f"{name} is {value}, which is no INT8 value")
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        assert spec.scale_shape is not None
        element = "I8" if spec.kind == "int" else spec.element
        specs = {
            "weight": TensorSpec(element, (spec.n, spec.k)),
            "weight_scale": TensorSpec("F32", spec.scale_shape),
        }
        if not spec.symmetric:
            specs["weight_zero_point"] = TensorSpec("I8", spec.scale_shape)
        for name, _ in spec.side_zero_points:
            specs[name] = TensorSpec("I8", (1,))
        if asymmetric_dynamic(spec):
            specs["azp_adj"] = TensorSpec("I32", (1, spec.n))
        return specs | side_specs(spec)

    def views(self, spec: WeightSpec) -> dict[str, str]:
        return {"weight": "t"}

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        from ctconvert.transforms.cpu.sums import byte_sums
        from ctconvert.transforms.packed import unpack_int8

        spec = weight.spec
        assert weight.scale is not None
        codes = weight.codes
        if spec.storage == "packed":
            codes = unpack_int8(codes, 8, spec.k)
        made = {"weight": codes, "weight_scale": weight.scale.to(torch.float32)}
        if weight.zero_point is not None:
            # code - 128, in one byte
            made["weight_zero_point"] = (weight.zero_point ^ 0x80).view(torch.int8)
        for name, value in spec.side_zero_points:
            made[name] = torch.tensor([value], dtype=torch.int8, device=codes.device)
        if asymmetric_dynamic(spec):
            made["azp_adj"] = byte_sums(codes)[None]
        return made | encode_side(weight)

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        import torch

        from ctconvert.transforms.cpu.sums import byte_sums
        from ctconvert.transforms.dtypes import torch_dtype
        from ctconvert.transforms.packed import pack_int8

        assert spec.scale_dtype is not None
        codes = tensors["weight"]
        if asymmetric_dynamic(spec) and not torch.equal(byte_sums(codes)[None], tensors["azp_adj"]):
            raise ValueError("azp_adj are not the sums of weight over K")
        if spec.storage == "packed":
            codes = pack_int8(codes, 8)
        zero_point = None
        if not spec.symmetric:
            zero_point = tensors["weight_zero_point"].view(torch.uint8) ^ 0x80
        for name, value in spec.side_zero_points:
            if int(tensors[name]) != value:
                raise ValueError(f"{name} is {int(tensors[name])}, expected {value}")
        return QuantizedWeight(
            spec,
            codes=codes,
            scale=tensors["weight_scale"].to(torch_dtype(spec.scale_dtype)),
            zero_point=zero_point,
            side=decode_side(tensors, spec),
        )
