"""Memory in flight, bounded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CancelledError(Exception):
    """Another worker failed or the run was interrupted."""


class Budget:
    """Bytes that threads hold between them, never more than ``limit`` at once.

    A single request larger than the limit is let through alone.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = 0
        self._changed = threading.Condition()
        self._cancelled = False

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Waits until ``count`` bytes are free and holds them.

        Raises:
            CancelledError: :meth:`cancel` was called.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._cancelled or not self._used or self._used + count <= self.limit
            )
            if self._cancelled:
                raise CancelledError
            self._used += count
        try:
            yield
        finally:
            with self._changed:
                self._used -= count
                self._changed.notify_all()

    def cancel(self) -> None:
        """Wakes every waiting thread with :class:`CancelledError`."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
