"""The kernel layouts and the targets that prefer them.

To add a layout: a file here, a line in :data:`LAYOUTS`, its name in the targets that want it.
"""

from __future__ import annotations

from collections.abc import Mapping

from ctconvert.layouts.base import Layout
from ctconvert.layouts.cpu import CPUW4A8, CPUW4A16, CPUInt8
from ctconvert.layouts.cutlass_sparse24 import CutlassSparse24
from ctconvert.layouts.gather import Gather
from ctconvert.layouts.humming import Humming, HummingNVFP4
from ctconvert.layouts.machete import Machete
from ctconvert.layouts.marlin import Marlin, MarlinMXFP4
from ctconvert.layouts.marlin_fp8 import MarlinFP8, MarlinFP8Half
from ctconvert.layouts.marlin_mxfp8 import MarlinMXFP8
from ctconvert.layouts.marlin_nvfp4 import MarlinNVFP4, MarlinNVFP4Half
from ctconvert.layouts.nvfp4_cutlass import NVFP4Cutlass
from ctconvert.layouts.scaled_mm import ScaledMM
from ctconvert.layouts.triton_wna16 import TritonWNA16
from ctconvert.layouts.w4a8_fp8 import W4A8FP8
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
    Machete(),
    Humming(),
    HummingNVFP4(),
    MarlinNVFP4(),
    MarlinNVFP4Half(),
    MarlinFP8(),
    MarlinFP8Half(),
    MarlinMXFP8(),
    NVFP4Cutlass(),
    W4A8FP8(),
    CPUW4A16(),
    CPUW4A8(),
    CPUInt8(),
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
