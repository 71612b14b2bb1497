"""The kernels of the layouts; importing them compiles nothing and needs no Triton.

To add a kernel: a folder here with its :class:`Kernel` record, and a line in :data:`KERNELS`.
"""

from __future__ import annotations

from ctconvert.errors import UsageError
from ctconvert.runtime.kernels.base import Binding, Kernel
from ctconvert.runtime.kernels.gather.kernel import GATHER
from ctconvert.runtime.kernels.marlin.records import (
    HUMMING,
    HUMMING_NVFP4,
    MARLIN,
    MARLIN_FP8,
    MARLIN_FP8_F16,
    MARLIN_MXFP4,
    MARLIN_MXFP8,
    MARLIN_NVFP4,
    MARLIN_NVFP4_F16,
)
from ctconvert.runtime.kernels.plain.kernel import (
    CPU_INT8,
    CPU_W4A8,
    CPU_W4A16,
    MACHETE,
    W4A8_FP8,
)
from ctconvert.runtime.kernels.scaled_mm.kernel import SCALED_MM
from ctconvert.runtime.kernels.sparse24.kernel import CUTLASS_SPARSE24
from ctconvert.runtime.kernels.wna16.kernel import TRITON_WNA16
from ctconvert.runtime.kernels.xpu.kernel import XPU_W4A8, XPU_W4A16
from ctconvert.specs import WeightSpec

#: Every kernel.
KERNELS: tuple[Kernel, ...] = (
    TRITON_WNA16,
    MARLIN,
    MARLIN_MXFP4,
    SCALED_MM,
    CUTLASS_SPARSE24,
    XPU_W4A8,
    XPU_W4A16,
    GATHER,
    HUMMING,
    HUMMING_NVFP4,
    MARLIN_NVFP4,
    MARLIN_NVFP4_F16,
    MARLIN_FP8,
    MARLIN_FP8_F16,
    MARLIN_MXFP8,
    MACHETE,
    W4A8_FP8,
    CPU_W4A16,
    CPU_W4A8,
    CPU_INT8,
)

__all__ = ["KERNELS", "Binding", "Kernel", "find", "get"]


def find(layout: str, spec: WeightSpec | None = None) -> Kernel | None:
    """The kernel of the layout of that name, for weights such as ``spec``, or None."""
    for kernel in KERNELS:
        if kernel.layout == layout:
            return kernel if spec is None or kernel.takes(spec) else None
    return None


def get(layout: str, spec: WeightSpec | None = None) -> Kernel:
    """As :func:`find`.

    Raises:
        UsageError: there is none.
    """
    if (kernel := find(layout, spec)) is not None:
        return kernel
    what = f"layout {layout}"
    if spec is not None and find(layout) is not None:
        what += f" with activations {spec.activations}"
    raise UsageError(
        f"there is no kernel for {what} here: a serving engine runs it, and `ctconvert "
        "verify --against MODEL` proves it"
    )
