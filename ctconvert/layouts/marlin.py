"""``marlin`` and ``marlin-mxfp4``: tensor-core tiles of the Marlin mixed-precision GEMM.

Before (logical weight, N x K, b = 4 or 8 bits, f = 32/b)::

    codes       i32 [N, K/f]            K-packed
    scale       [N, K/G] or [N, 1]      MXFP4: E8M0 bytes [N, K/32]
    zero_point  u8 [N, groups]          asymmetric
    g_idx       i32 [K]                 act-order

After, ``marlin``::

    qweight              i32 [K/16, N*16/f]     tiles
    scales               [groups, N]            reordered along N, in the source's dtype; a
                                                single row in the channel-wise order
    qzeros               i32 [groups, N/f]      reordered and packed along N    asymmetric
    g_idx_sort_indices   i32 [K]                column j of the tiles is the weight's column [j]

After, ``marlin-mxfp4``::

    weight        i32 [K/16, N*2]
    weight_scale  E8M0 bytes [K/32, N]

N x K is what the kernel's tiles fit: other weights are padded before, with code 0 and scale 0 (byte
0 of E8M0 is the smallest scale; code 0 is 0.0). The orders are those of
:mod:`ctconvert.transforms.marlin`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ctconvert.layouts.base import (
    Layout,
    decode_side,
    encode_side,
    of_family,
    packed_codes,
    side_specs,
    weight_only,
)
from ctconvert.specs import QuantizedWeight, Support, TensorSpec, WeightSpec
from ctconvert.transforms.shapes import marlin_padded_shape

if TYPE_CHECKING:
    import torch

#: Group sizes the kernel is built for, besides channel-wise.
GROUP_SIZES = (32, 64, 128)


class _Marlin(Layout):
    read_by = "Marlin GEMM, SM80 and newer; Triton here"

    def padded_shape(self, spec: WeightSpec) -> tuple[int, int]:
        """The smallest N x K that the kernel's tiles fit: (64, 128) or (128, 64) at a time."""
        return marlin_padded_shape(spec.n, spec.k)


