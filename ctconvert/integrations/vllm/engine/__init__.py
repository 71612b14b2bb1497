"""vLLM's own kernels, for the layouts that are theirs as they lie.

Each is called by its op, never through vLLM's choosers, which may pick another layout. Ops change
between versions: what an op takes is read from its schema, and one that asks for anything unknown
is left alone.
"""

from __future__ import annotations

import os

import torch

from ctconvert.errors import UsageError
from ctconvert.integrations.vllm.engine import cpu, cuda, marlin
from ctconvert.integrations.vllm.engine.base import Engine
from ctconvert.runtime.kernels import Binding
from ctconvert.runtime.kernels.base import nothing

__all__ = ["Engine", "find", "wanted"]

#: ``engine``, vLLM's kernels where it has them, or ``own``, this package's alone, to compare.
KERNELS = "CTCONVERT_VLLM_KERNELS"


def wanted() -> bool:
    """Whether vLLM's kernels are to be used.

    Raises:
        UsageError: the environment asks for something else.
    """
    value = os.environ.get(KERNELS) or "engine"
    if value not in ("engine", "own"):
        raise UsageError(f"{KERNELS} is {value!r}: it is engine (the default) or own")
    return value == "engine"


def find(bound: Binding, dtype: torch.dtype, prepared: bool = True) -> Engine | None:
    """vLLM's kernel for a weight, where its build and the machine have one.

    Args:
        bound: the weight on this rank.
        dtype: of the activations.
        prepared: whether its derived tensors can be made.
    """
    if not wanted():
        return None
    spec = bound.spec
    if spec.kind == "int" and spec.side and bound.layout != "scaled-mm":
        return None  # static INT8 activations around a weight-only product: vLLM has no such kernel
    for family in (cpu, cuda, marlin):
        make = family.LAYOUTS.get(bound.layout)
        if make is not None:
            found = make(bound, dtype)
            return found if found is None or prepared or found.derived is nothing else None
    return None
