"""``sparse-24-bitmask``: 2:4 sparse weights, kept values and a bitmask.

Tensors of a module (N x K weight)::

    compressed    f16, bf16, i8 or f8_e4m3 [N, K/2]   the kept values, in column order
    bitmask       u8 [N, ceil(K/8)]                   bit j of byte c: column 8c + j is kept
    shape         i64 [2, 1] or [2]                   N, K
    weight_scale, input_scale, ...                    where the kept values are quantised

Exactly two of every four columns are kept, also where fewer are nonzero. The logical weight is
the dense one; -0.0 of the 16-bit floats becomes +0.0, as the sparse kernels read it, so a weight
that is encoded again may differ from the source in the sign of zeros and in which zero is kept.

compressed-tensors stopped reading this format in 0.12 or so; its own decompressor is gone, and this
is one. Source: compressed-tensors 0.11, ``compressors/sparse_compressors/sparse_24_bitmask.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ctconvert.formats.base import (
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
from ctconvert.specs import QuantizedWeight, WeightSpec

if TYPE_CHECKING:
    import torch


class Sparse24Bitmask(Format):
    name = "sparse-24-bitmask"
    weight_name = "compressed"

    def spec(self, tensors: ModuleTensors, scheme: ModuleScheme) -> WeightSpec:
        elements: tuple[str, ...] = ("F16", "BF16")
        if scheme.scheme is not None:
            args = weights_of(scheme, tensors)
            if args.num_bits != 8:
                raise tensors.error(
                    f"the config says {args.type}{args.num_bits} and 2:4 sparse, which "
                    f"{self.name} does not store"
                )
            elements = ("I8",) if args.type == "int" else ("F8_E4M3",)
        compressed = tensors.check("compressed", elements, rank=2)
        bitmask = tensors.check("bitmask", ("U8",), rank=2)
        shape = tensors.check("shape", ("I64",))
        if shape.shape not in ((2,), (2, 1)):
            raise tensors.error(f"shape is {shape}, expected two elements")
        n, k = (int(value) for value in tensors.values["shape"])
        check_not_empty(tensors, n, k)
        if k % 4 or compressed.shape != (n, k // 2) or bitmask.shape != (n, -(-k // 8)):
            raise tensors.error(
                f"shape says [{n}, {k}], but compressed is {compressed} and bitmask {bitmask}; "
                f"expected [N, K/2] and [N, K/8] with K a multiple of 4"
            )
        if scheme.scheme is None:
            return WeightSpec(
                format=self.name,
                family="sparse24",
                kind="float",
                bits=16,
                n=n,
                k=k,
                storage="plain",
                element=compressed.dtype,
                sparse=True,
                embedding=tensors.embedding,
            )
        scale = scale_spec(tensors, args, n, k)
        if not args.symmetric:
            raise tensors.error("a 2:4 sparse weight with zero points has no zeros to leave out")
        return weight_spec(
            scheme,
            tensors,
            n=n,
            k=k,
            storage="plain",
            scale=scale,
            element=compressed.dtype,
            sparse=True,
        )

    def parameter_names(self, spec: WeightSpec) -> tuple[str, ...]:
        names = ("compressed", "bitmask", "shape")
        return names if spec.scale_shape is None else (*names, "weight_scale")

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        from ctconvert.transforms.sparse24 import pairs_of_bitmask

        codes, pairs = pairs_of_bitmask(tensors["compressed"], tensors["bitmask"], spec.k)
        scale = None
        if spec.scale_shape is not None:
            scale = tensors["weight_scale"].reshape(spec.scale_shape)
            check_scale(scale)
        side = decode_side(tensors, spec)
        return QuantizedWeight(spec, codes=codes, scale=scale, side=side, pairs=pairs)

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        from ctconvert.transforms.sparse24 import bitmask_of_pairs

        assert weight.pairs is not None
        compressed, bitmask = bitmask_of_pairs(weight.codes, weight.pairs, weight.spec.k)
        made = {"compressed": compressed, "bitmask": bitmask}
        if weight.scale is not None:
            made["weight_scale"] = weight.scale
        return made
