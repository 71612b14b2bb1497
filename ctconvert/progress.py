"""How a long run tells what it is doing, without knowing where that is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ctconvert.records import Plan


class Progress(Protocol):
    """Told what a run does; called from any thread.

    A class with these methods is one. One that inherits from this need only have those it is for.
    """

    def plan(self, plan: Plan) -> None:
        """What will be made, before any of it is."""
        return

    def phase(self, label: str, total: int) -> None:
        """A phase of ``total`` bytes begins; the one before it is over."""
        return

    def advance(self, count: int) -> None:
        """``count`` more bytes of the phase are done; they add up to its total."""
        return

    def module(self, name: str, layout: str | None) -> None:
        """A module is made; with its layout where it was converted."""
        return

    def note(self, text: str) -> None:
        """A line the user should see."""
        return


class Silent(Progress):
    """Shows nothing."""
