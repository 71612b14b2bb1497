"""What stands in a transformers model where a weight was converted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ctconvert.errors import ConversionError
from ctconvert.runtime.modules import (
    FusedPart,
    KernelEmbedding,
    KernelExperts,
    KernelLinear,
    TiedHead,
)

#: What may be asked of a weight that is not there.
_DESCRIBED = ("__get__", "dim", "size", "numel", "is_floating_point")


class _Absent(torch.Tensor):
    """The dtype, device and shape of a weight that was converted; computing with it is refused."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _DESCRIBED:
            raise ConversionError(
                "the model computes with the weight of a converted module itself, which only its "
                "kernel reads; convert the checkpoint again and --exclude that module"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class KernelSlot(nn.Module):
    """A kernel in the place of a Linear or an Embedding, whose shape and dtype it still tells.

    Models ask for ``weight.dtype`` and the like before they call a module.
    """

    def __init__(
        self,
        kernel: KernelLinear | KernelEmbedding | FusedPart | TiedHead | SharedTable,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self._shape = tuple(shape)
        self._dtype = dtype

    @property
    def weight(self) -> torch.Tensor:
        """A description only: [N, K] in the dtype of the activations."""
        device = next((buffer.device for buffer in self.buffers()), torch.device("cpu"))
        one = torch.empty((), dtype=self._dtype, device=device)
        return one.expand(self._shape).as_subclass(_Absent)

    @property
    def in_features(self) -> int:
        return self._shape[1]

    @property
    def out_features(self) -> int:
        return self._shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.kernel(x)
        return made


class SharedTable(nn.Module):
    """A second look-up in a converted table, whose tensors are registered once, at home."""

    def __init__(self, embedding: KernelEmbedding) -> None:
        super().__init__()
        self._embedding = [embedding]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._embedding[0](ids)


class Apart(nn.Module):
    """Experts that are modules of their own, called as a :class:`KernelExperts` is."""

    def __init__(self, experts: Sequence[KernelLinear]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        bounds = offsets.tolist()
        each = [
            expert(x[rows[bounds[e] : bounds[e + 1]].long()])
            for e, expert in enumerate(self.experts)
            if bounds[e] < bounds[e + 1]
        ]
        return torch.cat(each)


class Columns(nn.Module):
    """One projection of all experts: what its parts make, side by side, without padding.

    Args:
        parts: in the order of their columns.
        kept: which columns of the whole there are; all where None.
        biased: whether the parts add a bias.
        in_turn: whether gate and up, which the parts make one after the other, go column by column.
    """

    def __init__(
        self,
        parts: Sequence[KernelExperts | Apart],
        kept: Sequence[slice] | None,
        biased: bool,
        in_turn: bool,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self._kept = kept
        self.biased = biased
        self._in_turn = in_turn

    def forward(self, x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        made = [part(x, rows, offsets) for part in self.parts]
        if self._kept is not None:
            made = [whole[:, columns] for whole in made for columns in self._kept]
        whole = made[0] if len(made) == 1 else torch.cat(made, dim=-1)
        return whole.unflatten(-1, (2, -1)).mT.flatten(-2) if self._in_turn else whole


class KernelMoe(nn.Module):
    """Kernels in the place of a model's experts, whose weights were 3-D parameters.

    Takes tokens [M, H], the chosen experts [M, C] and their weights [M, C], as transformers'
    experts do (``transformers/integrations/moe.py``, ``grouped_mm_experts_forward``), and returns
    [M, H]. The activation is the model's own.

    Args:
        model: the module of the model, without the parameters that were converted.
        converted: the projections by parameter name; the others are the model's, as are biases
            that these do not add.
    """

    def __init__(self, model: Any, converted: dict[str, Columns]) -> None:
        super().__init__()
        self.num_experts: int = model.num_experts
        gone = {*converted, *(f"{name}_bias" for name, own in converted.items() if own.biased)}
        for name in list(model._parameters):
            parameter = model._parameters.pop(name)
            if name not in gone:
                self.register_parameter(name, parameter)
        self.model = model
        self.kernels = nn.ModuleDict(converted)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        tokens, choices = top_k_index.shape
        chosen, weights = top_k_index.reshape(-1), top_k_weights.reshape(-1)
        # A router may say "none of them" by a number past the last expert.
        weights = weights.masked_fill(chosen >= self.num_experts, 0)
        chosen, order = torch.sort(chosen.clamp(max=self.num_experts - 1), stable=True)
        numbers = torch.arange(self.num_experts + 1, device=chosen.device, dtype=chosen.dtype)
        offsets = torch.searchsorted(chosen, numbers, out_int32=True)
        sorted_rows = torch.arange(len(order), device=order.device, dtype=torch.int32)
        up_rows = (order // choices).to(torch.int32)
        gated = self.model.has_gate
        made = self._product(
            "gate_up_proj" if gated else "up_proj", hidden_states, up_rows, offsets
        )
        made = self.model._apply_gate(made) if gated else self.model.act_fn(made)
        made = self._product("down_proj", made, sorted_rows, offsets)
        made = made * weights[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        whole = made[back].view(tokens, choices, -1).sum(dim=1)
        return whole.to(hidden_states.dtype)

    def _product(
        self, name: str, x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        made: torch.Tensor
        if name in self.kernels:
            made = self.kernels[name](x, rows, offsets)
        else:
            weight: torch.Tensor = self.get_parameter(name)
            bounds = offsets.tolist()
            if self.model.is_transposed:
                weight = weight.mT
            each = [
                nn.functional.linear(x[rows[bounds[e] : bounds[e + 1]].long()], weight[e])
                for e in range(self.num_experts)
            ]
            made = torch.cat(each)
        if (bias := self._parameters.get(f"{name}_bias")) is not None:
            made = made + bias.repeat_interleave(offsets.diff(), dim=0)
        return made
