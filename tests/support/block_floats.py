"""NVFP4, MXFP8 and FP8 weights for tests, made by compressed-tensors' own compressors."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

from ctconvert.formats.base import Format, ModuleTensors
from ctconvert.formats.mxfp8 import MXFP8Quantized
from ctconvert.formats.nvfp4 import NVFP4Packed
from ctconvert.formats.quantization import ModuleScheme
from ctconvert.formats.quantization.reading import read_group
from ctconvert.formats.quantized import FloatQuantized
from ctconvert.specs import QuantizedWeight
from ctconvert.transforms.dtypes import spec_of
from support.builders import group_config, quantised, weight_args

Tensors = dict[str, torch.Tensor]
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
STATIC_FP8 = FP8 | {"dynamic": False, "strategy": "tensor"}


def nvfp4_group(inputs: bool = True) -> dict[str, Any]:
    args = weight_args(
        4, kind="float", strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"
    )
    activations = args | {"dynamic": "local"} if inputs else None
    return group_config(args, format="nvfp4-pack-quantized", inputs=activations)


def mxfp8_group(inputs: bool = False) -> dict[str, Any]:
    args = weight_args(8, 32, kind="float", scale_dtype="torch.uint8")
    activations = args | {"dynamic": True} if inputs else None
    return group_config(args, format="mxfp8-quantized", inputs=activations)


def fp8_group(
    strategy: str = "channel", inputs: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    args = weight_args(8, kind="float", strategy=strategy, **more)
    return group_config(args, format="float-quantized", inputs=inputs)


def nvfp4(n: int, k: int, seed: int = 0, inputs: bool = True, greatest: float = 448.0) -> Tensors:
    """As the producer stores it: the scales of every size, subnormals and 0 among them."""
    made = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.rand((n, k // 16), generator=made) * 16 - 10)
    scale = scale.clamp(max=greatest)
    scale[torch.rand(scale.shape, generator=made) < 0.05] = 0
    scale[n // 2, k // 32] = greatest
    scale = scale.to(torch.float8_e4m3fn).float()
    divisor = torch.rand(1, generator=made) * 9000 + 100
    codes = torch.randn((n, k), generator=made) * 2
    weight = codes * (scale / divisor).repeat_interleave(16, 1)
    scheme = QuantizationScheme.model_validate(nvfp4_group(inputs))
    state = {
        "weight": weight,
        "weight_scale": scale.clamp(min=2.0**-9),  # the compressor divides by it
        "weight_global_scale": divisor,
    }
    found = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").compress(state, scheme)
    found["weight_scale"].view(torch.uint8)[scale == 0] = 0
    if inputs:
        found["input_global_scale"] = torch.rand(1, generator=made) * 100 + 1
    return {name: tensor.contiguous() for name, tensor in found.items()}


def mxfp8(n: int, k: int, seed: int = 0) -> Tensors:
    made = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-20, 5, (n, k // 32), generator=made).float())
    weight = torch.randn((n, k), generator=made) * 100 * scale.repeat_interleave(32, 1)
    scheme = QuantizationScheme.model_validate(mxfp8_group())
    state = {"weight": weight, "weight_scale": scale}
    found = BaseCompressor.get_value_from_registry("mxfp8-quantized").compress(state, scheme)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def described(
    handler: Format, group: dict[str, Any], tensors: Tensors, embedding: bool = False
) -> QuantizedWeight:
    """The weight that a format makes of a module's tensors."""
    values = {
        name: tensor.double().flatten().tolist()
        for name, tensor in tensors.items()
        if tensor.numel() <= 2
    }
    headers = {name: spec_of(tensor) for name, tensor in tensors.items()}
    module = ModuleTensors("m", headers, embedding, (0, 20), values)
    scheme = ModuleScheme(handler.name, read_group("group_0", group), "Linear")
    return handler.decode(tensors, handler.spec(module, scheme))


def nvfp4_weight(*args: Any, inputs: bool = True, **more: Any) -> QuantizedWeight:
    tensors = nvfp4(*args, inputs=inputs, **more)
    return described(NVFP4Packed(), nvfp4_group(inputs), tensors)


def mxfp8_weight(*args: Any, inputs: bool = False, **more: Any) -> QuantizedWeight:
    return described(MXFP8Quantized(), mxfp8_group(inputs), mxfp8(*args, **more))


def fp8_weight(
    n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **more: Any
) -> QuantizedWeight:
    group = fp8_group(**more)
    return described(FloatQuantized(), group, quantised(n, k, group, seed, dtype))
