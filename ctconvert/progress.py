"""How a long run tells what it is doing, without knowing where that is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ctconvert.records import Plan


class Progress(Protocol):
    """Told of the phases of a run and the bytes done in each; called from any thread."""

    def plan(self, plan: Plan) -> None:
        """What will be made, before any of it is."""

    def phase(self, label: str, total: int) -> None:
        """A phase of ``total`` bytes begins."""

    def advance(self, count: int) -> None:
        """``count`` more bytes are done."""

    def module(self, name: str, layout: str | None) -> None:
        """A module is made; with its layout where it was converted."""

    def note(self, text: str) -> None:
        """A line the user should see."""


class Silent:
    """Shows nothing."""

    def plan(self, plan: Plan) -> None:
        pass

    def phase(self, label: str, total: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def module(self, name: str, layout: str | None) -> None:
        pass

    def note(self, text: str) -> None:
        pass
