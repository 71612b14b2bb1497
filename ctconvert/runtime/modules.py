"""``nn.Module``s around the kernels: a converted module as a model uses it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ctconvert import layouts
from ctconvert.assembly import padded
from ctconvert.runtime import kernels
from ctconvert.runtime.kernels import Binding
from ctconvert.transforms.dense import dense_weight


class _Kernel(nn.Module):
    """Holds a module's tensors as buffers, exactly as the checkpoint has them."""

    def __init__(
        self,
        binding: Binding,
        tensors: Mapping[str, torch.Tensor],
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.binding = binding
        self.kernel = kernels.get(binding.layout, binding.spec)
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        derived = self._derive(tensors)
        self._derived = tuple(derived)
        for name, tensor in derived.items():
            self.register_buffer(name, tensor, persistent=False)
        self.bias: torch.Tensor | None
        self.register_buffer("bias", bias)

    def _derive(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.kernel.derived(self.binding, tensors)

    def refresh(self) -> None:
        """Works out again what is derived of the tensors, after they have been filled in."""
        for name, tensor in self._derive(self.tensors()).items():
            setattr(self, name, tensor)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The layout's tensors by local name."""
        return {name: self.get_buffer(name) for name in self._names}

    @property
    def read_bytes(self) -> int:
        """Bytes of the tensors that the kernel reads."""
        unread = self.kernel.unread
        return sum(t.nbytes for name, t in self.tensors().items() if not name.endswith(unread))

    def _run(self, x: torch.Tensor, without: str = "") -> torch.Tensor:
        names = (*self._names, *self._derived)
        given = {name: self.get_buffer(name) for name in names if name != without}
        return self.kernel.run(self.binding, given, x.contiguous(), self.bias)

    def dequantize(self) -> torch.Tensor:
        """The dense weight, f32 [N, K], decoded by the layout: the reference's weight.

        What the layout keeps only for the way back to the source is not in it.
        """
        layout = layouts.get(self.binding.layout)
        assert layout is not None
        spec, tensors = self.binding.spec, self.tensors()
        tensors |= {name: torch.zeros_like(tensors[name]) for name in self.kernel.lost}
        whole = dense_weight(layout.decode(tensors, padded(spec, *self.binding.padded)))
        return whole[: spec.n, : spec.k]

    @property
    def activation_dtype(self) -> torch.dtype:
        """Of the activations to try it with."""
        return self.kernel.dtype or self.binding.dtype

    def extra_repr(self) -> str:
        spec = self.binding.spec
        return f"{self.binding.layout}, {spec.n}x{spec.k}, {spec.label}"


class KernelLinear(_Kernel):
    """``y = x @ W^T + bias`` by the layout's kernel.

    x is f16 or bf16 [..., K], y [..., N] in x's dtype.
    """

    @property
    def in_features(self) -> int:
        return self.binding.spec.k

    @property
    def out_features(self) -> int:
        return self.binding.spec.n

    @property
    def widths(self) -> tuple[int, ...]:
        """Rows of each fused part, in order."""
        return self.binding.widths

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(x)

    def before_output_scale(self, x: torch.Tensor) -> torch.Tensor:
        """y without the static quantisation of outputs, where the scheme has one."""
        return self._run(x, without="output_scale")


class KernelEmbedding(_Kernel):
    """A look-up in a quantised table: ids [...] to rows [..., H].

    The rows are in the scale's dtype, or in ``dtype`` where that is set.
    """

    dtype: torch.dtype | None = None

    @property
    def num_embeddings(self) -> int:
        return self.binding.spec.n

    @property
    def embedding_dim(self) -> int:
        return self.binding.spec.k

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self._run(ids)
        return rows if self.dtype is None else rows.to(self.dtype)


class KernelExperts(_Kernel):
    """Stacked experts: tensors [E, ...], ``out[p] = x[rows[p]] @ W[e]^T + bias[e]``.

    x is f16 or bf16 [M, K]; ``rows`` i32 [P] are sorted by expert, of which e has those from
    ``offsets[e]`` to ``offsets[e + 1] - 1``, ``offsets`` being i32 [E + 1]. The result is [P, N] in
    x's dtype. In one launch where the kernel is one for stacks, else expert by expert.
    """

    def _derive(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        count = len(next(iter(tensors.values())))
        each = [self.kernel.derived(self.binding, expert_tensors(tensors, e)) for e in range(count)]
        return {name: torch.stack([one[name] for one in each]) for name in each[0]}

    @property
    def experts(self) -> int:
        return int(self.get_buffer(self._names[0]).shape[0])

    def forward(self, x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        grouped = self.kernel.grouped(self.binding.spec)
        if grouped is not None:
            return grouped(self.binding, self.tensors(), x.contiguous(), rows, offsets, self.bias)
        held = {name: self.get_buffer(name) for name in (*self._names, *self._derived)}
        out = x.new_empty((len(rows), self.binding.spec.n))
        for expert, (start, end) in enumerate(pairwise(offsets.tolist())):
            if start < end:
                bias = None if self.bias is None else self.bias[expert]
                given = x[rows[start:end].long()]
                out[start:end] = self.kernel.run(
                    self.binding, expert_tensors(held, expert), given, bias
                )
        return out


def expert_tensors(tensors: Mapping[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """One expert's of stacked tensors; of a vector, a single element [1]."""
    return {
        local: tensor[index].reshape(tensor.shape[1:] or (1,)) for local, tensor in tensors.items()
    }


class TiedHead(nn.Module):
    """The output head of a model whose embedding is quantised and tied: ``x @ table^T``.

    The table is dequantised a block of rows at a time, never as a whole.
    """

    def __init__(self, embedding: KernelEmbedding, rows: int = 16384) -> None:
        super().__init__()
        self._embedding = [embedding]  # in a list: its tensors are registered once, at home
        self.rows = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        embedding = self._embedding[0]
        blocks = []
        for start in range(0, embedding.num_embeddings, self.rows):
            end = min(start + self.rows, embedding.num_embeddings)
            ids = torch.arange(start, end, device=x.device)
            blocks.append(nn.functional.linear(x, embedding(ids).to(x.dtype)))
        return torch.cat(blocks, dim=-1)


class FusedPart(nn.Module):
    """One part of a fused module, for a model that still has the parts.

    The parts are called with one input, each once; the product is computed for the first of them
    and kept until the last has taken its columns.
    """

    def __init__(self, whole: KernelLinear, index: int, shared: dict[str, Any]) -> None:
        super().__init__()
        if index == 0:
            self.whole = whole
        self._whole = [whole]
        self._shared = shared
        self.index = index
        start = sum(whole.widths[:index])
        self.columns = slice(start, start + whole.widths[index])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self._shared
        if shared.get("input") is not x or self.index not in shared["waiting"]:
            waiting = set(range(len(self._whole[0].widths)))
            shared.update(input=x, output=self._whole[0](x), waiting=waiting)
        output = shared["output"]
        shared["waiting"].remove(self.index)
        if not shared["waiting"]:
            shared.clear()
        return output[..., self.columns]
