"""Typed errors. Each ends in one line for the user and one exit code.

Exit codes: 1 the conversion or the verification failed, 2 bad usage or bad input, no manifest where
one belongs included, 3 the target cannot take a module, 130 interrupted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from ctconvert.records import Refusal

#: The options of the command line that are arguments of functions too; those without a value.
_FLAGS = (
    *("commit", "create-pr", "expert-parallel", "fuse", "independent", "keep-unsupported"),
    *("kernels", "local-copy", "overwrite", "private", "resume"),
)
_VALUED = (
    *(
        "against",
        "branch",
        "device",
        "dtype",
        "exclude",
        "include",
        "layout",
        "max-shard-size",
        "target",
    ),
    *("address", "executor", "part", "push", "tensor-parallel", "workers"),
)
#: Arguments that are called otherwise.
_NAMES = {"push": "push_to"}
#: An option, with its value where the message says one; not in a command between backticks.
_OPTION = re.compile(
    rf"`[^`]*`|(?<![\w./-])--({'|'.join((*_FLAGS, *_VALUED))})(?![\w-])"
    r"(?: (?=[A-Z]+\b)| (cpu)\b)?"
)


def in_python(message: str) -> str:
    """A message in which options (``--overwrite``) are arguments (``overwrite=True``)."""

    def argument(found: re.Match[str]) -> str:
        option = found[1]
        if option is None:
            return found[0]
        name = _NAMES.get(option, option.replace("-", "_"))
        if option in _FLAGS:
            return f"{name}=True" + " " * found[0].endswith(" ")
        if found[2] is not None:
            return f"{name}={found[2]!r}"
        return f"{name}=" if found[0].endswith(" ") else name

    return _OPTION.sub(argument, message)


class CtconvertError(Exception):
    """Base of every error this package raises on purpose.

    ``message`` advises in the command line's terms, ``str`` in Python's.

    Args:
        message: one line: what is wrong, where, and what to do about it.
        module: the name of the module that it is about, where it is about one.
        file: the name or path of the file that it is about.
        refusals: the modules that a plan refuses, where that is what is wrong.
    """

    exit_code: ClassVar[int] = 1
    #: What programs tell errors by.
    kind: ClassVar[str] = "Error"

    def __init__(
        self,
        message: str = "",
        *,
        module: str | None = None,
        file: str | None = None,
        refusals: Sequence[Refusal] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.module = module
        self.file = file
        self.refusals = tuple(refusals)

    def __str__(self) -> str:
        return in_python(self.message)


class ConversionError(CtconvertError):
    """The conversion could not finish (disk full, out of memory, a transform failed)."""

    kind = "Conversion"


class VerificationError(CtconvertError):
    """The output does not hold what it should."""

    kind = "Verification"


class NoManifestError(VerificationError):
    """There is no manifest, so this is no output that could be damaged."""

    exit_code = 2
    kind = "NoManifest"


class DifferenceError(VerificationError):
    """Two checkpoints do not hold the same weights."""

    kind = "Difference"


class FindingsError(VerificationError):
    """An examination found something wrong."""

    kind = "Findings"


class UsageError(CtconvertError):
    """The command cannot be run as asked."""

    exit_code = 2
    kind = "Usage"


class BadInputError(CtconvertError):
    """The source checkpoint is damaged, incomplete or contradicts itself."""

    exit_code = 2
    kind = "BadInput"


class IncompleteError(BadInputError):
    """A part of the source checkpoint is missing."""

    kind = "Incomplete"


class UnsupportedError(CtconvertError):
    """The source is sound, but the target has no layout that takes it."""

    exit_code = 3
    kind = "Unsupported"
