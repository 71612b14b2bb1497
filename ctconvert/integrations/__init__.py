"""Converted checkpoints in other people's engines."""
