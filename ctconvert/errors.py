"""Typed errors. Each ends in one line for the user and one exit code.

Exit codes: 1 the conversion or the verification failed, 2 bad usage or bad input,
3 the target cannot take a module, 130 interrupted.
"""

from __future__ import annotations


class CtconvertError(Exception):
    """Base of every error this package raises on purpose.

    The message is one line: what is wrong, where, and what to do about it.
    """

    exit_code = 1


class ConversionError(CtconvertError):
    """The conversion could not finish (disk full, out of memory, a transform failed)."""


class VerificationError(CtconvertError):
    """The output does not hold what it should."""


class UsageError(CtconvertError):
    """The command cannot be run as asked."""

    exit_code = 2


class BadInputError(CtconvertError):
    """The source checkpoint is damaged, incomplete or contradicts itself."""

    exit_code = 2


class IncompleteError(BadInputError):
    """A part of the source checkpoint is missing."""


class UnsupportedError(CtconvertError):
    """The source is sound, but the target has no layout that takes it."""

    exit_code = 3
