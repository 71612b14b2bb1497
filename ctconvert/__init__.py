"""Offline converter from compressed-tensors checkpoints to kernel-ready ones.

The verbs of the command line are functions here: :func:`inspect`, :func:`doctor`, :func:`plan`,
:func:`repack`, :func:`push`, :func:`verify`, :func:`diff` and :func:`restore`. They return the
typed records that are here too, raise a :class:`CtconvertError` of one line, and tell a
:class:`Progress` how far they are. All is loaded on first use, so ``import ctconvert`` imports
neither torch nor triton nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ctconvert.version import __version__

if TYPE_CHECKING:
    from ctconvert.api import diff, doctor, inspect, plan, push, repack, restore, verify
    from ctconvert.errors import CtconvertError
    from ctconvert.planning.inspection import Inspection
    from ctconvert.progress import Progress
    from ctconvert.records import Differing, Examination, Plan, Pushed, Report, Verified

__all__ = [
    "CtconvertError",
    "Differing",
    "Examination",
    "Inspection",
    "Plan",
    "Progress",
    "Pushed",
    "Report",
    "Verified",
    "__version__",
    "diff",
    "doctor",
    "inspect",
    "plan",
    "push",
    "repack",
    "restore",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ctconvert import api

        return getattr(api, name)
    raise AttributeError(f"module 'ctconvert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
