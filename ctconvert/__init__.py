"""Offline converter from compressed-tensors checkpoints to kernel-ready ones.

The verbs of the command line are functions here: :func:`inspect`, :func:`plan`, :func:`repack`,
:func:`verify` and :func:`restore`. They are loaded on first use, so ``import ctconvert`` imports
neither torch nor triton nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ctconvert.version import __version__

__all__ = ["__version__", "inspect", "plan", "repack", "restore", "verify"]

if TYPE_CHECKING:
    from ctconvert.api import inspect, plan, repack, restore, verify


def __getattr__(name: str) -> Any:
    if name in ("inspect", "plan", "repack", "restore", "verify"):
        from ctconvert import api

        return getattr(api, name)
    raise AttributeError(f"module 'ctconvert' has no attribute {name!r}")
