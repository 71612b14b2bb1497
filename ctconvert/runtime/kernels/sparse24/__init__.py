"""2:4 sparse matmul on ``cutlass-sparse24``."""
