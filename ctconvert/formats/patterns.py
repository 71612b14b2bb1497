"""Names and ``re:`` patterns that mean modules, matched as Python's ``re.match`` does.

A checkpoint is somebody else's file, and ``re`` can neither be interrupted nor bounded:
``re:(a|aa)+$`` runs for years. The patterns here are matched by the ``regex`` package, whose
matches take a timeout, after ``re`` itself has accepted them; what ``regex`` reads differently is
translated. Compiling is bounded by the length of a pattern and by what its repeats unroll to.

Speed: a model has many names and its config many patterns, so a pattern is tried only on names that
hold every literal the pattern asks for.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable
from typing import TypeAlias

import regex

_PREFIX = "re:"
_LONGEST = 1000
#: Copies of one character that a pattern's repeats may unroll to; ``regex`` makes each a node.
_UNROLLED = 1000
#: Seconds of matching one pattern may take over all names; a list of them gets a little more each.
_SECONDS = 2.0
_SECONDS_EACH = 0.05
_SHORTEST = 0.001
_TAME_NAME = 256

_TOKEN = re.compile(
    r"\\N\{[^}]*\}|\\x..|\\u.{4}|\\U.{8}|\\[0-9]{1,3}|\\."  # escapes
    r"|\[\^?\]?(?:\\.|[^\]\\])*\]"  # sets
    r"|\{(?P<low>[0-9]*),?(?P<high>[0-9]*)\}|.",
    re.DOTALL,
)
_COMMENTS = re.compile(r"\(\?(#|[aiLmsu-]*x)")
_FLAGS = re.compile(r"\(\?[aiLmsu-]")


class PatternError(ValueError):
    """A pattern that is none, or that takes too long; one line that names it."""


class _Budget:
    """Seconds of matching that are left, first by the wall clock, which is cheap to read.

    Only when those are used up does it read the CPU clock, which a busy machine does not stretch.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = self.left = seconds
        self.clock = time.perf_counter

    def charge(self, seconds: float) -> bool:
        """Whether something is left."""
        self.left -= seconds
        if self.left < _SHORTEST and self.clock is not time.thread_time:
            self.left, self.clock = self.seconds, time.thread_time
        return self.left >= _SHORTEST


class _Survey:
    """What the text of a pattern says without being compiled.

    ``translated`` is what ``regex`` must be given; ``size`` what the repeats unroll to. Every match
    starts with ``head``, ends with ``tail`` (but for a newline) and holds ``literals``, longest
    first; all are empty where that is not plain to see. ``tame`` tells that a match takes at most
    some hundred million steps, whatever the name, up to :data:`_TAME_NAME` characters.
    """

    def __init__(self, text: str) -> None:
        self.head = self.tail = ""
        made: list[str] = []
        runs: list[str] = []
        sizes = [0]  # one an open group
        last = 1  # the size of the last atom
        run = before = ""
        branches = _FLAGS.search(text) is not None  # flags may change what a literal matches
        choices = loops = 0
        self.tame = True
        for token in _TOKEN.finditer(text):
            part = token[0]
            times = _times(token)
            if times and before != "(":
                sizes[-1] += last * (times - 1)
                last *= times
                runs.append(run[:-1])
                run = ""
                choices += part == "?"
                loops += part != "?"
                self.tame &= before != ")" or part == "?"
            else:
                if part == "(":
                    sizes.append(0)
                elif part == ")" and len(sizes) > 1:
                    last = sizes.pop()
                    sizes[-1] += last
                else:
                    last = 1
                    sizes[-1] += 1
                choices += part == "|"
                branches |= part == "|" and len(sizes) == 1
                if literal := _literal(part) if len(sizes) == 1 and part != ")" else "":
                    run += literal
                else:
                    runs.append(run)
                    if part == "$" and token.end() == len(text):
                        self.tail = run
                    run = ""
                part = _translated(part)
            if len(runs) == 1:
                self.head = runs[0]
            made.append(part)
            before = part
        runs.append(run)
        if len(runs) == 1:
            self.head = run
        self.translated = "".join(made)
        self.size = sum(sizes)
        self.tame &= choices <= (8 if loops <= 2 else 4 if loops == 3 else -1)
        self.literals: tuple[str, ...] = ()
        if branches:
            self.head = self.tail = ""
        else:
            self.literals = tuple(sorted({run for run in runs if run}, key=len, reverse=True))


def _times(token: re.Match[str]) -> int:
    """How many copies a repeat unrolls to, 0 where the token is none."""
    if token[0] in ("*", "?", "+"):
        return 2 if token[0] == "+" else 1
    if token["low"] is None or token[0] == "{}":
        return 0
    return max(int(token["low"] or 0), int(token["high"] or 0), 1)


def _literal(part: str) -> str:
    """The character a token stands for, or nothing."""
    if len(part) == 2 and part[0] == "\\" and not part[1].isalnum():
        part = part[1]
    elif len(part) != 1 or part in ".^$|(":
        return ""
    return part if part != "\n" else ""  # `$` also matches before a newline


