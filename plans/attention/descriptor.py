"""Scaled dot-product attention as a problem: descriptors of it and of its gradients, arguments, float64 references.

    out[i] = sum_j P[i, j] v[j]    P[i] = softmax_j(scale q[i] . k[j] + mask[i, j])    arXiv:1706.03762

over the last two axes of q [batch, heads, queries, width] and k, v [batch, key heads, keys, width].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plans.core.errors import InvalidProblem
from plans.core.operand import Operand
from plans.core.plan import Arguments
from plans.core.precision import ElementKind
from plans.core.sku import OpCategory
from plans.core.tensor import TensorMut, TensorRef

F32 = ElementKind.F32
FLOATS = (ElementKind.BF16, ElementKind.F16, F32)
MASKS = (*FLOATS, ElementKind.I32)
Strides = tuple[int, int, int] | None
"""Elements from a batch, a head, a token to the next; None where the tensor is contiguous."""


@dataclass(frozen=True)
class Mask:
    """A mask [batch, heads, queries, keys] by its kind and strides, which are 0 where it repeats.

    Of a floating kind it is added to the scores; of I32, key j takes part in row i where it is not 0.
    """

    element: ElementKind
    strides: tuple[int, int, int, int]


@dataclass(frozen=True)
class AttentionDescriptor:
    """out = softmax(scale q k^T + mask) v by heads, and the log-sum-exp of each query's scores.

    Attributes:
        batch: Independent problems.
        heads: Heads of q and of the result.
        queries: Tokens of q.
        keys: Tokens of k and v.
        width: Elements of a head's token.
        element: The kind of q, k, v and the result.
        key_heads: Heads of k and v, a divisor of ``heads``, each for as many of q's in a row; 0 for ``heads``.
        causal: Query i sees the keys up to i + ``diagonal`` only.
        diagonal: Keys that the first query sees beyond the first key; may be negative. 0 where not causal.
        mask: What is added to the scores, or hides some of them.
        out_strides, q_strides, k_strides, v_strides: Elements from a batch, head, token to the next.

    A query that sees no key has a result of zeros, a log-sum-exp of minus infinity, and gradients of zero.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    element: ElementKind = ElementKind.BF16
    key_heads: int = 0
    causal: bool = False
    diagonal: int = 0
    mask: Mask | None = None
    out_strides: Strides = None
    q_strides: Strides = None
    k_strides: Strides = None
    v_strides: Strides = None

    category = OpCategory.ATTENTION

    def __post_init__(self) -> None:
        extents = (self.batch, self.heads, self.queries, self.keys, self.width, self.key_heads)
        if min(extents) < 0:
            raise InvalidProblem(
                f"attention: batch, heads, queries, keys, width, key heads {extents}: wanted none negative; give the "
                "tensors' own extents"
            )
        if self.element not in FLOATS:
            raise InvalidProblem(f"attention: q, k and v of {self.element.value}, wanted bf16, f16 or f32; cast first")
        if self.key_heads and self.heads % self.key_heads:
            raise InvalidProblem(
                f"attention: {self.heads} heads over {self.key_heads} key heads, wanted a multiple; repeat k and v"
            )
        if self.diagonal and not self.causal:
            raise InvalidProblem(f"attention: diagonal {self.diagonal} without causal; say causal, or leave it 0")
        if self.mask is not None and self.mask.element not in MASKS:
            raise InvalidProblem(
                f"attention: a mask of {self.mask.element.value}, wanted bf16, f16, f32 to add or i32 to choose; cast"
            )

    @property
    def shared_heads(self) -> int:
        """Heads of k and v."""
        return self.key_heads or self.heads

    @property
    def group(self) -> int:
        """Heads of q for one of k's."""
        return self.heads // self.shared_heads if self.heads else 1

    @property
    def empty(self) -> bool:
        """Whether the result has no elements."""
        return not (self.batch and self.heads and self.queries and self.width)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of q and of the result."""
        return (self.batch, self.heads, self.queries, self.width)

    @property
    def key_shape(self) -> tuple[int, int, int, int]:
        """The shape of k and v."""
        return (self.batch, self.shared_heads, self.keys, self.width)

    def tensor(self, name: str, of_keys: bool, strides: Strides, writes: bool = False) -> Operand:
        """An operand like q, or like k and v."""
        layout = None if strides is None else (*strides, 1)
        return Operand(name, self.element, self.key_shape if of_keys else self.shape, writes=writes, layout=layout)

    def inputs(self) -> tuple[Operand, ...]:
        """``q``, ``k``, ``v``."""
        return (
            self.tensor("q", False, self.q_strides),
            self.tensor("k", True, self.k_strides),
            self.tensor("v", True, self.v_strides),
        )

    def mask_operands(self) -> tuple[Operand, ...]:
        """``mask`` where there is one."""
        if self.mask is None:
            return ()
        shape = (self.batch, self.heads, self.queries, self.keys)
        return (Operand("mask", self.mask.element, shape, layout=self.mask.strides),)

    def operands(self) -> tuple[Operand, ...]:
        """``out``, ``lse`` (fp32 [batch, heads, queries]), ``q``, ``k``, ``v``, ``mask`` where there is one."""
        return (
            self.tensor("out", False, self.out_strides, writes=True),
            Operand("lse", F32, self.shape[:3], writes=True),
            *self.inputs(),
            *self.mask_operands(),
        )

    def reference(self, arrays: Sequence[np.ndarray], scale: float | None = None) -> Exact:
        """What the operands that are read give, in float64."""
        return Exact(self, arrays, scale)


class Exact:
    """Attention in float64, and what the guarantees of results and gradients are relative to.

    Magnitudes are pairs [2, ...]: how much roundings of weights and sums count, and how much errors of scores do, which
    are relative to ``sizes``, what the terms of a score sum to without signs.
    """

    def __init__(self, descriptor: AttentionDescriptor, arrays: Sequence[np.ndarray], scale: float | None) -> None:
        self.descriptor = d = descriptor
        self.scale = default_scale(d.width) if scale is None else scale
        q, k, v = (np.asarray(array, np.float64) for array in arrays[:3])
        self.q, self.k, self.v = q, np.repeat(k, d.group, 1), np.repeat(v, d.group, 1)
        scores = self.scale * np.einsum("bhie,bhje->bhij", self.q, self.k)
        sizes = self.scale * np.einsum("bhie,bhje->bhij", np.abs(self.q), np.abs(self.k))
        hidden = np.zeros(scores.shape, bool)
        if d.causal:
            hidden |= np.arange(d.keys) > np.arange(d.queries)[:, None] + d.diagonal
        if d.mask is not None:
            mask = np.asarray(arrays[3], np.float64)
            if d.mask.element is ElementKind.I32:
                hidden |= mask == 0
            else:
                scores, sizes = scores + mask, sizes + np.where(np.isfinite(mask), np.abs(mask), 0)
        scores[hidden] = -np.inf
        sizes[np.isneginf(scores)] = 0
        with np.errstate(invalid="ignore", divide="ignore"):
            most = scores.max(-1, keepdims=True, initial=-np.inf)
            shift = np.where(np.isfinite(most), most, 0)
            powers = np.exp(scores - shift)
            total = powers.sum(-1, keepdims=True)
            self.weights = np.where(total > 0, powers / np.where(total > 0, total, 1), 0)
            self.lse = (np.log(total) + shift)[..., 0]
        # Of fp16, what lies below its normal numbers is rounded to 2^-25: as much as 2^-14 is relative to itself.
        self.floor = np.where(powers > 0, 2.0**-14 if d.element is ElementKind.F16 else 0.0, 0.0)
        # Errors of a row's scores reach all its weights through their sum.
        self.sizes = 1 + sizes + np.where(np.isfinite(self.lse), np.abs(self.lse), 0)[..., None]
        self.sizes = self.sizes + np.einsum("bhij,bhij->bhi", self.weights, sizes)[..., None]

    def out(self) -> tuple[np.ndarray, np.ndarray]:
        """The result and its magnitudes."""
        size = np.abs(self.v)
        return self.weights @ self.v, np.stack([(self.weights + self.floor) @ size, (self.weights * self.sizes) @ size])

    def log_sum_exp(self) -> tuple[np.ndarray, np.ndarray]:
        """The log-sum-exps and their magnitudes."""
        size = self.sizes.max(-1, initial=1)
        return self.lse, np.stack([np.ones_like(size), size])

    def gradients(self, d_out: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Those of q, k and v with their magnitudes."""
        d_out = np.asarray(d_out, np.float64)
        out, (out_size, out_spread) = self.out()
        back = np.einsum("bhie,bhje->bhij", d_out, self.v)
        delta = (d_out * out).sum(-1, keepdims=True)
        sizes = np.einsum("bhie,bhje->bhij", np.abs(d_out), np.abs(self.v))
        delta_size = (np.abs(d_out) * out_size).sum(-1, keepdims=True)
        delta_spread = (np.abs(d_out) * out_spread).sum(-1, keepdims=True)
        slope = self.weights * (back - delta)
        slope_sizes = np.stack(
            [
                self.weights * (sizes + delta_size) + self.floor,
                self.weights * (self.sizes * (sizes + delta_size) + delta_spread),
            ]
        )
        weight_sizes = np.stack([self.weights + self.floor, self.weights * self.sizes])
        d_q = self.scale * slope @ self.k, self.scale * slope_sizes @ np.abs(self.k)
        d_k = self.scale * _turned(slope) @ self.q, self.scale * _turned(slope_sizes) @ np.abs(self.q)
        d_v = _turned(self.weights) @ d_out, _turned(weight_sizes) @ np.abs(d_out)
        return [d_q, *((self._by_key_head(exact), self._by_key_head(size)) for exact, size in (d_k, d_v))]

    def _by_key_head(self, array: np.ndarray) -> np.ndarray:
        d = self.descriptor
        return array.reshape(*array.shape[:-4], d.batch, d.shared_heads, d.group, d.keys, d.width).sum(-3)


