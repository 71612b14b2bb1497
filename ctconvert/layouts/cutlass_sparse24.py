"""``cutlass-sparse24``: 2:4 sparse weights as CUTLASS 3.x kernels for SM90 read them.

Before (logical weight, N x K, at most two nonzeros in every four columns)::

    codes  f16, bf16, i8 or f8_e4m3 [N, K/2]
    pairs  u8 [N, ceil(K/8)]
    scale  [N, 1], or none (sparse-only)

After::

    weight        [N, K/2]       the kept values
    meta          u8 [Np, Kp/8]  their positions; Np = N up to 64, Kp = K up to 128
    weight_scale  f32 [N, 1]; sparse-only: ones [1]
    input_scale   f32 [1] where activations are static; sparse-only: ones [1]

``meta`` is in the order of CUTLASS's own SM90 compressor; see
:mod:`ctconvert.transforms.sparse24` for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ctconvert.layouts.base import (
    Layout,
    decode_side,
    encode_side,
    no_table,
    side_specs,
    symmetric_activations,
)
from ctconvert.specs import QuantizedWeight, Support, TensorSpec, WeightSpec

if TYPE_CHECKING:
    import torch

_ONES = ("weight_scale", "input_scale")


class CutlassSparse24(Layout):
    name = "cutlass-sparse24"
    takes = "2:4 sparse FP16, BF16; INT8 and FP8 with activations of that type"
    writes = "weight, meta, weight_scale, input_scale"
    read_by = "CUTLASS 3.x sparse GEMM, SM90"

    def supports(self, spec: WeightSpec) -> Support:
        if not spec.sparse:
            return Support("the weight is not 2:4 sparse", other_kind=True)
        if not (general := no_table(spec)):
            return general
        if spec.element not in ("F16", "BF16", "I8", "F8_E4M3"):
            return Support(f"{spec.element} values; it takes F16, BF16, I8 and F8_E4M3")
        multiple = 16 if spec.element in ("F16", "BF16") else 32
        if spec.n % 8 or spec.k % multiple:
            return Support(
                f"{spec.n}x{spec.k}: the kernel copies 16 bytes at a time and needs N % 8 == 0 and "
                f"K % {multiple} == 0"
            )
        if spec.scale_shape is None:
            return Support()
        if spec.strategy != "channel":
            return Support(f"scale strategy {spec.strategy}; it takes per-tensor and per-channel")
        if spec.input_type != spec.element:
            have = spec.activations or "16-bit activations"
            return Support(f"{spec.element} weights need activations of that type, not {have}")
        if not (activations := symmetric_activations(spec)):
            return activations
        if not spec.input_symmetric:
            return Support("asymmetric activations, whose zero point the kernel would ignore")
        if any(name != "input_scale" for name, _ in spec.side):
            return Support("a static output scale, which the kernel does not apply")
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        rows, columns = -(-spec.n // 64) * 64, -(-spec.k // 128) * 128
        specs = {
            "weight": TensorSpec(spec.element, (spec.n, spec.k // 2)),
            "meta": TensorSpec("U8", (rows, columns // 8)),
        }
        if spec.scale_shape is None:
            return specs | {name: TensorSpec("F32", (1,)) for name in _ONES}
        return specs | {"weight_scale": TensorSpec("F32", (spec.n, 1))} | side_specs(spec)

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        from ctconvert.transforms.sparse24 import sm90_meta

        values, pairs = weight.codes, weight.pairs
        assert pairs is not None
        made = {"weight": values.contiguous(), "meta": sm90_meta(values, pairs, weight.spec.k)}
        if weight.scale is None:
            return made | {name: torch.ones(1, device=values.device) for name in _ONES}
        return made | {"weight_scale": weight.scale.to(torch.float32)} | encode_side(weight)

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        from ctconvert.transforms.dtypes import torch_dtype
        from ctconvert.transforms.sparse24 import pairs_of_sm90

        codes, pairs = pairs_of_sm90(tensors["weight"], tensors["meta"], spec.n, spec.k)
        scale = None
        if spec.scale_dtype is not None:
            scale = tensors["weight_scale"].to(torch_dtype(spec.scale_dtype))
        side = decode_side(tensors, spec)
        return QuantizedWeight(spec, codes=codes, scale=scale, side=side, pairs=pairs)
