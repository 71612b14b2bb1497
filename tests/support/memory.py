"""Checkpoints in memory: a store without a directory, and plans made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save

from ctconvert.plan.describe import Description, describe
from ctconvert.plan.make import make_plan
from ctconvert.records import Options, Plan
from ctconvert.store.base import Store
from ctconvert.store.checkpoint import Checkpoint


class MemoryStore(Store):
    """Files by name; ``reads`` counts the bytes that were asked for, by file."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.where = self.id = "memory"
        self.files = dict(files)
        self.reads: dict[str, int] = {}

    def sizes(self) -> Mapping[str, int]:
        return {name: len(data) for name, data in self.files.items()}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.reads[name] = self.reads.get(name, 0) + len(buffer)
        buffer[:] = self.files[name][offset : offset + len(buffer)]

    def fingerprint(self, name: str) -> str:
        return str(len(self.files[name]))


def store_of(
    tensors: Mapping[str, torch.Tensor],
    quantization_config: Mapping[str, Any] | None,
    **config: Any,
) -> MemoryStore:
    """The store of a checkpoint of one file."""
    if quantization_config is not None:
        config["quantization_config"] = dict(quantization_config)
    return MemoryStore(
        {"config.json": json.dumps(config).encode(), "model.safetensors": save(dict(tensors))}
    )


def described(
    tensors: Mapping[str, torch.Tensor],
    quantization_config: Mapping[str, Any] | None,
    **config: Any,
) -> Description:
    """What a checkpoint of these tensors holds."""
    return describe(Checkpoint(store_of(tensors, quantization_config, **config)))


def planned(
    tensors: Mapping[str, torch.Tensor],
    quantization_config: Mapping[str, Any] | None,
    target: str,
    **options: Any,
) -> Plan:
    """The plan of converting a checkpoint of these tensors."""
    return make_plan(described(tensors, quantization_config), Options(target=target, **options))
