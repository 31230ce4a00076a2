"""Triton kernels for NVIDIA GPUs. Imported only where there is one, or by tests in Triton's interpreter."""
