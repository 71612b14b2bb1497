"""Bytes: where checkpoints are read from and written to."""
