"""The references under their former name."""

from support.reference import *  # noqa: F403
