"""Methods of vLLM's embeddings and heads: look-ups in a quantised table, and quantised heads."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from ctconvert.errors import UsageError
from ctconvert.integrations.vllm.cuts import Held, Share
from ctconvert.integrations.vllm.linear import CtconvertLinear
from ctconvert.integrations.vllm.served import Served
from ctconvert.runtime.loading import binding

#: Rows of a table that a tied head dequantises at a time.
_ROWS = 16384


def method(served: Served, layer: VocabParallelEmbedding, prefix: str) -> QuantizeMethodBase | None:
    """The method of an embedding or a head; None where it is not quantised.

    Raises:
        UsageError: an embedding in a layout that nothing looks up, or a head in one for look-ups.
    """
    head = isinstance(layer, ParallelLMHead)
    tables = {name: m for name, m in served.modules.items() if binding(m).spec.embedding}
    if not prefix and not head and len(tables) == 1:
        prefix = next(iter(tables))  # some of vLLM's models do not say what they make
    parts = served.parts(prefix, ())
    if parts:
        table = binding(parts[0]).spec.embedding
        if table == head:
            what = "a table to look up" if table else "no table to look up"
            raise UsageError(f"module {prefix}: {what} in layout {parts[0].recipe.layout}")
        return (Table if table else Vocabulary)(parts, served.hashes)
    stored = any(copy.name.startswith("lm_head.") for copy in served.plan.copies)
    return TiedHead() if head and tables and not stored else None


class Vocabulary(CtconvertLinear):
    """A head whose weight is converted: x [..., H] to logits [..., V] of this rank."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        bound = binding(self.parts[0])
        name, rows = self.parts[0].name, layer.org_vocab_size
        if self.parts[0].rank is not None:  # of a vocabulary that vLLM does not pad
            rows = layer.num_embeddings_per_partition
        if (bound.spec.n, bound.spec.k) != (rows, input_size):
            raise UsageError(
                f"module {name}: {bound.spec.n} x {bound.spec.k} in the manifest, {rows} x "
                f"{input_size} in vLLM's model"
            )
        cut = layer.tp_size > 1 and self.parts[0].rank is None
        if cut or layer.num_added_embeddings:
            raise UsageError(
                f"module {name}: vLLM does not cut a quantised vocabulary, nor adds to it: use one "
                "rank, or convert with --tensor-parallel or --exclude"
            )
        entries = self.parts[0].locals(0)
        held = {local: Held(entry.spec) for local, entry in entries.items()}
        self.make(layer, Share(bound, held, True), params_dtype, _none)


class Table(Vocabulary):
    """A quantised embedding: ids [...] to rows [..., H]."""

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        assert self.running is not None
        return self.running(self.tensors(layer), input_, None).to(self.running.dtype)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The product of a head that is tied to the table: blocks of it are dequantised."""
        assert self.running is not None
        blocks = []
        for start in range(0, self.running.bound.spec.n, _ROWS):
            end = min(start + _ROWS, self.running.bound.spec.n)
            ids = torch.arange(start, end, device=x.device)
            blocks.append(torch.nn.functional.linear(x, self.embedding(layer, ids).to(x.dtype)))
        out = torch.cat(blocks, dim=-1)
        return out if bias is None else out + bias


class TiedHead(QuantizeMethodBase):
    """A head of its own has no tensors; it is the embedding's table."""

    def create_weights(self, layer: torch.nn.Module, *weight_args: Any, **more: Any) -> None:
        return

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> Any:
        return embed_tokens

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        raise UsageError("lm_head: the checkpoint has no tensor for it, and vLLM does not tie it")

    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("a tied head is the embedding")


def _none(*args: Any, **more: Any) -> None:
    raise AssertionError("a whole tensor is copied, not handed on")