class Marlin(_Marlin):
    name = "marlin"
    takes = "INT 4, 8 bits, symmetric or not, groups of 32, 64, 128 or channel-wise, act-order"
    writes = "qweight, scales, qzeros, g_idx_sort_indices"

    def supports(self, spec: WeightSpec) -> Support:
        if not (general := weight_only(spec)):
            return general
        if spec.bits not in (4, 8):
            return Support(f"{spec.bits}-bit codes; it takes 4 and 8")
        if spec.scale_dtype not in ("F16", "BF16"):
            return Support(f"{spec.scale_dtype} scales; it takes F16 and BF16")
        if spec.strategy == "group" and spec.group_size not in GROUP_SIZES:
            return Support(f"group size {spec.group_size}; it takes 32, 64, 128 and channel-wise")
        if spec.k % spec.codes_per_word:
            return Support(f"K = {spec.k} is no multiple of {spec.codes_per_word} codes a word")
        _, k = self.padded_shape(spec)
        if spec.group_size and k % spec.group_size:
            return Support(f"K = {spec.k} padded to {k} is no multiple of the group size")
        if spec.has_g_idx and k != spec.k:
            return Support(f"act-order with K = {spec.k}, which would have to be padded to {k}")
        if spec.has_g_idx and not spec.symmetric:
            return Support("act-order with zero points, which the kernel does not combine")
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        words = spec.n // spec.codes_per_word
        assert spec.scale_dtype is not None
        specs = {
            "qweight": TensorSpec("I32", (spec.k // 16, 16 * words)),
            "scales": TensorSpec(spec.scale_dtype, (spec.groups, spec.n)),
        }
        if not spec.symmetric:
            specs["qzeros"] = TensorSpec("I32", (spec.groups, words))
        if spec.has_g_idx:
            specs["g_idx_sort_indices"] = TensorSpec("I32", (spec.k,))
        return specs | side_specs(spec)

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        from ctconvert.transforms import marlin

        spec = weight.spec
        codes, scale, perm = packed_codes(weight), weight.scale, None
        assert scale is not None
        if weight.g_idx is not None:
            _check_whole_groups(weight.g_idx, spec)
            codes, perm = marlin.sort_columns(codes, weight.g_idx, spec.bits)
        scales = scale.t().contiguous()
        made = {
            "qweight": marlin.marlin_pack(codes, spec.bits),
            "scales": marlin.marlin_permute_scales(scales, channelwise=scales.shape[0] == 1),
        }
        if weight.zero_point is not None:
            zeros = weight.zero_point.t().contiguous()
            made["qzeros"] = marlin.marlin_pack_zero_points(zeros, spec.bits)
        if perm is not None:
            made["g_idx_sort_indices"] = perm
        return made | encode_side(weight)

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        import torch

        from ctconvert.transforms import marlin
        from ctconvert.transforms.packed import unpack_int8

        codes = marlin.marlin_unpack(tensors["qweight"], spec.bits, spec.n, spec.k)
        g_idx = None
        if spec.has_g_idx:
            perm = tensors["g_idx_sort_indices"]
            codes = marlin.unsort_columns(codes, perm, spec.bits)
            g_idx = torch.empty_like(perm)
            group = spec.group_size or spec.k
            columns = torch.arange(spec.k, dtype=torch.int32, device=perm.device)
            g_idx[perm.long()] = columns // group
        if spec.storage == "plain":
            codes = unpack_int8(codes, spec.bits, spec.k)
        scales = tensors["scales"]
        scales = marlin.marlin_unpermute_scales(scales, channelwise=scales.shape[0] == 1)
        zero_point = None
        if not spec.symmetric:
            zeros = marlin.marlin_unpack_zero_points(tensors["qzeros"], spec.bits)
            zero_point = zeros.t().contiguous()
        return QuantizedWeight(
            spec,
            codes=codes,
            scale=scales.t().contiguous(),
            zero_point=zero_point,
            g_idx=g_idx,
            side=decode_side(tensors, spec),
        )


def _check_whole_groups(g_idx: torch.Tensor, spec: WeightSpec) -> None:
    """The kernel derives a column's group from its sorted position: groups must be whole."""
    counts = g_idx.bincount(minlength=spec.groups)
    uneven = (counts != (spec.group_size or spec.k)).nonzero()
    if uneven.numel():
        group = int(uneven[0])
        raise ValueError(
            f"weight_g_idx gives group {group} {int(counts[group])} columns, not "
            f"{spec.group_size or spec.k}"
        )


class MarlinMXFP4(_Marlin):
    name = "marlin-mxfp4"
    takes = "MXFP4, with or without activation quantisation"
    writes = "weight, weight_scale"

    def supports(self, spec: WeightSpec) -> Support:
        if not (general := of_family(spec, "mxfp4")):
            return general
        if spec.side:
            return Support(f"static activation scales ({spec.activations}); the kernel takes none")
        return Support()

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        assert spec.scale_dtype is not None
        return {
            "weight": TensorSpec("I32", (spec.k // 16, spec.n * 2)),
            "weight_scale": TensorSpec(spec.scale_dtype, (spec.k // 32, spec.n)),
        }

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        from ctconvert.transforms import marlin

        assert weight.scale is not None
        scales = weight.scale.view(torch.uint8).t().contiguous()
        return {
            "weight": marlin.marlin_pack(packed_codes(weight), 4),
            "weight_scale": marlin.marlin_permute_mxfp4_scales(scales).view(weight.scale.dtype),
        }

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        import torch

        from ctconvert.transforms import marlin

        stored = tensors["weight_scale"]
        scales = marlin.marlin_unpermute_mxfp4_scales(stored.view(torch.uint8))
        return QuantizedWeight(
            spec,
            codes=marlin.marlin_unpack(tensors["weight"], 4, spec.n, spec.k),
            scale=scales.t().contiguous().view(stored.dtype),
        )
