"""Int4 matmuls on ``xpu-w4a8`` and ``xpu-w4a16``."""
