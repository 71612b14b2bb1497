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
from ctconvert.layouts.mx_swizzled import MXFP4Swizzled, MXFP8Swizzled
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
    MXFP8Swizzled(),
    MXFP4Swizzled(),
    W4A8FP8(),
    CPUW4A16(),
    CPUW4A8(),
    CPUInt8(),
)

_BLOCK_FLOATS = ("marlin-nvfp4", "marlin-nvfp4-f16", "marlin-mxfp8")
_FP8 = ("marlin-fp8", "marlin-fp8-f16")

#: A target is an ordered preference: a module gets the first layout that supports it. ``triton``
#: and ``cuda`` run on every machine of the kind, the others follow what vLLM picks on that one.
#: Layouts for another dtype of the activations than the checkpoint's are passed over.
TARGETS: Mapping[str, tuple[str, ...]] = {
    "triton": ("triton-wna16", "scaled-mm", "marlin-mxfp4", "gather"),
    "cuda": (
        "cutlass-sparse24",
        "marlin-mxfp4",
        "marlin",
        "triton-wna16",
        "scaled-mm",
        *_BLOCK_FLOATS,
        *_FP8,
        "gather",
    ),
    # no FP8 tensor cores, so FP8 before the INT8 of scaled-mm
    "cuda-sm80": (
        "marlin",
        "triton-wna16",
        "marlin-mxfp4",
        *_BLOCK_FLOATS,
        *_FP8,
        "scaled-mm",
        "gather",
    ),
    "cuda-sm90": (
        "cutlass-sparse24",
        "w4a8-fp8",
        "machete",
        "humming",
        "marlin",
        "triton-wna16",
        "humming-nvfp4",
        "marlin-mxfp4",
        "marlin-mxfp8",
        "scaled-mm",
        *_FP8,
        "gather",
    ),
    "cuda-sm100": (
        "marlin",
        "triton-wna16",
        "nvfp4-cutlass",
        "mxfp4-swizzled",
        "mxfp8-swizzled",
        "marlin-mxfp4",
        *_BLOCK_FLOATS,
        "scaled-mm",
        *_FP8,
        "gather",
    ),
    "rocm": ("triton-wna16", "scaled-mm", "marlin-mxfp4", "gather"),
    "xpu": ("xpu-w4a8", "xpu-w4a16", "triton-wna16", "scaled-mm", "marlin-mxfp4", "gather"),
    "cpu": ("cpu-w4a8", "cpu-w4a16", "cpu-int8", "gather"),
}

#: What each target is for, for people.
MACHINES: Mapping[str, str] = {
    "triton": "Triton kernels on any GPU",
    "cuda": "any NVIDIA GPU from SM80 on (2:4 sparse: SM90)",
    "cuda-sm80": "NVIDIA Ampere and Ada, SM80 to SM89",
    "cuda-sm90": "NVIDIA Hopper, SM90",
    "cuda-sm100": "NVIDIA Blackwell, SM100",
    "rocm": "AMD GPUs",
    "xpu": "Intel GPUs",
    "cpu": "CPUs with AVX-512, W4A8 and INT8 with AMX",
}

#: What a target prefers only for weights whose activations are quantised too: the kernels there
#: quantise them, and a checkpoint that asks for 16-bit ones has another layout.
QUANTISED_ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "cuda-sm90": ("scaled-mm",),
    "cuda-sm100": ("scaled-mm",),
    "cpu": ("cpu-w4a8",),
}

__all__ = ["LAYOUTS", "MACHINES", "QUANTISED_ACTIVATIONS", "TARGETS", "Layout", "get"]


def get(name: str) -> Layout | None:
    """The layout of that name, or None."""
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    return None
