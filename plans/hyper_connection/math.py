"""The mathematics of hyper-connections in float64, with magnitudes: what references of several plans are made of.

A magnitude is the error, to first order, that one unit in every sum makes; a quantity and its magnitude come as a pair.
Weights are lines [B or 1, n (n + 2)] in the order s_pre, s_post, M.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from plans.hyper_connection.common import sigmoid, weight_line, weight_parts
from plans.sinkhorn import SinkhornMode, sinkhorn_backward_reference, sinkhorn_reference

TINY = 2.0**-100

Pair = tuple[np.ndarray, np.ndarray]
"""A quantity in float64 and its magnitude."""


class Projection(NamedTuple):
    """How Sinkhorn makes M, and by how many units its results are wrong where all else is wrong by one."""

    iterations: int
    eps: float
    mode: SinkhornMode
    forward_ratio: float = 0.0
    backward_ratio: float = 0.0

    @property
    def settings(self) -> tuple[int, float, SinkhornMode]:
        """What the references of Sinkhorn take."""
        return (self.iterations, self.eps, self.mode)

    @property
    def spread(self) -> int:
        """How often M's relative error can exceed that of exp(logits): each of 2T steps hands on twice what it got."""
        return 4 * self.iterations + 1


def projected_of(x: np.ndarray, rows: np.ndarray, eps: float) -> Pair:
    """P = x rows^T and r = sqrt(mean(x**2) + eps), [B, n (n + 2) + 1], for x [B, n, C]."""
    flat = x.reshape(len(x), -1)
    root = np.sqrt((flat * flat).mean(-1, keepdims=True) + eps)
    exact = np.concatenate([flat @ rows.T, root], -1)
    return exact, np.concatenate([np.abs(flat) @ np.abs(rows).T, root], -1) + TINY


def logits_of(projected: np.ndarray, alpha: np.ndarray, bias: np.ndarray, n: int) -> Pair:
    """Alpha P / r + bias, [B, n (n + 2)]: alpha[0] for s_pre, alpha[1] for s_post, alpha[2] for M."""
    scaled = alpha[groups(n)] * projected[:, :-1] / projected[:, -1:]
    return scaled + bias, np.abs(scaled) + np.abs(scaled + bias)


def groups(n: int) -> np.ndarray:
    """The group of every weight of a line: 0 for s_pre, 1 for s_post, 2 for M."""
    return np.repeat([0, 1, 2], [n, n, n * n])


def weights_of(logits: Pair, n: int, projection: Projection) -> Pair:
    """The lines of mixing weights for lines of logits; a logit's error is a sigmoid's relative one, and counts in M
    as often as ``projection.spread`` says.
    """
    (pre, post, mixing), (of_pre, of_post, of_mixing) = (weight_parts(part, n) for part in logits)
    s_pre = sigmoid(pre) + (projection.eps if projection.mode is SinkhornMode.SOFTMAX else 0.0)
    s_post, m = 2 * sigmoid(post), sinkhorn_reference(mixing, *projection.settings)
    of_m = m * (1 + projection.forward_ratio + projection.spread * of_mixing.max((-1, -2), keepdims=True))
    exact = weight_line(s_pre, s_post, m)
    return exact, weight_line(s_pre * (1 + of_pre), s_post * (1 + of_post), of_m) + TINY


def logit_gradients(logits: Pair, d_weights: Pair, n: int, projection: Projection) -> Pair:
    """The gradients of lines of logits for those of their mixing weights."""
    (pre, post, mixing), (_, _, of_mixing) = (weight_parts(part, n) for part in logits)
    (d_pre, d_post, d_m), of_d = (weight_parts(part, n) for part in d_weights)
    s, t = sigmoid(pre), sigmoid(post)
    d_h, size = sinkhorn_backward_reference(mixing, d_m, *projection.settings)
    handed_on = sinkhorn_backward_reference(mixing, of_d[2], *projection.settings)[1]
    of_logits = projection.spread * of_mixing.max((-1, -2), keepdims=True)
    # 1 - s is a difference from 1, so its error does not shrink with it; a logit's error is s's relative one.
    return (
        weight_line(d_pre * s * (1 - s), d_post * 2 * t * (1 - t), d_h),
        weight_line(
            (of_d[0] + np.abs(d_pre) * (1 + weight_parts(logits[1], n)[0])) * s,
            (of_d[1] + np.abs(d_post) * (1 + weight_parts(logits[1], n)[1])) * 2 * t,
            2 * handed_on + (1 + projection.backward_ratio + of_logits) * size,
        )
        + TINY,
    )


