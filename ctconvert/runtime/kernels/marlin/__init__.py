"""Matmul on Marlin tiles: Marlin's own layouts and Humming's."""
