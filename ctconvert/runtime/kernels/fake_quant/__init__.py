"""INT8 fake quantisation, which several kernels use."""
