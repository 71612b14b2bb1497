"""Runs converted checkpoints: a module a layout, each beside a plain reference.

:func:`load` gives the modules, :func:`load_model` the transformers model with them in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["KernelEmbedding", "KernelExperts", "KernelLinear", "load", "load_model"]

if TYPE_CHECKING:
    from ctconvert.runtime.loading import load, load_model
    from ctconvert.runtime.modules import KernelEmbedding, KernelExperts, KernelLinear


def __getattr__(name: str) -> Any:
    if name in ("load", "load_model"):
        from ctconvert.runtime import loading

        return getattr(loading, name)
    if name in ("KernelEmbedding", "KernelExperts", "KernelLinear"):
        from ctconvert.runtime import modules

        return getattr(modules, name)
    raise AttributeError(f"module 'ctconvert.runtime' has no attribute {name!r}")
