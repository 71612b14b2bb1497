"""``pack-quantized``: INT codes of 1 to 8 bits packed along K into i32 words.

Tensors of a module (N x K weight, b bits, G group size)::

    weight_packed      i32 [N, words]      code k of a row is q + 2^(b-1), unsigned
    weight_scale       float [N, 1], [N, K/G] or [1]
    weight_shape       i64 [2]             N, K
    weight_zero_point  i32 [ceil(N*b/32), groups], packed along N     (asymmetric)
    weight_g_idx       i32 [K]             scale group of each column (actorder=group)

The logical weight keeps the words as they are (``storage = "packed"``): no path unpacks a whole
weight. Two packings share the name. ``dense`` (compressed-tensors 0.18 and newer): a row is one
bit string, ``ceil(K*b/32)`` words. ``padded`` (older): ``floor(32/b)`` codes a word. For b = 1,
2, 4 and 8 they are the same bytes. Source: compressed-tensors,
``compressors/pack_quantized/helpers.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ctconvert.formats.base import (
    DENSE_SINCE,
    Format,
    ModuleTensors,
    check_not_empty,
    check_scale,
    decode_side,
    scale_spec,
    weight_spec,
    weights_of,
)
from ctconvert.formats.quantization import ModuleScheme
from ctconvert.specs import Packing, QuantizedWeight, WeightSpec
from ctconvert.transforms.shapes import row_words

if TYPE_CHECKING:
    import torch


def _packing(tensors: ModuleTensors, words: int, k: int, bits: int) -> Packing:
    both: tuple[Packing, Packing] = ("dense", "padded")
    fits = [name for name in both if row_words(k, bits, name) == words]
    if not fits:
        raise tensors.error(
            f"weight_shape says K = {k}, but weight_packed has {words} words a row, not "
            f"{row_words(k, bits)} for {bits}-bit codes; one of the two is wrong"
        )
    if len(fits) == 1 or 32 % bits == 0:
        return fits[0]
    if tensors.version is None:
        raise tensors.error(
            f"{words} words a row fit both packings of {k} {bits}-bit codes and the config has no "
            "version to tell them apart; add the producer's compressed-tensors version as "
            "quantization_config.version"
        )
    return "dense" if tensors.version >= DENSE_SINCE else "padded"


def _check_padding(words: torch.Tensor, spec: WeightSpec) -> None:
    """Raises ValueError where the bits behind the last code of a row are not 0."""
    used = spec.k * spec.bits % 32
    if spec.packing == "padded":
        used = spec.k % spec.codes_per_word * spec.bits
    if used == 0:
        return
    wrong = (words[:, -1] >> used).nonzero()  # an arithmetic shift: 0 only where all bits are
    if wrong.numel():
        raise ValueError(f"weight_packed: row {int(wrong[0])} holds bits behind its last code")


class PackQuantized(Format):
    name = "pack-quantized"
    weight_name = "weight_packed"

    def spec(self, tensors: ModuleTensors, scheme: ModuleScheme) -> WeightSpec:
        args = weights_of(scheme, tensors)
        bits = args.num_bits
        if args.type != "int" or not 1 <= bits <= 8:
            raise tensors.error(
                f"the config says {args.type}{bits}, which pack-quantized does not store"
            )
        packed = tensors.check("weight_packed", ("I32",), rank=2)
        if "weight_shape" not in tensors.specs and tensors.experts:
            # experts that are parameters of one module have none: words are full
            n, k = packed.shape[0], packed.shape[1] * 32 // bits
        else:
            shape = tensors.check("weight_shape", ("I64", "I32"))
            if shape.shape not in ((2,), (2, 1)):
                raise tensors.error(f"weight_shape is {shape}, expected two elements")
            n, k = (int(value) for value in tensors.values["weight_shape"])
        if n != packed.shape[0] or k < 0:
            raise tensors.error(
                f"weight_shape says [{n}, {k}], but weight_packed is {packed}; one of the two "
                "is wrong"
            )
        check_not_empty(tensors, n, k)
        packing = _packing(tensors, packed.shape[1], k, bits)
        scale = scale_spec(tensors, args, n, k)
        g_idx = "weight_g_idx" in tensors.specs
        if scheme.actorder_group and not g_idx and args.strategy == "group":
            raise tensors.error(
                "the config says actorder=group, but there is no weight_g_idx to say which scale "
                "each column has"
            )
        if g_idx and tensors.check("weight_g_idx", ("I32", "I64")).shape != (k,):
            raise tensors.error(f"weight_g_idx is {tensors.specs['weight_g_idx']}, not [{k}]")
        if not args.symmetric:
            zero = tensors.check("weight_zero_point", ("I32",))
            want = (row_words(n, bits, packing), scale.shape[1])
            if zero.shape != want:
                raise tensors.error(
                    f"weight_zero_point is {zero}, expected {list(want)}: {bits}-bit zero points "
                    f"of {n} rows packed along N"
                )
        return weight_spec(
            scheme,
            tensors,
            n=n,
            k=k,
            storage="packed",
            scale=scale,
            packing=packing,
            has_g_idx=g_idx,
        )

    def parameter_names(self, spec: WeightSpec) -> tuple[str, ...]:
        names = ["weight_packed", "weight_scale", "weight_shape"]
        if not spec.symmetric:
            names.append("weight_zero_point")
        if spec.has_g_idx:
            names.append("weight_g_idx")
        return tuple(names)

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        import torch

        from ctconvert.transforms.packed import pack, unpack

        assert spec.scale_shape is not None
        scale = tensors["weight_scale"].reshape(spec.scale_shape)
        check_scale(scale)
        _check_padding(tensors["weight_packed"], spec)
        zero_point = None
        if not spec.symmetric:
            packed = tensors["weight_zero_point"].t().contiguous()
            codes = unpack(packed, spec.bits, spec.n, spec.packing)
            if not torch.equal(pack(codes, spec.bits, spec.packing), packed):
                raise ValueError("weight_zero_point holds bits behind its last code")
            zero_point = codes.t().contiguous()
        g_idx = None
        if spec.has_g_idx:
            stored = tensors["weight_g_idx"]
            low, high = (int(bound) for bound in stored.aminmax())
            if low == high == -1:
                raise ValueError(
                    "weight_g_idx is -1 throughout: act-order was asked for and never applied; "
                    "remove actorder from the config and the weight_g_idx tensors"
                )
            if low < 0 or high >= spec.groups:
                raise ValueError(
                    f"weight_g_idx holds {low if low < 0 else high}, outside the "
                    f"{spec.groups} scale groups"
                )
            g_idx = stored.to(torch.int32)
        return QuantizedWeight(
            spec,
            codes=tensors["weight_packed"],
            scale=scale,
            zero_point=zero_point,
            g_idx=g_idx,
            side=decode_side(tensors, spec),
        )

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        from ctconvert.transforms.packed import pack

        spec = weight.spec
        assert weight.scale is not None
        made = {"weight_packed": weight.codes, "weight_scale": weight.scale}
        if weight.zero_point is not None:
            rows = pack(weight.zero_point.t().contiguous(), spec.bits, spec.packing)
            made["weight_zero_point"] = rows.t().contiguous()
        if weight.g_idx is not None:
            made["weight_g_idx"] = weight.g_idx
        return made