def aggregate_of(x: np.ndarray, weights: np.ndarray, gamma: np.ndarray | None, eps: float) -> Pair:
    """A = sum_i s_pre[i] x[i], [B, C], and with a gamma y = gamma a / sqrt(mean(a**2) + eps).

    With A = sum_i s_pre[i] |x[i]| and r the root, the magnitude of a / r is (A + |a| rms(A) / r) / r: what cancels in
    a is not lost from it, and r is wrong by no more than rms(A) / r says.
    """
    pre = weight_parts(weights, x.shape[1])[0][..., None]
    a, terms = (pre * x).sum(1), np.abs(pre * x).sum(1)
    if gamma is None:
        return a, terms + TINY
    root = np.sqrt((a * a).mean(-1, keepdims=True) + eps)
    spread = np.sqrt((terms * terms).mean(-1, keepdims=True)) / root
    return gamma * a / root, np.abs(gamma) * (terms + np.abs(a) * spread) / root + TINY


def mixed_of(x: np.ndarray, weights: np.ndarray, y: Pair) -> Pair:
    """M x + s_post y, [B, n, C]."""
    _, post, mixing = weight_parts(weights, x.shape[1])
    exact = mixing @ x + post[..., None] * y[0][:, None]
    return exact, np.abs(mixing) @ np.abs(x) + np.abs(post)[..., None] * y[1][:, None] + TINY


class SampleGradients(NamedTuple):
    """Gradients before they are summed over samples: d_y [B, C] and a / r [B, C] make gamma's, da [B, C] is that of a.

    ``weights`` are lines [B, n (n + 2)], ``carried`` [B, n, C] is x's gradient but for what comes through a.
    """

    d_y: Pair
    u: Pair
    d_a: Pair
    weights: Pair
    carried: Pair


def full_gradients(
    d: np.ndarray, x: np.ndarray, weights: np.ndarray, gamma: np.ndarray, eps: float, of_mixing: float = 0.0
) -> SampleGradients:
    """The gradients of out = M x + s_post y for that of out, d [B, n, C]; M itself is wrong by ``of_mixing`` units."""
    n = x.shape[1]
    _, post, mixing = weight_parts(np.broadcast_to(weights, (len(x), weights.shape[-1])), n)
    d_y = tuple(np.einsum("bi,bic->bc", *pair) for pair in ((post, d), (np.abs(post), np.abs(d))))
    u, d_a = aggregate_gradients(d_y, x, weights, gamma, eps)
    d_pre = weight_shares(d_a, x)
    y = tuple(np.abs(gamma) * part for part in u)
    d_post = np.einsum("bic,bc->bi", d, gamma * u[0]), np.einsum("bic,bc->bi", np.abs(d), y[1])
    d_mixing = tuple(np.einsum("bic,bjc->bij", *pair) for pair in ((d, x), (np.abs(d), np.abs(x))))
    of_weights = tuple(weight_line(*parts) for parts in zip(d_pre, d_post, d_mixing, strict=True))
    carried = (
        np.einsum("bij,bic->bjc", mixing, d),
        (1 + of_mixing) * np.einsum("bij,bic->bjc", np.abs(mixing), np.abs(d)),
    )
    return SampleGradients(d_y, u, d_a, of_weights, carried)


def weight_shares(d_a: Pair, x: np.ndarray) -> Pair:
    """The gradient of s_pre, [B, n]: sum_c da x_i."""
    return np.einsum("bc,bic->bi", d_a[0], x), np.einsum("bc,bic->bi", d_a[1], np.abs(x))


