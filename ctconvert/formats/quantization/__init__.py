"""The quantization_config of a config.json, read without compressed-tensors, torch or pydantic.

``settings`` says which module has which scheme. ``reading`` reads the config groups into
``records``; what it does not know, ``handover`` gives to compressed-tensors.
"""

from ctconvert.formats.quantization.config import (
    OTHER_METHODS,
    copies_of_config,
    with_config,
)
from ctconvert.formats.quantization.families import activations_label, family
from ctconvert.formats.quantization.names import guess_class, looks_linear
from ctconvert.formats.quantization.records import (
    FORMAT_NAMES,
    ModuleScheme,
    QuantArgs,
    Scheme,
)
from ctconvert.formats.quantization.settings import QuantizationSettings

__all__ = [
    "FORMAT_NAMES",
    "OTHER_METHODS",
    "ModuleScheme",
    "QuantArgs",
    "QuantizationSettings",
    "Scheme",
    "activations_label",
    "copies_of_config",
    "family",
    "guess_class",
    "looks_linear",
    "with_config",
]
