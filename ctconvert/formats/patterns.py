r"""Names and ``re:`` patterns that mean modules, matched as Python's ``re.match`` does.

A checkpoint is somebody else's file, and Python's ``re`` cannot be bounded: ``re:(a|aa)+$`` runs
for years. RE2 matches in time linear in the name, in bounded memory, and takes the same syntax but
for what cannot be had in linear time, look-arounds and references back; those are refused. Its
classes (``\w``, ``\d``) are of ASCII alone.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

import re2

_PREFIX = "re:"
_LONGEST = 1000
#: Names whose matches are kept: one name is looked up several times in a row.
_REMEMBERED = 1 << 16
#: What RE2 reads as text, or as a class of letters, and Python as a repeat, or as text.
_READ_OTHERWISE = ("{,", "[[:")
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False


class PatternError(ValueError):
    """A pattern that cannot be used; one line that names it."""


class Pattern:
    """One regular expression, without its ``re:``.

    Raises:
        PatternError: Python does not take it, or RE2 does not.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        name = repr(_PREFIX + (text if len(text) < 80 else text[:77] + "..."))
        if len(text) > _LONGEST:
            raise PatternError(f"{name} is longer than {_LONGEST} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # advice on what a later Python may read otherwise
                re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(f"{name} is not a regular expression ({error})") from None
        if any(mark in text for mark in _READ_OTHERWISE):
            raise PatternError(f"{name} holds {' or '.join(_READ_OTHERWISE)}; write it otherwise")
        try:
            self._match = re2.compile(text, _OPTIONS).match
        except re2.error as error:
            reason = error.args[0].decode(errors="replace") if error.args else "too large"
            raise PatternError(
                f"{name} cannot be matched in bounded time ({reason}); write it without "
                "look-arounds, references back and large repeats"
            ) from None

    def match(self, name: str) -> bool:
        """Whether ``re.match`` would match."""
        return self._match(name.encode()) is not None  # of text RE2 would count the characters


def _either(patterns: Iterable[Pattern]) -> Pattern | None:
    """One pattern that matches where any of several does, since most names match none of them.

    None where it cannot be had: it would be too long.
    """
    texts = [f"(?:{pattern.text})" for pattern in patterns]
    if len(texts) < 2:
        return None
    try:
        return Pattern("|".join(texts))
    except PatternError:
        return None


class Patterns:
    """A list of names, class names and ``re:`` patterns, in its own order.

    Args:
        entries: as a config lists them.

    Raises:
        PatternError: a pattern cannot be used, see :class:`Pattern`.
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
        self._any = _either(pattern for _, pattern in self._patterns)
        self._known: dict[str, tuple[int, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self.entries)

    def _by_pattern(self, name: str) -> tuple[int, ...]:
        """The places of the patterns that match."""
        if not self._patterns:
            return ()
        if name not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[name] = ()
            if self._any is None or self._any.match(name):
                self._known[name] = tuple(
                    place for place, pattern in self._patterns if pattern.match(name)
                )
        return self._known[name]

    def all(self, name: str, cls: str | None = None) -> list[str]:
        """Every entry that is the name, its class, or a pattern that matches the name, in order."""
        places = {self._names.get(name), self._names.get(cls or ""), *self._by_pattern(name)}
        return [self.entries[place] for place in sorted(p for p in places if p is not None)]

    def first(self, name: str, cls: str | None = None) -> str | None:
        """The first entry that is the name, its class, or a pattern that matches the name."""
        return next(iter(self.all(name, cls)), None)

    def any(self, name: str, cls: str | None = None) -> bool:
        """Whether an entry means the module, see :meth:`first`."""
        return name in self._names or cls in self._names or bool(self._by_pattern(name))
