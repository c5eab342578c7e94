"""Triton kernels, one file an op. None yet: the ``triton`` backend says so when asked for."""
