"""What the name of a module tells about its class, which a checkpoint does not hold."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

_EMBEDDING_LEAVES = re.compile(
    r"(^|.*_)(embed_tokens|embeddings?|wte|wpe|embed_positions|pos_embed|embed_in|tok_embeddings)"
    r"(_per_layer)?$"
)
_LINEAR_LEAVES = re.compile(
    r"(.*_)?(proj|fc|linear|dense|qkv|query|key|value|w|mlp|head|c_attn|embed_tokens|wte)_?\d*$"
)
_ROUTER_LEAVES = frozenset(
    {"gate", "router", "wg", "gating", "shared_expert_gate", "classifier", "router_layer"}
)


@lru_cache(maxsize=1024)
def _leaf_is_embedding(leaf: str) -> bool:
    return _EMBEDDING_LEAVES.match(leaf) is not None


@lru_cache(maxsize=1024)
def _leaf_is_linear(leaf: str) -> bool:
    return _LINEAR_LEAVES.match(leaf) is not None


def guess_class(module: str) -> Literal["Embedding", "Linear"]:
    """``Embedding`` or ``Linear``: a checkpoint does not hold class names, so names decide."""
    return "Embedding" if _leaf_is_embedding(module.rpartition(".")[2]) else "Linear"


def is_router(module: str) -> bool:
    """Whether a dense 2-D weight of this name may be an MoE router, which is no ``Linear``."""
    return module.rpartition(".")[2] in _ROUTER_LEAVES


def looks_linear(module: str) -> bool:
    """Whether a module is by its name a linear layer or a token embedding."""
    return _leaf_is_linear(module.rpartition(".")[2])
