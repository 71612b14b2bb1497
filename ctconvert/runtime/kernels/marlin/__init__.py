"""Matmul on Marlin tiles: ``marlin`` and ``marlin-mxfp4``."""
