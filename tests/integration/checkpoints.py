"""Tiny random models made with compressed-tensors' own compressors, and the same ones dense."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from support.builders import config_of, quantised, write_checkpoint

HIDDEN, SIZE, VOCABULARY, LAYERS = 256, 384, 512, 2
#: Rows of q, of k and of v: four heads of 64, two of keys and values.
HEADS = {"q_proj": 256, "k_proj": 128, "v_proj": 128}

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = 4
QWEN3_MOE: dict[str, Any] = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": SIZE,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}


def _linears(config: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Name, N and K of every quantised module."""
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        for leaf, rows in HEADS.items():
            yield f"{layer}.self_attn.{leaf}", rows, HIDDEN
        yield f"{layer}.self_attn.o_proj", HIDDEN, HEADS["q_proj"]
        mlps = [f"{layer}.mlp"]
        if "num_experts" in config:
            mlps = [f"{layer}.mlp.experts.{expert}" for expert in range(EXPERTS)]
        for mlp in mlps:
            size = config["moe_intermediate_size" if len(mlps) > 1 else "intermediate_size"]
            yield f"{mlp}.gate_proj", size, HIDDEN
            yield f"{mlp}.up_proj", size, HIDDEN
            yield f"{mlp}.down_proj", HIDDEN, size


def write_pair(
    folder: Path,
    group: Mapping[str, Any],
    config: Mapping[str, Any] = LLAMA,
    vocabulary: bool = False,
) -> tuple[Path, Path]:
    """A quantised checkpoint, and the dense one that compressed-tensors decompresses it to.

    With ``vocabulary`` the embedding is quantised too, and the head unless it is tied.
    """
    made = torch.Generator().manual_seed(5)
    dtype = getattr(torch, config["torch_dtype"])

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=made) * 0.5).to(dtype)

    plain = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
        "lm_head.weight": random(VOCABULARY, HIDDEN) * 0.2,
        "model.norm.weight": torch.ones(HIDDEN, dtype=dtype),
    }
    for number in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain[f"model.layers.{number}.{norm}.weight"] = random(HIDDEN) + 1
        if "num_experts" in config:
            plain[f"model.layers.{number}.mlp.gate.weight"] = random(EXPERTS, HIDDEN)
            for norm in ("q_norm", "k_norm"):
                plain[f"model.layers.{number}.self_attn.{norm}.weight"] = random(64) + 1
    linears = list(_linears(config))
    if config["tie_word_embeddings"]:
        del plain["lm_head.weight"]
    if vocabulary:
        names = ["model.embed_tokens"] + ["lm_head"] * ("lm_head.weight" in plain)
        linears += [(name, VOCABULARY, HIDDEN) for name in names]
        for name in names:
            del plain[f"{name}.weight"]
    packed, dense = dict(plain), dict(plain)
    scheme = QuantizationScheme.model_validate(dict(group))
    codec = BaseCompressor.get_value_from_registry(str(group["format"]))
    for seed, (name, n, k) in enumerate(linears):
        tensors = quantised(n, k, group, seed, dtype)
        if (codes := tensors.get("weight")) is not None and codes.dtype == torch.int8:
            codes //= 2  # CPUs without VNNI add two products in 16 bits
        # Powers of two: every weight is a bfloat16. As large as those of 4 bits, whatever the bits.
        scale = tensors["weight_scale"]
        power = scale.float().log2().round() + 4 - group["weights"]["num_bits"]
        tensors["weight_scale"] = torch.exp2(power).to(scale.dtype)
        packed |= {f"{name}.{local}": tensor for local, tensor in tensors.items()}
        weight = codec.decompress(dict(tensors), scheme)["weight"].detach()
        dense[f"{name}.weight"] = weight.to(dtype)
    ignore = ["re:.*mlp.gate$"] if vocabulary else ["lm_head", "re:.*mlp.gate$"]
    settings = {key: value for key, value in config.items() if key != "architectures"}
    named = {"architectures": config["architectures"], **settings}
    source = write_checkpoint(folder / "source", packed, config_of(group, ignore=ignore), **named)
    reference = write_checkpoint(folder / "dense", dense, None, **named)
    return source, reference


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
