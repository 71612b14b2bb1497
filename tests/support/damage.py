"""A small sound checkpoint for tests to damage, and what a refusal of it must look like."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ctconvert
from ctconvert.errors import BadInputError, CtconvertError
from support.builders import group_config, module, quantised, weight_args
from support.models import tree

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
PLAIN = "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"
ONE = "model.safetensors"
GROUP = group_config(weight_args(4, 32))

#: Changes a checkpoint's directory, or one file of it.
Damage = Callable[[Path], object]
Tensors = dict[str, torch.Tensor]


def tensors_of(group: dict[str, Any], *modules: tuple[str, int, int]) -> Tensors:
    """Modules of these names and shapes, and a plain tensor."""
    made = {PLAIN: torch.randn(24, 64, generator=torch.Generator().manual_seed(7))}
    for seed, (name, n, k) in enumerate(modules):
        made |= module(name, quantised(n, k, group, seed))
    return made


def small() -> Tensors:
    """Three int4 modules of different shapes, a bias and a plain tensor."""
    made = tensors_of(GROUP, (Q, 48, 64), (UP, 96, 64), (DOWN, 64, 96))
    return made | {f"{Q}.bias": torch.arange(48, dtype=torch.bfloat16)}


def fails(
    verb: Callable[..., object],
    *args: object,
    says: tuple[str, ...],
    error: type[CtconvertError] = BadInputError,
    **options: Any,
) -> None:
    """A verb raises this error, in one line that says all that."""
    with pytest.raises(error) as caught:
        verb(*args, **options)
    line = str(caught.value)
    assert line and "\n" not in line
    for text in says:
        assert text in line, f"{text!r} is not in {line!r}"


def refused(
    model: Path,
    *,
    says: tuple[str, ...],
    error: type[CtconvertError] = BadInputError,
    target: str = "triton",
    **options: Any,
) -> None:
    """Converting ``model`` fails as it should, and leaves everything as it was."""
    beside = model.parent
    before, names = tree(model), sorted(path.name for path in beside.iterdir())
    out = beside / "made" / "out"
    options = {"device": "cpu", **options}
    fails(ctconvert.repack, model, out, says=says, error=error, target=target, **options)
    if (beside / "made").exists():  # the parent of OUT may have been made, and nothing in it
        assert list((beside / "made").iterdir()) == []
        (beside / "made").rmdir()
    assert sorted(path.name for path in beside.iterdir()) == names
    assert tree(model) == before


def convert(model: Path, out: Path, **options: Any) -> ctconvert.records.Report:
    """Converts for ``triton`` on the CPU."""
    return ctconvert.repack(model, out, target="triton", device="cpu", **options)


def edit(model: Path, name: str, **tensors: torch.Tensor | None) -> None:
    """Replaces tensors of a module by local name in a checkpoint of one file; None removes one."""
    made = load_file(model / ONE)
    for local, tensor in tensors.items():
        made.pop(f"{name}.{local}", None)
        if tensor is not None:
            made[f"{name}.{local}"] = tensor.contiguous()
    save_file(made, model / ONE, metadata={"format": "pt"})


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    """A safetensors file, whatever the header holds."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def in_order(header: dict[str, Any]) -> list[str]:
    """The names of a header's tensors as they lie in the file."""
    names = [name for name in header if name != "__metadata__"]
    return sorted(names, key=lambda name: header[name]["data_offsets"])


def change_config(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes config.json."""
    path = model / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
