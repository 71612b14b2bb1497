"""Runs converted checkpoints: a module a layout, each beside a plain reference.

:func:`load` gives the modules, :func:`load_model` the transformers model with them in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ctconvert.errors import UsageError

__all__ = ["KernelEmbedding", "KernelExperts", "KernelLinear", "load", "load_model"]

if TYPE_CHECKING:
    from ctconvert.integrations.transformers.loading import load_model
    from ctconvert.runtime.loading import load
    from ctconvert.runtime.modules import KernelEmbedding, KernelExperts, KernelLinear


def __getattr__(name: str) -> Any:
    if name == "load":
        from ctconvert.runtime.loading import load

        return load
    if name == "load_model":
        try:
            from ctconvert.integrations.transformers.loading import load_model
        except ImportError as error:
            raise UsageError(
                f"load_model needs transformers: pip install 'ctconvert[transformers]' ({error})"
            ) from None
        return load_model
    if name in ("KernelEmbedding", "KernelExperts", "KernelLinear"):
        from ctconvert.runtime import modules

        return getattr(modules, name)
    raise AttributeError(f"module 'ctconvert.runtime' has no attribute {name!r}")
