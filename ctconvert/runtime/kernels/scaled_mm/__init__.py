"""8-bit matmul on ``scaled-mm``."""
