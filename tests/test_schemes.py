"""The tables of checkpoints under their former name."""

from support.schemes import FRESH, REAL

__all__ = ["FRESH", "REAL"]
