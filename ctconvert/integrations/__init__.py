"""Converted checkpoints in other people's programs."""
