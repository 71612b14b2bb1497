"""Layouts of kernels that are not here, run in plain torch."""
