"""Checkpoints in memory, described, planned and converted without a directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import save

from ctconvert import codec
from ctconvert.planning.describe import Description, describe
from ctconvert.planning.make import make_plan
from ctconvert.records import Options, Plan
from ctconvert.store.checkpoint import Checkpoint
from ctconvert.store.safetensors import TensorEntry
from support.stores import MemoryStore

CPU = torch.device("cpu")


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


def converted(
    tensors: Mapping[str, torch.Tensor],
    quantization_config: Mapping[str, Any] | None,
    target: str,
    **options: Any,
) -> tuple[Plan, dict[str, torch.Tensor]]:
    """A plan, and the tensors that its layouts make, by full name; stacks are stacked."""
    plan = planned(tensors, quantization_config, target, **options)

    def part(entry: TensorEntry) -> torch.Tensor:
        whole = tensors[entry.name]
        if entry.spec.shape == tuple(whole.shape):
            return whole
        first = next(item for item in _entries(plan) if item.name == entry.name)
        return whole[(entry.offset - first.offset) // entry.nbytes]

    made: dict[str, torch.Tensor] = {}
    for item in plan.modules:
        power = codec.common_power(item, part)
        units = [codec.encode(item, unit, part, CPU, power) for unit in range(len(item.units))]
        for local in units[0]:
            each = [unit[local] for unit in units]
            made[f"{item.name}.{local}"] = each[0] if item.experts is None else torch.stack(each)
    return plan, made


def _entries(plan: Plan) -> Iterator[TensorEntry]:
    for item in plan.modules:
        for source in item.sources:
            yield from source.tensors.values()
