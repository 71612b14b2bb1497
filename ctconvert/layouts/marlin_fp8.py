"""``marlin-fp8`` and ``marlin-fp8-f16``: FP8 weights for the Marlin mixed-precision GEMM.

Before (logical weight, N x K)::

    codes  f8_e4m3 [N, K]
    scale  float [N, 1], or [ceil(N/bn), ceil(K/bk)] block-wise

After::

    weight               i32 [K/16, N*4]          tiles of the codes' bytes
    weight_scale         bf16 or f16 [groups, N]  times 2**120 or 2**8, reordered along N
    weight_scale_source  as the scale was         where its dtype is not that of the activations
    input_scale          f32 [1]                  static activations; the kernel's are 16-bit

The kernel reads ``weight`` and ``weight_scale``, whose dtype is that of the activations, therefore
two layouts. Where the source's scales have another, the cast may round them, and they are kept.

N x K is what the kernel's tiles and whole scale blocks fit: other weights are padded before, with
code 0 and scale 0. The orders are those of :mod:`ctconvert.transforms.marlin` and
:mod:`ctconvert.transforms.fp8_marlin`: vLLM's ``prepare_fp8_layer_for_marlin``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from ctconvert.layouts.base import Layout, decode_side, encode_side, no_table, side_specs
from ctconvert.specs import SCALE_DTYPES, Dtype, QuantizedWeight, Support, TensorSpec, WeightSpec

if TYPE_CHECKING:
    import torch

#: Columns of a scale block that the kernel is built for.
BLOCK_COLUMNS = (32, 64, 128)


class MarlinFP8(Layout):
    """For bfloat16 activations."""

    name = "marlin-fp8"
    dtype: ClassVar[Dtype] = "BF16"
    takes = "FP8, per tensor, per channel or block-wise, for bfloat16 activations"
    writes = "weight, weight_scale, weight_scale_source, input_scale"
    read_by = "Marlin GEMM, SM75 and newer; Triton here"

    def padded_shape(self, spec: WeightSpec) -> tuple[int, int]:
        """The smallest N x K that the kernel's tiles fit, K a multiple of a scale block's."""
        from ctconvert.transforms.shapes import marlin_padded_shape

        n, k = marlin_padded_shape(spec.n, spec.k)
        if spec.block is not None and k % spec.block[1]:  # blocks of 128 only
            return -(-spec.n // 64) * 64, -(-spec.k // 128) * 128
        return n, k

    def supports(self, spec: WeightSpec) -> Support:
        if not (general := no_table(spec)):
            return general
        if spec.family != "w8a8" or spec.kind != "float":
            return Support(f"scheme {spec.family} ({spec.label}) is not FP8", other_kind=True)
        if spec.strategy not in ("channel", "block"):
            return Support(
                f"scale strategy {spec.strategy}; it takes per-tensor, per-channel and block-wise"
            )
        if spec.block is not None and spec.block[1] not in BLOCK_COLUMNS:
            return Support(
                f"scale blocks of {spec.block[0]} x {spec.block[1]}; it takes 32, 64 and 128 "
                "columns"
            )
        if spec.scale_dtype not in SCALE_DTYPES:
            return Support(f"{spec.scale_dtype} scales; it takes {', '.join(SCALE_DTYPES)}")
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        assert spec.scale_dtype is not None and spec.scale_shape is not None
        specs = {
            "weight": TensorSpec("I32", (spec.k // 16, spec.n * 4)),
            "weight_scale": TensorSpec(self.dtype, (spec.groups, spec.n)),
        }
        if spec.scale_dtype != self.dtype:
            specs["weight_scale_source"] = TensorSpec(spec.scale_dtype, spec.scale_shape)
        return specs | side_specs(spec)

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        from ctconvert.transforms.dtypes import torch_dtype
        from ctconvert.transforms.fp8_marlin import fp8_marlin_scales
        from ctconvert.transforms.marlin import marlin_pack

        spec, scale = weight.spec, weight.scale
        assert scale is not None
        if spec.block is not None and scale.shape[1] != -(-spec.k // spec.block[1]):
            raise ValueError(
                f"{spec.k} columns in blocks of {spec.block[1]} have {scale.shape[1]} scales"
            )
        made = {
            "weight": marlin_pack(weight.codes.contiguous().view(torch.int32), 8),
            "weight_scale": fp8_marlin_scales(scale, torch_dtype(self.dtype), spec.n, _rows(spec)),
        }
        if spec.scale_dtype != self.dtype:
            made["weight_scale_source"] = scale.contiguous()
        return made | encode_side(weight)

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        import torch

        from ctconvert.transforms.fp8_marlin import fp8_marlin_scales_back
        from ctconvert.transforms.marlin import marlin_unpack

        scale = tensors.get("weight_scale_source")
        if scale is None:
            scale = fp8_marlin_scales_back(tensors["weight_scale"], _rows(spec)).contiguous()
        words = marlin_unpack(tensors["weight"], 8, spec.n, spec.k)
        return QuantizedWeight(
            spec,
            codes=words.view(torch.float8_e4m3fn),
            scale=scale,
            side=decode_side(tensors, spec),
        )


def _rows(spec: WeightSpec) -> int:
    """Rows that share a scale."""
    return spec.block[0] if spec.block is not None else 1


class MarlinFP8Half(MarlinFP8):
    """For float16 activations."""

    name = "marlin-fp8-f16"
    dtype = "F16"
    takes = "FP8, per tensor, per channel or block-wise, for float16 activations"
