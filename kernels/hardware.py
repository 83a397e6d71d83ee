"""Numbers of the hardware that kernels and the simulator share."""

from __future__ import annotations

WARP, WARPGROUP = 32, 128
"""Threads of a warp; of the four warps that ask for a product of Hopper's together."""
