"""The kernel layouts and the targets that prefer them.

To add a layout: a file here, a line in :data:`LAYOUTS`, its name in the targets that want it.
"""

from __future__ import annotations

from collections.abc import Mapping

from ctconvert.layouts.base import Layout
from ctconvert.layouts.triton_wna16 import TritonWNA16

#: Every layout.
LAYOUTS: tuple[Layout, ...] = (TritonWNA16(),)

#: A target is an ordered preference: a module gets the first layout that supports it.
TARGETS: Mapping[str, tuple[str, ...]] = {
    "triton": ("triton-wna16",),
    "cuda": ("triton-wna16",),
    "xpu": ("triton-wna16",),
}

__all__ = ["LAYOUTS", "TARGETS", "Layout", "get"]


def get(name: str) -> Layout | None:
    """The layout of that name, or None."""
    return next((layout for layout in LAYOUTS if layout.name == name), None)
