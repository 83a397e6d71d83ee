"""LoRA and LoCon: low-rank products, arXiv:2106.09685; with a Tucker core for convolutions, arXiv:2309.14859."""

from __future__ import annotations

import math

import numpy as np

from lycoris.algorithms.initialise import Initialiser
from lycoris.algorithms.ranked import ModuleOptions, RankedModule
from lycoris.formats.keys import DOWN, MID, UP
from lycoris.formats.shapes import Shape


class LoConModule(RankedModule):
    """delta = up @ down; Tucker: sum_ij mid[i, j, ...] up[o, i] down[j, q].

    lora_up [O, r], lora_down [r, I, *kernel]; Tucker: lora_down [r, I, 1...], lora_mid [r, r, *kernel]. With filter
    axes, up has as many of extent 1. up starts at zero, the others as torch.nn.Linear does.
    """

    algorithm = "locon"
    scalar_factors = (UP,)

    @classmethod
    def initial_factors(
        cls, shape: Shape, rank: int, options: ModuleOptions, fill: Initialiser
    ) -> dict[str, np.ndarray]:
        """Up, down and, in the Tucker form, mid."""
        out, channels, *kernel = shape
        ones = [1] * len(kernel)
        tucker = options.use_tucker and math.prod(kernel) != 1
        up = fill.kaiming if options.use_scalar else fill.zeros
        factors = {
            UP: up((out, rank, *ones)),
            DOWN: fill.kaiming((rank, channels, *(ones if tucker else kernel))),
        }
        return {**factors, MID: fill.kaiming((rank, rank, *kernel))} if tucker else factors
