"""The builders under their former name."""

from support.builders import *  # noqa: F403
