"""8-bit quantisation of activations, which several kernels use."""
