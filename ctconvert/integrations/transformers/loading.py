"""The transformers model of a converted checkpoint, and nothing else's code or weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import ctconvert.integrations.transformers  # noqa: F401 (registers the quantizer)
from ctconvert.errors import UsageError, VerificationError
from ctconvert.output import Output
from ctconvert.transforms import device as devices

#: What an ``attn_implementation`` or ``experts_implementation`` of a config may name.
_IMPLEMENTATIONS = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "batched_mm",
    "grouped_mm",
)


def load_model(
    out: str | Path, device: str = "auto", dtype: torch.dtype | None = None
) -> tuple[nn.Module, Any]:
    """The transformers model of a checkpoint, its converted modules in place, and its tokenizer.

    The class is what config.json's ``architectures`` names, of transformers' own; a causal
    language model where that names none of them.

    Args:
        out: a converted checkpoint: a directory, or a Hub id (``org/name``, ``org/name@revision``).
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``xpu``.
        dtype: of activations and unconverted weights, float16 or bfloat16; the config's where None.

    Returns:
        the model, in evaluation mode, and the tokenizer (None where the checkpoint has none).

    Raises:
        ConversionError: transformers' model has no place for a tensor, or one is left empty.
        UsageError: there is no such checkpoint or device; a dtype that no kernel takes; a config
            that transformers cannot use.
        VerificationError: the manifest is damaged or does not fit the files.
    """
    where = devices.resolve(device)
    output = Output.open(out)
    folder = Path(output.where)
    if output.store.read("config.json") != output.plan.config.encode():
        raise VerificationError(f"{folder / 'config.json'}: it is not what the manifest says")
    _check_config(output.plan.config, folder)
    own = {"trust_remote_code": False, "local_files_only": True}
    with _transformers_errors(folder):
        config = AutoConfig.from_pretrained(folder, **own)
        wanted = dtype or _dtype(config)
        model = _kind(config).from_pretrained(
            folder,
            config=config,
            dtype=wanted,
            use_safetensors=True,
            **own,
            **({} if where.type == "cpu" else {"device_map": {"": where}}),
        )
        tokenizer = None
        if (folder / "tokenizer_config.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(folder, **own)
    return model, tokenizer


def _dtype(config: Any) -> torch.dtype:
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return found or torch.bfloat16


def _kind(config: Any) -> Any:
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        ours = isinstance(found, type) and issubclass(found, PreTrainedModel)
        if ours and found.config_class is type(config):  # type: ignore[union-attr]
            return found
    return AutoModelForCausalLM


def _check_config(text: str, folder: Path) -> None:
    """Refuses what would have transformers run or fetch something that is not the checkpoint's.

    Raises:
        UsageError: config.json names no model of transformers, or an implementation that is not
            its own; there is an adapter, which transformers would load on top.
    """
    raw = json.loads(text)
    if "model_type" not in raw:
        raise UsageError(f"{folder / 'config.json'}: no model_type, so no transformers model")
    _check_implementations(raw, folder)
    if (folder / "adapter_config.json").exists():
        raise UsageError(
            f"{folder}: holds adapter_config.json, an adapter that transformers would load, too; "
            "ctconvert.runtime.load gives the modules alone"
        )


def _check_implementations(value: Any, folder: Path) -> None:
    """Refuses implementations that transformers would fetch from the Hub and run.

    Raises:
        UsageError: a config names one that is not transformers' own.
    """
    if isinstance(value, list):
        for item in value:
            _check_implementations(item, folder)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key.endswith("_implementation"):
            names = item.values() if isinstance(item, dict) else [item]
            for name in names:
                if name is not None and name not in _IMPLEMENTATIONS:
                    raise UsageError(
                        f"{folder}: config.json: {key} {name!r} is not one of transformers' own "
                        f"({', '.join(_IMPLEMENTATIONS)}), and code from elsewhere is not run"
                    )
        _check_implementations(item, folder)


@contextmanager
def _transformers_errors(folder: Path) -> Iterator[None]:
    """One line for what transformers makes of a config or a tokenizer that it cannot use."""
    try:
        yield
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
        OSError,
        RuntimeError,
    ) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"{folder}: transformers cannot load it: {first}") from None
