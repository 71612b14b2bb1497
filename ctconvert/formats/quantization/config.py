"""Where a config.json holds a quantisation, and which ones are not ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: quant_method values other than ours, and who handles them.
OTHER_METHODS: Mapping[str, str] = {
    "gptq": "serve it with vLLM's or SGLang's GPTQ loader, or GPTQModel",
    "awq": "convert it first with compressed-tensors' AutoAWQ converter (compressed_tensors."
    "entrypoints.convert)",
    "bitsandbytes": "load it with transformers and bitsandbytes",
    "fp8": "convert it first with compressed-tensors' convert_checkpoint, or serve it with vLLM",
    "mxfp4": "load it with transformers or vLLM, which read it directly",
    "modelopt": "convert it first with compressed-tensors' ModelOpt NVFP4 converter",
    "quark": "load it with AMD Quark or vLLM",
    "torchao": "load it with torchao",
    "hqq": "load it with hqq",
    "auto-round": "export it again from auto-round with format llm_compressor",
    "ctconvert": "it is already kernel-ready: check it with `ctconvert verify`",
}

#: What a quantisation is called in a config.json, at its top or in a part of it.
_NAMES = ("quantization_config", "compression_config")
_OURS = (None, "compressed-tensors", "sparseml")


def value_at(config: Any, path: Sequence[str]) -> Any:
    """What a config.json holds at a path, None where it has no such path."""
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def copies_of_config(config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Every place of a config.json that holds the quantisation; the first is the one that counts.

    Multimodal models nest it, in ``text_config``, ``llm_config``, ``thinker_config.text_config``.
    A part that is quantised by another method keeps that.
    """
    found: list[tuple[str, ...]] = []
    waiting: list[tuple[tuple[str, ...], Any]] = [((), config)]
    for path, part in waiting:
        found += [(*path, name) for name in _NAMES if part.get(name)]
        inner = (key for key in part if key.endswith("_config") and key not in _NAMES)
        waiting += [
            ((*path, key), part[key])
            for key in sorted(inner, key=lambda key: key != "text_config")
            if isinstance(part[key], dict)
        ]
    return [path for path in found if path == found[0] or _is_ours(value_at(config, path))]


def _is_ours(value: Any) -> bool:
    return isinstance(value, dict) and value.get("quant_method") in _OURS


def with_config(config: Mapping[str, Any], value: Any) -> dict[str, Any]:
    """A copy of a config.json with every quantisation in it replaced."""
    made = dict(config)
    for path in copies_of_config(config):
        inner = made
        for key in path[:-1]:
            inner[key] = dict(inner[key])
            inner = inner[key]
        inner[path[-1]] = value
    return made
