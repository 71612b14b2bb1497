"""The kernel layouts and the targets that prefer them.

To add a layout: a file here, a line in :data:`LAYOUTS`, its name in the targets that want it.
"""

from __future__ import annotations

from collections.abc import Mapping

from ctconvert.layouts.base import Layout
from ctconvert.layouts.cutlass_sparse24 import CutlassSparse24
from ctconvert.layouts.gather import Gather
from ctconvert.layouts.marlin import Marlin, MarlinMXFP4
from ctconvert.layouts.scaled_mm import ScaledMM
from ctconvert.layouts.triton_wna16 import TritonWNA16
from ctconvert.layouts.xpu import XPUW4A8, XPUW4A16

#: Every layout.
LAYOUTS: tuple[Layout, ...] = (
    TritonWNA16(),
    Marlin(),
    MarlinMXFP4(),
    ScaledMM(),
    CutlassSparse24(),
    XPUW4A8(),
    XPUW4A16(),
    Gather(),
)

#: A target is an ordered preference: a module gets the first layout that supports it.
TARGETS: Mapping[str, tuple[str, ...]] = {
    "triton": ("triton-wna16", "scaled-mm", "gather"),
    "cuda": ("cutlass-sparse24", "marlin-mxfp4", "marlin", "triton-wna16", "scaled-mm", "gather"),
    "xpu": ("xpu-w4a8", "xpu-w4a16", "triton-wna16", "gather"),
}

__all__ = ["LAYOUTS", "TARGETS", "Layout", "get"]


def get(name: str) -> Layout | None:
    """The layout of that name, or None."""
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    return None
