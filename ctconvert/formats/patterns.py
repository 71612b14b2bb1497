"""Names and ``re:`` patterns that mean modules, matched as Python's ``re.match`` does.

A checkpoint is somebody else's file, and ``re`` cannot be bounded: ``re:(a|aa)+$`` runs for years.
So a pattern that ``re`` accepts is matched by the ``regex`` package, which reads the same syntax
and whose matches take a timeout.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable

import regex

_PREFIX = "re:"
_LONGEST = 1000
#: How far the counts of repeats inside repeats may multiply: compiling copies what is repeated.
_MOST_COPIES = 10_000
#: Seconds that one pattern may take over all names, and a name alone that is matched for the first
#: time; real ones take microseconds.
_SECONDS = 2.0
_COUNTS = re.compile(r"\{(\d*),?(\d*)\}")


class PatternError(ValueError):
    """A pattern that is none, or that takes too long; one line that names it."""


class Pattern:
    """One regular expression, without its ``re:``.

    Raises:
        PatternError: ``re`` does not take it, or compiling it might take too long.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._left = _SECONDS
        copies = 1
        for low, high in _COUNTS.findall(text):
            copies *= max(int(low[:9] or 1), int(high[:9] or 1), 1)
        if len(text) > _LONGEST or copies > _MOST_COPIES:
            raise PatternError(f"{self} is too long or repeats too often; write it more simply")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sets that a later version may nest
                re.compile(text)
                self._match = regex.compile(text, regex.VERSION0).match
        except (re.error, regex.error, OverflowError) as error:
            raise PatternError(f"{self} is not a regular expression ({error})") from None
        except RecursionError:
            raise PatternError(f"{self} is nested too deeply") from None

    def __str__(self) -> str:
        return repr(_PREFIX + (self.text if len(self.text) < 80 else self.text[:77] + "..."))

    def match(self, name: str) -> bool:
        """Whether ``re.match`` would match.

        Raises:
            PatternError: the time for matching is used up.
        """
        started = time.thread_time()
        try:
            found = self._match(name, timeout=max(self._left, 0.001)) is not None
        except TimeoutError:
            found = None
        self._left -= time.thread_time() - started
        if found is None or self._left <= 0:
            raise PatternError(f"{self} takes too long to match module names; write it more simply")
        return found


class Patterns:
    """A list of names, class names and ``re:`` patterns, in its own order.

    Args:
        entries: as a config lists them.

    Raises:
        PatternError: a pattern is none, see :class:`Pattern`.
    """

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self.entries = tuple(entries)
        self._names = {
            entry: place
            for place, entry in reversed(list(enumerate(self.entries)))
            if not entry.startswith(_PREFIX)
        }
        self._patterns = [
            (place, Pattern(entry.removeprefix(_PREFIX)))
            for place, entry in enumerate(self.entries)
            if entry.startswith(_PREFIX)
        ]
        self._known: dict[str, int | None] = {}

    def __bool__(self) -> bool:
        return bool(self.entries)

    def _by_pattern(self, name: str) -> int | None:
        """The place of the first pattern that matches."""
        if not self._patterns:
            return None
        if name not in self._known:
            hits = (place for place, pattern in self._patterns if pattern.match(name))
            self._known[name] = next(hits, None)
        return self._known[name]

    def first(self, name: str, cls: str | None = None) -> str | None:
        """The first entry that is the name, its class, or a pattern that matches the name.

        Raises:
            PatternError: the time for matching is used up.
        """
        found = (self._names.get(name), self._names.get(cls or ""), self._by_pattern(name))
        places = [place for place in found if place is not None]
        return self.entries[min(places)] if places else None

    def any(self, name: str, cls: str | None = None) -> bool:
        """Whether an entry means the module, see :meth:`first`."""
        return name in self._names or cls in self._names or self._by_pattern(name) is not None
