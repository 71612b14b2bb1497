"""Bit-exact transforms between checkpoint formats and kernel layouts."""
