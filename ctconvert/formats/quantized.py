"""``int-quantized`` and ``float-quantized``: one element a code, unpacked.

Tensors of a module (N x K weight)::

    weight             i8 [N, K] signed codes of at most 8 bits, or f8_e4m3 [N, K]
    weight_scale       float [1], [N, 1], [N, K/G] or block-wise [ceil(N/bn), ceil(K/bk)]
    weight_zero_point  i8 [N, groups], signed                         (asymmetric)
    input_scale ...    float [1]                                      (static activations)

``naive-quantized`` is the same storage under an older, more general name. Source:
compressed-tensors, ``compressors/naive_quantized/base.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

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
from ctconvert.specs import Dtype, QuantizedWeight, WeightSpec

if TYPE_CHECKING:
    import torch


def _check_range(name: str, values: torch.Tensor, bits: int) -> None:
    """Raises ValueError naming the first of 2-D i8 values that ``bits`` bits cannot hold."""
    if bits == 8:
        return
    bound = 1 << (bits - 1)
    low, high = (int(value) for value in values.aminmax())
    if low < -bound or high >= bound:
        row, column = ((values < -bound) | (values >= bound)).nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{row}, {column}] is {values[row, column].item()}, outside the {bits}-bit range"
        )


class _Quantized(Format):
    weight_name = "weight"
    kinds: ClassVar[tuple[str, ...]]

    def spec(self, tensors: ModuleTensors, scheme: ModuleScheme) -> WeightSpec:
        args = weights_of(scheme, tensors)
        kind, bits = args.type, args.num_bits
        if kind not in self.kinds or (kind == "float" and bits != 8) or not 1 <= bits <= 8:
            raise tensors.error(f"the config says {kind}{bits}, which {self.name} does not store")
        element: Dtype = "I8" if kind == "int" else "F8_E4M3"
        n, k = tensors.check("weight", (element,), rank=2).shape
        check_not_empty(tensors, n, k)
        scale = scale_spec(tensors, args, n, k)
        if not args.symmetric:
            zero = tensors.check("weight_zero_point", ("I8",))
            rows = scale.shape[0]
            flat = scale.shape[1] == 1 and zero.shape == (rows,)
            single = scale.shape == (1, 1) and zero.shape == ()
            if zero.shape != scale.shape and not flat and not single:
                raise tensors.error(
                    f"weight_zero_point is {zero}, expected {list(scale.shape)} like the scale"
                )
        return weight_spec(scheme, tensors, n=n, k=k, storage="plain", scale=scale, element=element)

    def parameter_names(self, spec: WeightSpec) -> tuple[str, ...]:
        names = ("weight", "weight_scale")
        return names if spec.symmetric else (*names, "weight_zero_point")

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        import torch

        assert spec.scale_shape is not None
        scale = tensors["weight_scale"].reshape(spec.scale_shape)
        check_scale(scale)
        offset = 1 << (spec.bits - 1)
        codes = tensors["weight"]
        if spec.kind == "int":
            _check_range("weight", codes, spec.bits)
        zero_point = None
        if not spec.symmetric:
            signed = tensors["weight_zero_point"].reshape(spec.scale_shape)
            _check_range("weight_zero_point", signed, spec.bits)
            zero_point = (signed.to(torch.int16) + offset).to(torch.uint8)
        return QuantizedWeight(
            spec, codes=codes, scale=scale, zero_point=zero_point, side=decode_side(tensors, spec)
        )

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        assert weight.scale is not None
        made = {"weight": weight.codes, "weight_scale": weight.scale}
        if weight.zero_point is not None:
            offset = 1 << (weight.spec.bits - 1)
            signed = weight.zero_point.to(torch.int16) - offset
            made["weight_zero_point"] = signed.to(torch.int8)
        return made


class IntQuantized(_Quantized):
    name = "int-quantized"
    kinds = ("int",)


class FloatQuantized(_Quantized):
    name = "float-quantized"
    kinds = ("float",)


class NaiveQuantized(_Quantized):
    name = "naive-quantized"
    kinds = ("int", "float")
