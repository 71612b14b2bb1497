"""What Ctrl-C, SIGTERM and SIGHUP do to a run of the command line.

The first signal raises :class:`Stopped` in the main thread, so that workers end and files are
closed in order, and it decides the line on stderr and the exit code. Any later one ends the process
at once with that same code, which is as safe as a kill: an output appears whole or not at all.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_WORDS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "stopped by SIGTERM",
    signal.SIGHUP: "stopped by SIGHUP",
}


class Stopped(BaseException):
    """A signal. As a KeyboardInterrupt, it is no error that anything but the top may handle."""


class Signals:
    """The state of this process: which signal came first, and what there is to say of it."""

    def __init__(self) -> None:
        #: The exit code, once it is decided.
        self.code: int | None = None
        #: What ends the line that a signal leaves: how to go on.
        self.advice = ""
        self._line = ""
        self._telling = self._again = False

    def install(self) -> None:
        """Handles the signals; those that the caller had ignored (``nohup``) stay ignored."""
        for number in _WORDS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._came)

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self.code is None:
            # the line first: another signal may come between the two, and finds none decided yet
            self._line = _WORDS[signal.Signals(number)] + self.advice
            self.code = 128 + number
            raise Stopped
        if self._telling:
            self._again = True
            return
        if self._line:
            with suppress(OSError):  # nobody may be there to read it
                os.write(2, f"error: {self._line}\n".encode())
        os._exit(self.code)

    @property
    def line(self) -> str:
        """The line to leave, until it was told."""
        return self._line

    @contextmanager
    def telling(self) -> Iterator[None]:
        """The line is written meanwhile: whole and once, whenever another signal comes."""
        self._telling = True
        try:
            yield
            self._line = ""
        finally:
            self._telling = False
            if self._again:
                os._exit(self.code or 1)

    def done(self, code: int) -> None:
        """The run is over: a signal that comes while the interpreter ends changes nothing."""
        self._line, self.code = "", code


SIGNALS = Signals()
