"""How a long run tells what it is doing, without knowing where that is shown."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of the phases of a run and the bytes done in each; called from any thread."""

    def phase(self, label: str, total: int) -> None:
        """A phase of ``total`` bytes begins."""

    def advance(self, count: int) -> None:
        """``count`` more bytes are done."""

    def note(self, text: str) -> None:
        """A line the user should see."""


class Silent:
    """Shows nothing."""

    def phase(self, label: str, total: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass
