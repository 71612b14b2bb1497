"""How much memory a plan takes; no torch import, so that a dry run stays light."""

from __future__ import annotations

from dataclasses import dataclass

from ctconvert.planning import ModulePlan, Plan
from ctconvert.specs import TensorSpec

#: Part of the budgets that does not depend on the largest module.
_READ_AHEAD = 96 << 20
_WORK = 160 << 20
#: What the interpreter and the libraries hold before any weight is read.
_BASE = 600 << 20


@dataclass(frozen=True)
class Memory:
    """Bytes a conversion may hold: read ahead of a transform, and working in transforms."""

    read: int
    work: int

    @classmethod
    def of(cls, largest_read: int, largest_work: int) -> Memory:
        """The budgets for the largest module: what it takes, and room to read ahead."""
        return cls(_READ_AHEAD + largest_read, _WORK + largest_work)


def memory_of(plan: Plan) -> Memory:
    """The budgets of a plan: a constant and at most 4 times the largest module."""
    largest_read = max((item.input_bytes for item in plan.modules), default=0)
    largest_work = max((work_bytes(item) for item in plan.modules), default=0)
    return Memory.of(largest_read, largest_work)


def work_bytes(item: ModulePlan) -> int:
    """What a module's transform holds beside its source tensors, at its peak.

    That is the logical weight (where it is not the source's own memory), the output, and the weight
    that the output is decoded to, to be compared; or the parts of a fused weight and their stack.
    """
    spec = item.spec
    logical = item.input_bytes
    if spec.storage == "plain":
        logical = TensorSpec(spec.element, (spec.n, spec.k)).nbytes
    fused = len(item.parts) > 1
    own = logical if fused or spec.sparse else 0
    stacking = 2 * logical if fused and spec.sparse else 0
    return max(stacking, own + item.output_bytes + logical)


def comparison_bytes(item: ModulePlan) -> int:
    """What comparing an output module with its source holds at its peak."""
    return item.input_bytes + item.output_bytes + work_bytes(item)


def peak_memory(plan: Plan) -> int:
    """An upper estimate of a conversion's private memory, in bytes."""
    memory = memory_of(plan)
    return _BASE + memory.read + memory.work
