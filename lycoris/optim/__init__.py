"""Optimisers, schedules of learning rates, and what is done to gradients before a step."""

from lycoris.optim.gradients import (
    GradientStatistics,
    add_noise,
    clip_adaptive,
    clip_by_norm,
    clip_by_value,
    normalize,
    skip_if_not_finite,
    statistics,
)
from lycoris.optim.optimizers import OPTIMIZERS, SGD, Adam, AdamW, Optimizer, Options, load_state, save_state
from lycoris.optim.schedules import SCHEDULES, constant, cosine, linear, warmup

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "SGD",
    "Adam",
    "AdamW",
    "GradientStatistics",
    "Optimizer",
    "Options",
    "add_noise",
    "clip_adaptive",
    "clip_by_norm",
    "clip_by_value",
    "constant",
    "cosine",
    "linear",
    "load_state",
    "normalize",
    "save_state",
    "skip_if_not_finite",
    "statistics",
    "warmup",
]
