"""Tiny transformers models: a quantised checkpoint, and the plain one with what it means."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file

from support.builders import config_of, quantised
from support.reference import load_tensors

#: Sizes of a text model; K is a multiple of 32 everywhere, and N differs from K.
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
#: Of the scales that the builders draw: weights are then small enough that no softmax saturates.
SMALLER = 1 / 8

Choose = Callable[[str, torch.Tensor], bool]


def linears(name: str, tensor: torch.Tensor) -> bool:
    """What a recipe for ``Linear`` without the head means, of a model's names."""
    other = ("embed", "lm_head", "norm", "router", ".gate.weight", "shared", "bias")
    return tensor.ndim == 2 and name.endswith(".weight") and not any(o in name for o in other)


def dequantised(group: Mapping[str, Any], made: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What compressed-tensors' own decompressor makes of a module's tensors."""
    scheme = QuantizationScheme.model_validate(dict(group))
    compressor = BaseCompressor.get_value_from_registry(str(group["format"]))
    return compressor.decompress(dict(made), scheme)["weight"]


def write_models(
    model: Any, folder: Path, group: Mapping[str, Any], choose: Choose = linears
) -> tuple[Path, Path]:
    """The quantised checkpoint of a model, and beside it the plain one of the same weights.

    The names are those that ``save_pretrained`` writes. Returns both folders.
    """
    plain, source = folder / "plain", folder / "in"
    model.to(torch.bfloat16).save_pretrained(plain)
    dense, tensors = load_tensors(plain), dict[str, torch.Tensor]()
    for seed, (name, tensor) in enumerate(sorted(dense.items())):
        if not choose(name, tensor):
            tensors[name] = tensor
            continue
        made = quantised(*tensor.shape, group, seed)
        made["weight_scale"] = (made["weight_scale"].float() * SMALLER).to(torch.bfloat16)
        tensors |= {name.replace("weight", local): value for local, value in made.items()}
        dense[name] = dequantised(group, made).to(torch.bfloat16)
    save_file(dense, plain / "model.safetensors", {"format": "pt"})
    source.mkdir()
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = config_of(group, ignore=[])
    (source / "config.json").write_text(json.dumps(config))
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source, plain


def error(made: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error of logits, which must be numbers and not all alike."""
    assert torch.isfinite(made).all()
    assert expected.float().std() > 0
    return float((made.float() - expected.float()).norm() / expected.float().norm())
