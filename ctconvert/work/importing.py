"""Torch, imported where no signal disturbs it."""

from __future__ import annotations

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor

from ctconvert.planning.asked import no_collection


def load_torch() -> None:
    """Imports torch, in another thread: signals raise what they raise in the main thread alone.

    Torch takes whatever is raised while it imports NumPy to mean that there is none: a run would go
    on as if there had been no signal, with half of NumPy, or abort. A tenth of the time is else
    looking for garbage.
    """
    if "torch" in sys.modules:
        return
    with no_collection(), ThreadPoolExecutor(1) as thread:
        thread.submit(importlib.import_module, "torch").result()