def _turned(array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, -1, -2)


def default_scale(width: int) -> float:
    """1 / sqrt(width)."""
    return 1 / math.sqrt(max(1, width))


@dataclass(frozen=True)
class AttentionBackwardDescriptor:
    """The gradients of q, of k and v, or of all three, for a gradient of the result.

    Attributes:
        forward: The attention, as it was computed.
        query: Whether d_q is wanted.
        key_value: Whether d_k and d_v are.
        d_out_strides, d_q_strides, d_k_strides, d_v_strides: Elements from a batch, head, token to the next.
        packed: d_q, d_k and d_v are one operand [3, batch, heads, tokens, width] with strides that are given here, as
            where one product made q, k and v. Wants as many keys as queries and key heads as heads.
    """

    forward: AttentionDescriptor
    query: bool = True
    key_value: bool = True
    d_out_strides: Strides = None
    d_q_strides: Strides = None
    d_k_strides: Strides = None
    d_v_strides: Strides = None
    packed: tuple[int, int, int, int] | None = None

    category = OpCategory.ATTENTION

    def __post_init__(self) -> None:
        f = self.forward
        if self.packed is not None and not (self.query and self.key_value and f.shape == f.key_shape):
            raise InvalidProblem(
                f"attention backward: packed gradients of q {f.shape} and k {f.key_shape}, wanted all three of one "
                "shape; ask for them one by one"
            )

    @property
    def padded(self) -> int:
        """Queries that the statistics have room for, in tiles' terms."""
        return -(-self.forward.queries // ROOM) * ROOM

    def results(self) -> tuple[Operand, ...]:
        """``d_qkv`` where packed, else those of ``d_q``, ``d_k``, ``d_v`` that are wanted."""
        f = self.forward
        if self.packed is not None:
            return (Operand("d_qkv", f.element, (3, *f.shape), writes=True, layout=(*self.packed, 1)),)
        d_q = (f.tensor("d_q", False, self.d_q_strides, True),) if self.query else ()
        if not self.key_value:
            return d_q
        return (*d_q, f.tensor("d_k", True, self.d_k_strides, True), f.tensor("d_v", True, self.d_v_strides, True))

    def operands(self) -> tuple[Operand, ...]:
        """The results, then ``d_out``, ``out``, ``lse``, ``q``, ``k``, ``v``, ``mask`` where there is one."""
        f = self.forward
        return (
            *self.results(),
            f.tensor("d_out", False, self.d_out_strides),
            f.tensor("out", False, f.out_strides),
            Operand("lse", F32, f.shape[:3]),
            *f.inputs(),
            *f.mask_operands(),
        )

    def reference(
        self, arrays: Sequence[np.ndarray], scale: float | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each result in float64 with its magnitudes; ``arrays`` are the operands that are read, in order."""
        d_out, _, _, *inputs = arrays
        d_q, d_k, d_v = self.forward.reference(inputs, scale).gradients(d_out)
        if self.packed is not None:
            return [(np.stack([d_q[0], d_k[0], d_v[0]]), np.stack([d_q[1], d_k[1], d_v[1]], 1))]
        return [*([d_q] if self.query else []), *([d_k, d_v] if self.key_value else [])]


ROOM = 128
"""Queries that tiles of every kernel divide."""


def checked_scale(width: int, scale: float | None) -> float:
    """The scale that a run takes. Raises InvalidProblem where it is not positive and finite."""
    scale = default_scale(width) if scale is None else float(scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise InvalidProblem(f"attention: scale {scale}, wanted a positive finite number; negate q for a negative one")
    return scale


class AttentionArgs(Arguments):
    """The tensors of one run, and the scale, 1 / sqrt(width) where none is given."""

    def __init__(
        self,
        out: TensorMut,
        lse: TensorMut,
        q: TensorRef,
        k: TensorRef,
        v: TensorRef,
        mask: TensorRef | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.out, self.lse, self.inputs, self.mask = out, lse, (q, k, v), mask
        self.scale = checked_scale(q.shape[-1], scale)

    def tensors(self) -> list[TensorRef]:
        """``out``, ``lse``, ``q``, ``k``, ``v``, and ``mask`` where there is one."""
        return [self.out, self.lse, *self.inputs, *([] if self.mask is None else [self.mask])]


class AttentionBackwardArgs(Arguments):
    """The results in order, d_out, out, lse, q, k, v, the mask where there is one, and the scale."""

    def __init__(self, results: Sequence[TensorMut], reads: Sequence[TensorRef], scale: float | None = None) -> None:
        super().__init__()
        self.results, self.reads = tuple(results), tuple(reads)
        self.scale = checked_scale(reads[3].shape[-1], scale)

    def tensors(self) -> list[TensorRef]:
        """All of them."""
        return [*self.results, *self.reads]