def aggregate_gradients(
    d_y: Pair, x: np.ndarray, weights: np.ndarray, gamma: np.ndarray | None, eps: float
) -> tuple[Pair, Pair]:
    """U = a / r and the gradient of a, (gamma dy - u mean(gamma dy u)) / r; without a gamma a itself and dy.

    r's relative error is at most rms(sum_i p_i |x_i|) / r, by Cauchy and Schwarz.
    """
    pre = weight_parts(weights, x.shape[1])[0][..., None]
    a, terms = (pre * x).sum(1), np.abs(pre * x).sum(1)
    if gamma is None:
        return (a, terms), d_y
    dy, of_dy = d_y
    root = np.sqrt((a * a).mean(-1, keepdims=True) + eps)
    u = a / root
    pull = (gamma * dy * u).mean(-1, keepdims=True)
    d_a = (gamma * dy - u * pull) / root

    of_root = np.sqrt((terms * terms).mean(-1, keepdims=True)) / root
    size, dy, pull = np.abs(gamma), np.abs(dy), np.abs(pull)
    of_u = (terms / root) + np.abs(u) * of_root
    of_pull = (size * (of_dy * np.abs(u) + dy * of_u)).mean(-1, keepdims=True) + pull * of_root
    of_d_a = (size * (of_dy + dy * of_root) + of_u * pull + np.abs(u) * of_pull) / root
    return (u, of_u), (d_a, of_d_a)


def gamma_gradient(found: SampleGradients | tuple[Pair, Pair]) -> Pair:
    """sum_b dy a / r, [C], of a sample's gradients or of (d_y, u)."""
    (dy, of_dy), (u, of_u) = (found.d_y, found.u) if isinstance(found, SampleGradients) else found
    return (dy * u).sum(0), (of_dy * np.abs(u) + np.abs(dy) * of_u).sum(0) + TINY


def x_gradient(carried: Pair, d_a: Pair, weights: np.ndarray) -> Pair:
    """carried_j + s_pre[j] da, [B, n, C]."""
    pre = weight_parts(weights, carried[0].shape[1])[0][..., None]
    exact, magnitude = (c + p * a[:, None] for c, a, p in zip(carried, d_a, _signed(pre), strict=True))
    return exact, magnitude + TINY


class DynamicGradients(NamedTuple):
    """Gradients of a dynamic H's parameters, and what comes to x [B, n, C] through its projection."""

    projection: Pair
    alpha: Pair
    bias: Pair
    through: Pair


def dynamic_gradients(
    d_logits: Pair, x: np.ndarray, rows: np.ndarray, projected: np.ndarray, alpha: np.ndarray
) -> DynamicGradients:
    """With P and r as ``projected``, dP = d_logits alpha / r and d_r = -sum(d_logits alpha P) / r**2."""
    n, root, flat = x.shape[1], projected[:, -1:], x.reshape(len(x), -1)
    ratio, per_group = projected[:, :-1] / root, np.eye(3)[groups(n)]
    lifts = tuple(part * factor / root for part, factor in zip(d_logits, _signed(alpha[groups(n)]), strict=True))
    pulls = tuple(
        (lift * factor).sum(-1, keepdims=True) / (root * flat.shape[1])
        for lift, factor in zip(lifts, _signed(ratio), strict=True)
    )
    through = lifts[0] @ rows - pulls[0] * flat, lifts[1] @ np.abs(rows) + pulls[1] * np.abs(flat)
    return DynamicGradients(
        projection=tuple(lift.T @ part for lift, part in zip(lifts, _signed(flat), strict=True)),
        alpha=tuple((d * part).sum(0) @ per_group for d, part in zip(d_logits, _signed(ratio), strict=True)),
        bias=tuple(d.sum(0) for d in d_logits),
        through=tuple(part.reshape(x.shape) for part in through),
    )


def _signed(values: np.ndarray) -> Pair:
    return values, np.abs(values)
