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

#: Where a config.json may hold the quantisation: multimodal models nest it.
CONFIG_PATHS = (
    ("quantization_config",),
    ("compression_config",),
    ("text_config", "quantization_config"),
    ("text_config", "compression_config"),
)


def value_at(config: Any, path: Sequence[str]) -> Any:
    """What a config.json holds at a path, None where it has no such path."""
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def copies_of_config(config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Every place of a config.json that holds a quantisation; the first is the one that counts."""
    return [path for path in CONFIG_PATHS if value_at(config, path)]


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


def config_of_method(config: Mapping[str, Any], method: str) -> tuple[tuple[str, ...], Any] | None:
    """Where a config.json holds a quantisation of ``method``, and what it is."""
    for path in CONFIG_PATHS:
        found = value_at(config, path)
        if isinstance(found, dict) and found.get("quant_method") == method:
            return path, found
    return None
