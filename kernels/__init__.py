"""Device code: Numba kernels over flat buffers.

Knows integers, floats and addresses; imports nothing of ours above it.
"""