def _translated(part: str) -> str:
    if part in ("{", "{}"):  # text to re, the start of a fuzzy match to regex
        return part.replace("{", r"\{").replace("}", r"\}")
    if part[0] == "[" and len(part) > 2:  # [[:alpha:]] is no class of letters to re
        return "[" + re.sub(r"\\.|\[", lambda m: m[0] if m[0] != "[" else r"\[", part[1:])
    return part


class Pattern:
    """One regular expression, without its ``re:``.

    Raises:
        PatternError: ``re`` does not take it, or compiling it might take too long.
    """

    def __init__(self, text: str, budget: _Budget | None = None) -> None:
        self.text = text
        self._budget = budget or _Budget(_SECONDS)
        if len(text) > _LONGEST:
            raise PatternError(f"{self} is longer than {_LONGEST} characters")
        if _COMMENTS.search(text):
            raise PatternError(f"{self} holds a comment; write it without")
        self.survey = _Survey(text)
        if self.survey.size > _UNROLLED + len(text):
            raise PatternError(f"{self} repeats something too often; write it more simply")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "possible nested set": it is matched as re does
                re.compile(text)
                self._match = regex.compile(self.survey.translated, regex.VERSION0).match
                self._tame = self.survey.tame
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
        budget = self._budget
        if self._tame and len(name) <= _TAME_NAME and budget.clock is time.perf_counter:
            started = time.perf_counter()
            found = self._match(name) is not None  # a timeout costs more than the match
            budget.charge(time.perf_counter() - started)
            return found
        while True:
            clock = budget.clock
            started = clock()
            timed_out = False
            try:
                found = self._match(name, timeout=budget.left) is not None
            except TimeoutError:  # of CPU time, whatever our clock
                timed_out = True
            hopeless = timed_out and budget.left > budget.seconds / 2
            if hopeless or not budget.charge(clock() - started):
                raise PatternError(
                    f"{self} takes too long to match module names; write it more simply"
                )
            if not timed_out:
                return found


#: Its place in the list, the literals it asks for, and the pattern.
_Entry: TypeAlias = tuple[int, tuple[str, ...], Pattern]


class _Index:
    """Patterns by a piece of text at a known end of every name they match."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.found: dict[str, list[_Entry]] = {}

    def add(self, key: str, entry: _Entry) -> None:
        self.found.setdefault(key, []).append(entry)
        self.sizes = sorted({*self.sizes, len(key)})


class Patterns:
    """A list of names, class names and ``re:`` patterns, in its own order.

    Args:
        entries: as a config lists them.

    Raises:
        PatternError: a pattern is none, see :class:`Pattern`.
    """

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self.entries = tuple(entries)
        self._places: dict[str, int] = {}
        self._tails, self._heads = _Index(), _Index()
        self._holding: dict[str, list[_Entry]] = {}
        self._known: dict[str, int | None] = {}
        self._patterns = False
        budget = _Budget(_SECONDS + _SECONDS_EACH * len(self.entries))
        started = time.thread_time()
        for place, entry in enumerate(self.entries):
            if not entry.startswith(_PREFIX):
                self._places.setdefault(entry, place)
                continue
            self._patterns = True
            pattern = Pattern(entry.removeprefix(_PREFIX), budget)
            if time.thread_time() - started > budget.seconds:
                raise PatternError(f"{pattern} and those before it take too long to compile")
            self._add(place, pattern)

    def _add(self, place: int, pattern: Pattern) -> None:
        survey = pattern.survey
        item = (place, survey.literals, pattern)
        if survey.tail:
            self._tails.add(survey.tail, item)
        elif survey.head:
            self._heads.add(survey.head, item)
        else:
            self._holding.setdefault("".join(survey.literals[:1]), []).append(item)

    def __bool__(self) -> bool:
        return bool(self.entries)

    def _by_pattern(self, name: str) -> int | None:
        """The place of the first pattern that matches."""
        if name in self._known:
            return self._known[name]
        hits: list[_Entry] = []
        stem = name.removesuffix("\n")
        for size in self._tails.sizes:
            hits += self._tails.found.get(stem[-size:], ())
        for size in self._heads.sizes:
            hits += self._heads.found.get(name[:size], ())
        for literal, entries in self._holding.items():
            if literal in name:
                hits += entries
        found: int | None = None
        for place, literals, pattern in hits:
            if found is not None and found < place:
                continue
            for literal in literals:
                if literal not in name:
                    break
            else:
                if pattern.match(name):
                    found = place
        self._known[name] = found
        return found

    def first(self, name: str, cls: str | None = None) -> str | None:
        """The first entry that is the name, its class, or a pattern that matches the name.

        Raises:
            PatternError: the time for matching is used up.
        """
        found = self._by_pattern(name) if self._patterns else None
        for key in (name, cls or name):
            place = self._places.get(key)
            if place is not None and (found is None or place < found):
                found = place
        return None if found is None else self.entries[found]

    def any(self, name: str, cls: str | None = None) -> bool:
        """Whether an entry means the module, see :meth:`first`."""
        if name in self._places or cls in self._places:
            return True
        return self._patterns and self._by_pattern(name) is not None
