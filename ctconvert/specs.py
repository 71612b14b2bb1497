"""What travels between the parts: tensor specs, weight specs, the logical weight, Support.

No torch import here: planning works on headers alone and must start quickly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, Struct

if TYPE_CHECKING:
    import torch

#: Bits per element of every dtype a safetensors header may name.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}

#: Dtypes a floating-point scale may have.
SCALE_DTYPES = ("F16", "BF16", "F32")


#: A safetensors dtype name.
Dtype = Literal[
    "BOOL",
    "U8",
    "I8",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "I64",
    "U64",
    "F64",
    "C64",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
]
#: How codes of 3, 5, 6 and 7 bits lie in words; the same for the other widths.
Packing = Literal["dense", "padded"]
Family = Literal[
    "sparse24", "mxfp4", "mxfp8", "nvfp4", "wna8o8", "w8a8", "w4a8", "wna16", "embedding", "other"
]
Strategy = Literal["tensor", "channel", "group", "block", "tensor_group", "token", "attn_head"]
Size = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=1, le=2**63 - 1)]


class TensorSpec(Struct, frozen=True, dict=True):
    """Dtype (safetensors name, for instance ``BF16``) and shape of a tensor."""

    dtype: Dtype
    shape: tuple[Size, ...]

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Support:
    """Whether a layout takes a weight; falsy with a reason the user can act on.

    ``other_kind`` marks a weight that the layout is not for at all, which needs no mention where
    another layout is for it.
    """

    reason: str = ""
    other_kind: bool = False

    def __bool__(self) -> bool:
        return not self.reason


class WeightSpec(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One quantised weight as a format describes it and a layout judges it; no data.

    ``n`` output features (rows), ``k`` input features (columns). ``storage`` says how
    :attr:`QuantizedWeight.codes` holds the codes:

    - ``packed``: i32 [N, words], unsigned codes of ``bits`` bits, K-packed, little-endian,
      ``packing`` being ``dense`` or ``padded`` (they differ only for 3, 5, 6 and 7 bits);
    - ``plain``: [N, K] in ``element`` (``I8`` signed, ``F8_E4M3``, ``BF16``, ``F16``); where
      ``sparse``, the two of every four columns that are stored, [N, K/2].

    ``scale_shape`` is the logical 2-D shape: [1, 1] per tensor, [N, 1] per channel,
    [N, K/G] grouped, [ceil(N/bn), ceil(K/bk)] block-wise; None where there is no scale.
    ``input_type`` is the dtype of quantised inputs (``I8``, ``F8_E4M3`` or another name). ``side``
    are the static activation scales in use, by name, with the source's dtype; ``side_zero_points``
    their zero points by value.
    """

    format: str
    family: Family
    kind: Literal["int", "float"]
    bits: Annotated[int, Meta(ge=1, le=16)]
    n: Count
    k: Count
    storage: Literal["packed", "plain"]
    element: Dtype = "I32"
    packing: Packing = "dense"
    strategy: Strategy | None = None
    group_size: Count | None = None
    block: tuple[Count, Count] | None = None
    symmetric: bool = True
    scale_dtype: Dtype | None = None
    scale_shape: tuple[Count, Count] | None = None
    has_g_idx: bool = False
    sparse: bool = False
    embedding: bool = False
    activations: str | None = None
    input_type: str | None = None
    input_symmetric: bool = True
    side: tuple[tuple[str, Dtype], ...] = ()
    side_zero_points: tuple[tuple[str, int], ...] = ()

    @property
    def codes_per_word(self) -> int:
        return 32 // self.bits

    @property
    def groups(self) -> int:
        """Scale columns: 1 per tensor or channel, K/G grouped."""
        return self.scale_shape[1] if self.scale_shape else 1

    @property
    def label(self) -> str:
        """For people: ``int4 sym g64``, ``fp8 channel``."""
        parts = [f"{'fp' if self.kind == 'float' else 'int'}{self.bits}"]
        if self.element in ("F16", "BF16"):
            parts = [self.element.lower()]
        if self.kind == "int":
            parts.append("sym" if self.symmetric else "asym")
        if self.strategy == "group" and self.group_size:
            parts.append(f"g{self.group_size}")
        elif self.strategy:
            parts.append(self.strategy)
        if self.has_g_idx:
            parts.append("actorder")
        if self.sparse:
            parts.append("2:4")
        if self.activations:
            parts.append(self.activations)
        return " ".join(parts)


def differing_field(a: WeightSpec, b: WeightSpec) -> str | None:
    """The first field that two specs differ in."""
    fields = WeightSpec.__struct_fields__
    return next((name for name in fields if getattr(a, name) != getattr(b, name)), None)


@dataclass
class QuantizedWeight:
    """The hub: what every format decodes to and every layout encodes from.

    - ``codes``: as ``spec.storage`` says (see :class:`WeightSpec`);
    - ``pairs``: u8 [N, ceil(K/8)], which columns a 2:4 sparse weight stores, as
      :mod:`ctconvert.transforms.sparse24` has them; else None;
    - ``scale``: [rows, columns] of ``spec.scale_shape`` in the source's dtype, or None;
    - ``zero_point``: u8 [N, groups], unsigned codes, or None where symmetric;
    - ``g_idx``: i32 [K], the scale group of each column (act-order), or None;
    - ``side``: ``input_scale`` / ``output_scale`` [1] in the source's dtype;
    - ``power``: the power of two by which a layout multiplies the scales, where a stack has one for
      all of its weights or the layout has told the one it found; not part of the weight.
    """

    spec: WeightSpec
    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None
    side: dict[str, torch.Tensor] = field(default_factory=dict)
    power: int | None = None
    pairs: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the weight by name, for comparison."""
        found: dict[str, Any] = {
            "codes": self.codes,
            "pairs": self.pairs,
            "scale": self.scale,
            "zero_point": self.zero_point,
            "g_idx": self.g_idx,
            **self.side,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}
