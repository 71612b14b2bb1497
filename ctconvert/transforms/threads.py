"""The CPU paths' threads: blocks of a weight, shared among them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

#: Torch runs an elementwise operation of at most so many elements in the calling thread (its
#: GRAIN_SIZE). Operations on a block stay under it, so that torch's threads do not multiply those
#: of this file or of the caller and none waits for another's; a block of them and its temporaries
#: also stay in the L2 cache.
GRAIN = 32768
#: Under this many bytes a thread costs more than it brings.
THREADED_BYTES = 8 << 20
_MAX_THREADS = 8  # beyond it the GIL is the limit

Item = TypeVar("Item")


def slices(n: int, length: int) -> list[slice]:
    """0 .. n in slices of ``length``, at least 1; the last one may be shorter."""
    length = max(length, 1)
    return [slice(start, min(start + length, n)) for start in range(0, n, length)]


def spread(work: Callable[[Sequence[Item]], None], items: Sequence[Item], nbytes: int) -> None:
    """Calls ``work`` on consecutive shares of ``items``, one share a thread.

    The main thread gets up to ``torch.get_num_threads()`` threads where the items are ``nbytes`` of
    :data:`THREADED_BYTES` or more. A caller that is itself a worker thread gets none: it has its
    own share of the cores. ``work`` runs in inference mode, whose tensors nothing outside that mode
    may write to: the mode is a thread's own, and what the caller allocated may have been made in
    it. The error raised is that of the first share that has one.
    """
    if not items:
        return
    workers = 1
    if nbytes >= THREADED_BYTES and threading.current_thread() is threading.main_thread():
        workers = min(torch.get_num_threads(), len(items), _MAX_THREADS)
    if workers <= 1:
        _run(work, items)
        return
    cuts = [len(items) * i // workers for i in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        for share in [pool.submit(_run, work, items[a:b]) for a, b in itertools.pairwise(cuts)]:
            share.result()


def stay_in_thread() -> None:
    """Has torch run the operations of a worker thread in that thread, from now on.

    Else each worker has a team of as many threads as there are cores, which wait for one another.
    """
    if threading.current_thread() is not threading.main_thread() and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


def _run(work: Callable[[Sequence[Item]], None], share: Sequence[Item]) -> None:
    with torch.inference_mode():
        work(share)
