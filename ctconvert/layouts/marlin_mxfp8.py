"""``marlin-mxfp8``: MXFP8 weights for the Marlin mixed-precision GEMM.

Before (logical weight, N x K)::

    codes  f8_e4m3 [N, K]
    scale  E8M0 bytes [N, K/32]

After::

    weight        i32 [K/16, N*4]       tiles of the codes' bytes
    weight_scale  E8M0 bytes [K/32, N]  reordered along N

N x K is what the kernel's tiles fit: other weights are padded before, with code 0 and scale 0 (byte
0 of E8M0 is the smallest scale; code 0 is 0.0). The orders are those of
:mod:`ctconvert.transforms.marlin` and, for the scales, of ``marlin-mxfp4``: vLLM's
``prepare_mxfp8_layer_for_marlin``. Nothing depends on the activations' dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ctconvert.layouts.base import Layout, of_family
from ctconvert.specs import QuantizedWeight, Support, TensorSpec, WeightSpec

if TYPE_CHECKING:
    import torch


class MarlinMXFP8(Layout):
    name = "marlin-mxfp8"
    takes = "MXFP8, with or without activation quantisation"
    writes = "weight, weight_scale"
    read_by = "Marlin GEMM, SM80 and newer; Triton here"

    def padded_shape(self, spec: WeightSpec) -> tuple[int, int]:
        """The smallest N x K that the kernel's tiles fit: (64, 128) or (128, 64) at a time."""
        from ctconvert.transforms.shapes import marlin_padded_shape

        return marlin_padded_shape(spec.n, spec.k)

    def supports(self, spec: WeightSpec) -> Support:
        if not (general := of_family(spec, "mxfp8")):
            return general
        if spec.side:
            return Support(f"static activation scales ({spec.activations}); the kernel takes none")
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        assert spec.scale_dtype is not None
        return {
            "weight": TensorSpec("I32", (spec.k // 16, spec.n * 4)),
            "weight_scale": TensorSpec(spec.scale_dtype, (spec.k // 32, spec.n)),
        }

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        from ctconvert.transforms.marlin import marlin_pack
        from ctconvert.transforms.nvfp4 import tile_scales

        assert weight.scale is not None
        scales = tile_scales(weight.scale.contiguous().view(torch.uint8))
        return {
            "weight": marlin_pack(weight.codes.contiguous().view(torch.int32), 8),
            "weight_scale": scales.view(weight.scale.dtype),
        }

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        import torch

        from ctconvert.transforms.marlin import marlin_unpack
        from ctconvert.transforms.nvfp4 import untile_scales

        stored = tensors["weight_scale"]
        words = marlin_unpack(tensors["weight"], 8, spec.n, spec.k)
        return QuantizedWeight(
            spec,
            codes=words.view(torch.float8_e4m3fn),
            scale=untile_scales(stored.view(torch.uint8)).view(stored.dtype),
        )
