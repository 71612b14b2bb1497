"""``marlin-nvfp4`` and ``marlin-nvfp4-f16``: NVFP4 weights for the Marlin mixed-precision GEMM.

Before (logical weight, N x K)::

    codes                i32 [N, K/8]       K-packed E2M1
    scale                f8_e4m3 [N, K/16]
    weight_global_scale  f32 [1]            the divisor of all scales
    input_global_scale   f32 [1]            where the activations are quantised

After::

    weight                      i32 [K/16, N*2]   tiles
    weight_scale                u8 [K/16, N]      E5M3 bytes, times a power of two, reordered
    weight_scale_lost           u8 [N, K/32]      four bits a scale: what E5M3 flushed to 0
    weight_global_scale         f32 [1]           the kernel's factor, with the power taken out
    weight_global_scale_source  f32 [1]           the divisor
    input_global_scale          f32 [1]           as it was; the kernel's activations are 16-bit

The kernel reads ``weight``, ``weight_scale`` and ``weight_global_scale``. The other two are there
so that nothing is lost: E5M3 has no room for the subnormals of E4M3, and several divisors share one
reciprocal. How many scales are flushed, and which, is known only when they are read, but a layout's
shapes must be known before; so there is a plane for them, whether it is all 0 or not. At 1/32 byte
a weight it is half of the scales' own size, which keeping them whole would take.

The scales and the factor depend on the dtype of the activations, therefore two layouts. With
bfloat16 the power is that of the greatest scale of the weight, or of all experts in a stack; parts
of one kernel's weight that stay apart on disk have one each, and can be joined only where their
factors are equal.

N x K is what the kernel's tiles fit: other weights are padded before, with code 0 and scale 0. The
orders are those of :mod:`ctconvert.transforms.marlin` and :mod:`ctconvert.transforms.nvfp4`: vLLM's
``prepare_nvfp4_layer_for_marlin``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from ctconvert.layouts.base import Layout, of_family, packed_codes
from ctconvert.specs import Dtype, QuantizedWeight, Support, TensorSpec, WeightSpec

if TYPE_CHECKING:
    import torch


class MarlinNVFP4(Layout):
    """For bfloat16 activations."""

    name = "marlin-nvfp4"
    dtype: ClassVar[Dtype] = "BF16"
    takes = "NVFP4, with or without activation quantisation, for bfloat16 activations"
    writes = (
        "weight, weight_scale, weight_scale_lost, weight_global_scale, "
        "weight_global_scale_source, input_global_scale"
    )
    read_by = "Marlin GEMM, SM75 and newer; Triton here"

    def padded_shape(self, spec: WeightSpec) -> tuple[int, int]:
        """The smallest N x K that the kernel's tiles fit: (64, 128) or (128, 64) at a time."""
        from ctconvert.transforms.shapes import marlin_padded_shape

        return marlin_padded_shape(spec.n, spec.k)

    def supports(self, spec: WeightSpec) -> Support:
        if not (general := of_family(spec, "nvfp4")):
            return general
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        one = TensorSpec("F32", (1,))
        specs = {
            "weight": TensorSpec("I32", (spec.k // 16, spec.n * 2)),
            "weight_scale": TensorSpec("U8", (spec.k // 16, spec.n)),
            "weight_scale_lost": TensorSpec("U8", (spec.n, spec.k // 32)),
            "weight_global_scale": one,
            "weight_global_scale_source": one,
        }
        return specs | {name: one for name, _ in spec.side if name != "weight_global_scale"}

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        from ctconvert.transforms import nvfp4
        from ctconvert.transforms.dtypes import torch_dtype
        from ctconvert.transforms.marlin import marlin_pack

        assert weight.scale is not None
        side = dict(weight.side)
        divisor = side.pop("weight_global_scale")
        power = weight.power
        if power is None:
            power = nvfp4.nvfp4_power(weight.scale) if self.dtype == "BF16" else 0
        packed, lost = nvfp4.nvfp4_pack_scales(weight.scale, power)
        factor = nvfp4.nvfp4_global_scale(divisor, torch_dtype(self.dtype), power)
        return {
            "weight": marlin_pack(packed_codes(weight), 4),
            "weight_scale": packed,
            "weight_scale_lost": lost,
            "weight_global_scale": factor,
            "weight_global_scale_source": divisor,
        } | side

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        import torch

        from ctconvert.transforms import nvfp4
        from ctconvert.transforms.dtypes import torch_dtype
        from ctconvert.transforms.marlin import marlin_unpack

        divisor = tensors["weight_global_scale_source"]
        power = nvfp4.nvfp4_power_of(
            tensors["weight_global_scale"], divisor, torch_dtype(self.dtype)
        )
        scale = nvfp4.nvfp4_unpack_scales(
            tensors["weight_scale"], tensors["weight_scale_lost"], power
        )
        side = {name: tensors[name] for name, _ in spec.side}
        return QuantizedWeight(
            spec,
            codes=marlin_unpack(tensors["weight"], 4, spec.n, spec.k),
            scale=scale.view(torch.float8_e4m3fn),
            side=side | {"weight_global_scale": divisor},
            power=power,
        )

    def common_power(self, scales: Iterable[torch.Tensor]) -> int | None:
        import torch

        from ctconvert.transforms import nvfp4

        if self.dtype != "BF16":
            return None
        greatest = torch.stack([scale.view(torch.uint8).max() for scale in scales])
        # What is no scale is refused by its place when its weight is encoded.
        return nvfp4.nvfp4_power(greatest.clamp(max=nvfp4.GREATEST))


class MarlinNVFP4Half(MarlinNVFP4):
    """For float16 activations."""

    name = "marlin-nvfp4-f16"
    dtype = "F16"
    takes = "NVFP4, with or without activation quantisation, for float16 activations"
