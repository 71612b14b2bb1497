"""Weight-only INT matmul on ``triton-wna16``."""
