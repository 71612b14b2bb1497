"""What Python sees of the package: the verbs, by name, with types."""

from __future__ import annotations

import inspect

import msgspec
import pytest

import ctconvert


@pytest.mark.parametrize("verb", [name for name in ctconvert.__all__ if name != "__version__"])
def test_a_verb_is_shown_and_returns_a_record(verb: str) -> None:
    assert verb in dir(ctconvert)
    function = getattr(ctconvert, verb)
    assert inspect.getdoc(function)
    from ctconvert import api, records
    from ctconvert.planning.inspection import Inspection

    name = inspect.signature(function).return_annotation
    found = {**vars(records), "Inspection": Inspection}[name]
    assert issubclass(found, msgspec.Struct)
    assert function is getattr(api, verb)


def test_what_is_not_there() -> None:
    with pytest.raises(AttributeError, match="'bogus'"):
        ctconvert.bogus  # noqa: B018
