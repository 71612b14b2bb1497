"""What an engine's kernel is, and how its op is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ctconvert.runtime.kernels import Binding
from ctconvert.runtime.kernels.base import Tensors, nothing
from ctconvert.specs import WeightSpec
from ctconvert.transforms.dtypes import torch_dtype

#: ``(bound, tensors, x [..., K], bias [N] or None)`` to [..., N].
Run = Callable[[Binding, Tensors, torch.Tensor, torch.Tensor | None], torch.Tensor]


class Engine(NamedTuple):
    """A kernel of vLLM's: its op's name, and ``derived``, the small tensors it wants made once."""

    name: str
    run: Run
    derived: Callable[[Binding, Tensors], dict[str, torch.Tensor]] = nothing


Make = Callable[[Binding, torch.dtype], Engine | None]


def op(name: str, namespace: str = "_C") -> Any:
    """An op of vLLM's, or None where this build has none of that name."""
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return None if packet is None else packet.default


def arguments(found: Any) -> tuple[str, ...]:
    """An op's arguments, without the ``_or_none`` that some versions end their names with."""
    return tuple(one.name.removesuffix("_or_none") for one in found._schema.arguments)


def optional(found: Any, name: str) -> bool:
    """Whether an op takes None for an argument."""
    one = found._schema.arguments[arguments(found).index(name)]
    return isinstance(one.type, torch.OptionalType)


def capability() -> int:
    """That of the GPU as vLLM counts it, 90 for SM90; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def same_scales(spec: WeightSpec, dtype: torch.dtype) -> bool:
    """Whether the scales have the activations' dtype, without which a kernel needs a cast."""
    return spec.scale_dtype is not None and torch_dtype(spec.scale_dtype) == dtype


def cut(
    bound: Binding, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A product [M, padded N] of x [..., K], as [..., N] with the bias added."""
    out = out[:, : bound.spec.n].reshape(*x.shape[:-1], bound.spec.n)
    return out if bias is None else out + bias.to(out.dtype)
