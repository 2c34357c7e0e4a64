"""Triton kernels for CUDA devices; imported only where triton is installed."""
