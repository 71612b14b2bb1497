"""Checkpoints for tests, made with compressed-tensors' own compressors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file


def weight_args(
    bits: int = 4,
    group: int | None = 32,
    symmetric: bool = True,
    kind: str = "int",
    strategy: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The ``weights`` of a config group; ``group`` None means channel-wise."""
    args = {"num_bits": bits, "type": kind, "symmetric": symmetric, "dynamic": False, **more}
    if strategy is not None:
        return args | {"strategy": strategy}
    if group is None:
        return args | {"strategy": "channel"}
    return args | {"strategy": "group", "group_size": group}


def group_config(
    weights: dict[str, Any] | None,
    targets: list[str] | None = None,
    format: str = "pack-quantized",
    inputs: dict[str, Any] | None = None,
    outputs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One entry of ``config_groups``."""
    return {
        "targets": targets or ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": outputs,
        "format": format,
    }


STATIC_INT8 = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "dynamic": False,
    "strategy": "tensor",
}
DYNAMIC_INT8 = STATIC_INT8 | {"dynamic": True, "strategy": "token"}


def quantised(
    n: int, k: int, group: Mapping[str, Any], seed: int, scale_dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """The tensors of a module by local name, as compressed-tensors' compressor makes them.

    The weight is random codes times random scales, so every code value occurs.
    """
    scheme = QuantizationScheme.model_validate(dict(group))
    args = scheme.weights
    assert args is not None
    made = torch.Generator().manual_seed(seed)
    if args.strategy == "tensor":
        shape = (1,)
    elif args.strategy == "block":
        rows, columns = args.block_structure
        shape = (-(-n // rows), -(-k // columns))
    else:
        shape = (n, 1 if args.strategy == "channel" else k // args.group_size)
    scale = (torch.rand(shape, generator=made) * 0.02 + 0.001).to(scale_dtype)
    if args.type == "float" and args.num_bits == 4:
        scale = torch.exp2(torch.randint(-9, 4, shape, generator=made).float()).to(scale_dtype)
    bound = 1 << (args.num_bits - 1)
    zero = None
    if args.type == "int":
        codes = torch.randint(-bound, bound, (n, k), generator=made).float()
        zero = torch.zeros(shape, dtype=torch.int8)
        if not args.symmetric:
            zero = torch.randint(-bound, bound, shape, generator=made).to(torch.int8)
    else:
        codes = torch.randn((n, k), generator=made) * (2.0 if args.num_bits == 4 else 100.0)

    def wide(values: torch.Tensor) -> torch.Tensor:
        if args.strategy == "block":
            rows, columns = args.block_structure
            tall = values.float().repeat_interleave(rows, 0)[:n]
            return tall.repeat_interleave(columns, 1)[:, :k]
        return (
            values.float()
            .reshape(shape if len(shape) == 2 else (1, 1))
            .repeat_interleave(k // (shape[1] if len(shape) == 2 else 1), 1)
        )

    shift = wide(zero) if zero is not None else 0.0
    state = {"weight": (codes - shift) * wide(scale), "weight_scale": scale}
    if zero is not None:
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(str(group["format"]))
    found = compressor.compress(state, scheme)
    for end, activation in (
        ("input", scheme.input_activations),
        ("output", scheme.output_activations),
    ):
        if activation is not None and not activation.dynamic:
            value = torch.rand(1, generator=made) * 0.1 + 0.01
            found[f"{end}_scale"] = value.to(scale_dtype)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    quantization_config: Mapping[str, Any] | None,
    shards: int = 1,
    **config: Any,
) -> Path:
    """Writes a checkpoint; with several shards, each module's tensors are scattered over them."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], **config}
    if quantization_config is not None:
        settings["quantization_config"] = dict(quantization_config)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    weight_map = {}
    for index, name in enumerate(sorted(tensors)):
        parts[index % shards][name] = tensors[name]
        weight_map[name] = f"model-{index % shards + 1:05}-of-{shards:05}.safetensors"
    for index, part in enumerate(parts, 1):
        save_file(part, folder / f"model-{index:05}-of-{shards:05}.safetensors")
    index_file = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return folder


def config_of(
    *groups: Mapping[str, Any], ignore: list[str] | None = None, **more: Any
) -> dict[str, Any]:
    """A quantization_config of these groups."""
    return {
        "quant_method": "compressed-tensors",
        "format": groups[0]["format"] if groups else None,
        "config_groups": {f"group_{index}": dict(group) for index, group in enumerate(groups)},
        "ignore": ignore if ignore is not None else ["lm_head"],
        "quantization_status": "compressed",
        "version": "0.20.0",
        **more,
    }


#: (module, N, K) of one small layer; N differs from K everywhere, and the fused parts differ.
LAYER = (
    ("model.layers.0.self_attn.q_proj", 192, 256),
    ("model.layers.0.self_attn.k_proj", 64, 256),
    ("model.layers.0.self_attn.v_proj", 64, 256),
    ("model.layers.0.mlp.gate_proj", 320, 256),
    ("model.layers.0.mlp.up_proj", 320, 256),
    ("model.layers.0.mlp.down_proj", 256, 384),
)


def layer(
    group: Mapping[str, Any], scale_dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The tensors of :data:`LAYER` and a few that are not quantised."""
    tensors = {
        "model.embed_tokens.weight": torch.randn(96, 256, dtype=torch.bfloat16),
        "model.layers.0.input_layernorm.weight": torch.ones(256, dtype=torch.bfloat16),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(192, dtype=torch.bfloat16),
        "lm_head.weight": torch.randn(96, 256, dtype=torch.bfloat16),
    }
    for index, (name, n, k) in enumerate(LAYER):
        made = quantised(n, k, group, seed * 100 + index, scale_dtype)
        tensors |= {f"{name}.{local}": tensor for local, tensor in made.items()}
    return tensors


def sparse24(
    n: int,
    k: int,
    group: Mapping[str, Any],
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """A 2:4 sparse module as ``sparse-24-bitmask`` stored it, some kept values being zero.

    Built from the format's definition: compressed-tensors can no longer write it.
    """
    made = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    if group["weights"]:
        stored = {"int": "int-quantized", "float": "float-quantized"}[group["weights"]["type"]]
        state = quantised(n, k, dict(group) | {"format": stored}, seed)
        dense = state.pop("weight")
    else:
        dense = torch.randn((n, k), generator=made).to(dtype)
    raw = dense.view({1: torch.int8, 2: torch.int16}[dense.element_size()])
    raw[torch.rand((n, k), generator=made) < 0.1] = 0
    order = torch.rand((n, k // 4, 4), generator=made).argsort(-1)
    kept = (order < 2).reshape(n, k)
    state["compressed"] = raw[kept].reshape(n, k // 2).view(dense.dtype)
    padded = torch.nn.functional.pad(kept, (0, -k % 8)).reshape(n, -1, 8).to(torch.uint8)
    state["bitmask"] = (padded << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)
    state["shape"] = torch.tensor([[n], [k]])
    return {name: tensor.contiguous() for name, tensor in state.items()}


def module(name: str, made: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A module's tensors by full name."""
    return {f"{name}.{local}": tensor for local, tensor in made.items()}


def expert_modules(
    block: str,
    group: Mapping[str, Any],
    shape: tuple[int, int],
    count: int = 3,
    names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
) -> dict[str, torch.Tensor]:
    """Experts one by one, by full name: [gate,] up I x H and down H x I, ``shape`` being (I, H)."""
    found = {}
    for number in range(count):
        for place, leaf in enumerate(names):
            n, k = shape if place < len(names) - 1 else shape[::-1]
            made = quantised(n, k, group, 10 * number + place)
            found |= module(f"{block}.experts.{number}.{leaf}", made)
    return found


def experts(
    name: str, n: int, k: int, group: Mapping[str, Any], count: int = 3
) -> dict[str, torch.Tensor]:
    """The 3-D tensors of ``count`` experts, by full name."""
    each = [quantised(n, k, group, seed) for seed in range(count)]
    found = {
        local: torch.stack([made[local] for made in each])
        for local in each[0]
        if local != "weight_shape"
    }
    if "weight_shape" in each[0]:
        found["weight_shape"] = torch.tensor([count, n, k])
    return module(name, found)
