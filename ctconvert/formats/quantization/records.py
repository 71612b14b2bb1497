"""How a module is quantised, as records: what compressed-tensors' models say, without its import.

Source: compressed-tensors 0.20, ``quantization/quant_args.py`` and ``quant_scheme.py``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from ctconvert.specs import Strategy

#: The formats compressed-tensors knows; a config group may name each but ``mixed-precision``.
FORMAT_NAMES = (
    "dense",
    "float-quantized",
    "int-quantized",
    "marlin-24",
    "mixed-precision",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "pack-quantized",
    "sparse-24-bitmask",
    "sparse-bitmask",
)

_Edge = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class QuantArgs(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """compressed-tensors' ``QuantizationArgs``, settled: nothing is left to be inferred.

    ``actorder`` is ``group`` where the columns carry a ``weight_g_idx``, which newer
    compressed-tensors versions no longer accept. The dtypes are torch's names. Observers are left
    out: they have done their work.
    """

    num_bits: Annotated[int, Meta(ge=1, le=32)] = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    group_size: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    strategy: Strategy = "tensor"
    block_structure: tuple[_Edge, _Edge] | None = None
    dynamic: bool | Literal["local"] = False
    actorder: Literal["weight", "group"] | None = None
    scale_dtype: str | None = None
    zp_dtype: str | None = None


class Scheme(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """compressed-tensors' ``QuantizationScheme``: one config group."""

    targets: tuple[str, ...]
    weights: QuantArgs | None = None
    input_activations: QuantArgs | None = None
    output_activations: QuantArgs | None = None
    format: str | None = None


class ModuleScheme(Struct, frozen=True):
    """The scheme of one module.

    ``format`` is the compressed-tensors format its tensors are stored in, ``scheme`` its config
    group (None for a sparse-only module) and ``group`` that group's name, ``target`` what in the
    config means the module, and ``by`` how: its very name, a pattern, or its class.
    """

    format: str
    scheme: Scheme | None
    target: str
    sparse: bool = False
    group: str = "sparsity_config"
    by: Literal["name", "pattern", "class"] = "class"

    @property
    def weights(self) -> QuantArgs | None:
        return None if self.scheme is None else self.scheme.weights

    @property
    def actorder_group(self) -> bool:
        """Whether the columns carry a ``weight_g_idx``."""
        return self.weights is not None and self.weights.actorder == "group"
