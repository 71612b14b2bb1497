"""The preset schemes a config may name in place of a group: ``{"W4A16": ["Linear"]}``.

Source: compressed-tensors 0.20, ``PRESET_SCHEMES`` in ``quantization/quant_scheme.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_Args = Mapping[str, Any]


def _scheme(weights: _Args, inputs: _Args | None = None) -> Mapping[str, _Args]:
    return {"weights": weights} | ({} if inputs is None else {"input_activations": inputs})


def _grouped(bits: int, size: int, kind: str, strategy: str = "group", **more: Any) -> _Args:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": size, **more}


def _token(bits: int, kind: str) -> _Args:
    return {"num_bits": bits, "type": kind, "strategy": "token", "dynamic": True}


def _mx(bits: int, dynamic: bool = False) -> _Args:
    return _grouped(bits, 32, "float", dynamic=dynamic, scale_dtype="uint8", zp_dtype="uint8")


def _nv(dynamic: bool | str = False) -> _Args:
    return _grouped(4, 16, "float", "tensor_group", dynamic=dynamic, scale_dtype="float8_e4m3fn")


_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
_FP8_CHANNEL = _FP8 | {"strategy": "channel"}
_W8A8 = _scheme({"num_bits": 8, "type": "int", "strategy": "channel"}, _token(8, "int"))

#: Bits of the weights, bits of the activations (16: not quantised).
_INT = (
    *((2, 4), (2, 8), (2, 16), (3, 4), (3, 8), (3, 16), (4, 4), (4, 8), (4, 16)),
    *((5, 8), (5, 16), (6, 8), (6, 16), (7, 8), (7, 16), (8, 16)),
)

#: Config groups without their targets, by name in upper case.
PRESETS: Mapping[str, Mapping[str, _Args]] = {
    "UNQUANTIZED": {},
    "W4A16_ASYM": _scheme(_grouped(4, 128, "int", symmetric=False)),
    "W8A8": _W8A8,
    "INT8": _W8A8,
    "W4AFP8": _scheme(_grouped(4, 128, "int"), _token(8, "float")),
    "FP8": _scheme(_FP8, _FP8),
    "FP8_DYNAMIC": _scheme(_FP8_CHANNEL, _token(8, "float")),
    "FP8_BLOCK": _scheme(
        _FP8 | {"strategy": "block", "block_structure": [128, 128]},
        _grouped(8, 128, "float", dynamic=True),
    ),
    "NVFP4A16": _scheme(_nv()),
    "NVFP4": _scheme(_nv(), _nv("local")),
    "MXFP4A16": _scheme(_mx(4)),
    "MXFP4": _scheme(_mx(4), _mx(4, True)),
    "MXFP4XFP8": _scheme(_mx(4), _grouped(8, 128, "float", dynamic=True)),
    "MXFP6A16": _scheme(_mx(6)),
    "MXFP6A8": _scheme(_mx(6), _mx(8, True)),
    "MXFP8A16": _scheme(_mx(8)),
    "MXFP8": _scheme(_mx(8), _mx(8, True)),
    **{
        f"W{bits}A{inputs}": _scheme(
            _grouped(bits, 128, "int"), _token(inputs, "int") if inputs < 16 else None
        )
        for bits, inputs in _INT
    },
}
