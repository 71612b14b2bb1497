"""Names as people read them: in natural order, and the one that was meant."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


def natural(name: str) -> list[tuple[int, str]]:
    """What names are sorted by so that ``layers.2`` comes before ``layers.10``."""
    pieces = re.split(r"([0-9]{1,300})", name)
    return [(int(piece), "") if place % 2 else (0, piece) for place, piece in enumerate(pieces)]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The name that was most likely meant, None where none is near."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(name, list(known), 1)), None)


def meant(name: str, known: Iterable[str]) -> str:
    """The end of a line that refuses a name: ``; did you mean 'cuda'?``, or nothing."""
    found = nearest(name, known)
    return "" if found is None else f"; did you mean {found!r}?"


def nearest_directory(path: Path) -> str:
    """The end of a line on a directory that is not there: ``; the nearest is out``, or nothing.

    The first part of the path that is missing is looked for among its neighbours.
    """
    missing = path
    try:
        while not missing.parent.is_dir():
            missing = missing.parent
            if missing == missing.parent:
                return ""
        beside = {item.name for item in missing.parent.iterdir() if item.is_dir()}
    except OSError:
        return ""
    found = nearest(missing.name, beside)
    if found is None:
        return ""
    guess = missing.with_name(found) / path.relative_to(missing)
    return f"; the nearest is {guess if guess.is_dir() else missing.with_name(found)}"
