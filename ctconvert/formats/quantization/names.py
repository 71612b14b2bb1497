"""What the name of a module tells about its class, which a checkpoint does not hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

_EMBEDDING_LEAVES = re.compile(
    r"(^|.*_)(embed_tokens|embeddings?|wte|wpe|embed_positions|pos_embed|embed_in|tok_embeddings)"
    r"(_per_layer)?$"
)
_LINEAR_LEAVES = re.compile(
    r"(.*_)?(proj|fc|linear|dense|qkv|query|key|value|w|mlp|head|c_attn|embed_tokens|wte)_?\d*$"
)
#: What a wrapping model puts before the names of its language model, and loaders take off again.
_WRAPPERS = ("model", "language_model", "text_model", "llm", "thinker", "transformer", "backbone")
_PREFIXES = (
    "",
    "model.",
    "language_model.",
    "language_model.model.",
    "model.language_model.",
    "model.language_model.model.",
    "text_model.",
    "model.text_model.",
    "llm.",
    "llm.model.",
    "thinker.model.",
    "transformer.",
    "backbone.",
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


def looks_linear(module: str) -> bool:
    """Whether a module is by its name a linear layer or a token embedding."""
    return _leaf_is_linear(module.rpartition(".")[2])


def other_names(module: str) -> Iterator[str]:
    """The names a module may have in a config that was written of another wrapping of its model.

    Its suffixes, longest first, and its name under the prefixes that wrappers of language models
    add. A vision tower's names never become a language model's.
    """
    parts = module.split(".")
    seen = {module}
    for place in range(1, len(parts)):
        seen.add(name := ".".join(parts[place:]))
        yield name
    first = 0
    while first < len(parts) - 1 and parts[first] in _WRAPPERS:
        first += 1
    inner = ".".join(parts[first:])
    yield from (name for prefix in _PREFIXES if (name := prefix + inner) not in seen)
