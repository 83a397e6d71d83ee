"""A linear layer with live adapters: the base and its adapters in one sum, rounded once.

    layer = AdaptedLinear(weight, bias)
    layer.add("style", module, strength=0.8)
    y = layer(x)

LoCon's small product comes first, and its second one is further terms of the base's own sum; LoKr mixes the blocks of x
by w1 and adds w2 to the sum of every block of the output; everything else is a second weight beside the first. Any
number of adapters takes part. With "merged" there is one product with the kept merged weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lycoris import tensor
from lycoris.algorithms.terms import linear_term
from lycoris.buffers import DeviceArray
from lycoris.errors import RefusedInput
from lycoris.formats.keys import DOWN, MID, UP
from lycoris.nn.adapted import Adapted, Adapter
from lycoris.nn.routing import Routes, choice_tensor, routed
from lycoris.ops.kronecker import make_kronecker
from lycoris.ops.weight import delta
from lycoris.tensor import Tensor, autograd, from_array
from lycoris.tensor.launch import converted, empty, run, shaped
from lycoris.tensor.mixing import mix_blocks
from lycoris.tensor.products import check_linear, low_rank_linear, matrix_of
from plans.core import ElementKind
from plans.matmul import Bias, LowRankTerm, Segment, SegmentedMatmulArgs, SegmentedMatmulDescriptor, SegmentedMatmulPlan

_UNIT = 8
_BLOCK_COLUMNS = 128
"""Columns of the output that LoKr's blocks are put together to, by a block-diagonal w2, where they are narrower."""


@dataclass(frozen=True)
class _LowRank:
    """A LoCon's factors as products take them: down [r, in], up [out, r], r a multiple of eight; and its scale."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class _Blocks:
    """A LoKr: w1 [a, b] times its scale, and w2 of ``together`` blocks, block-diagonal [together * c, together * d]."""

    w1: Tensor
    w2: Tensor
    together: int


@dataclass(frozen=True)
class _Ways:
    """How the active adapters take part in the sum."""

    low_rank: tuple[_LowRank, ...]
    dense: tuple[tuple[Tensor, float], ...]
    blocks: tuple[_Blocks, ...]


class AdaptedLinear(Adapted):
    """y = x W^T + b + sum_i s_i x dW_i^T: x [..., in], W [out, in] -> [..., out]; see `lycoris.nn.adapted` for modes.

    Gradients reach x and every adapter's factors; the base is frozen. Raises RefusedInput where x does not fit.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, mode: str | None = None) -> None:
        super().__init__(weight, bias, mode=mode)
        if weight.ndim != 2:
            raise RefusedInput(f"AdaptedLinear: weight {weight.shape}, wanted [out, in]; use AdaptedConv2d")

    def __call__(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.forward(x)

    def route(self, x: Tensor, choice: Sequence[str | None] | Tensor) -> Tensor:
        """Each row with the adapter that ``choice`` names for it, None for none: x [rows, in] -> [rows, out].

        ``choice`` may be a tensor of int32: the adapters' numbers in the order of `adapters`, their count for none.
        An adapter that is switched off adds nothing. Raises RefusedInput for an unknown name, another count than x has
        rows, a DoRA, a difference of the bias, and while the adapters are merged.
        """
        self._refuse_merged("route")
        check_linear("route", x, self.weight, self.bias)
        if x.ndim != 2 or x.kind is not self.weight.kind:
            raise RefusedInput(f"route: x {x.shape} of {x.kind.value}, wanted [rows, in] of {self.weight.kind.value}")
        with autograd.no_grad():
            numbers = choice_tensor(choice, list(self._adapters), x.shape[0], x)
            x = x if x.is_contiguous and x.aligned else converted(x, x.kind)
            if not any(adapter.active for adapter in self._adapters.values()):
                return tensor.linear(x, self.weight, self.bias)
            return routed(x, self.weight, self.bias, self._kept("routes", self._make_routes), numbers)

    def _make_routes(self) -> Routes:
        low_rank, dense = {}, {}
        for number, (name, adapter) in enumerate(self._adapters.items()):
            if adapter.module.dora_scale is not None or adapter.module.bias is not None:
                raise RefusedInput(f"route: adapter {name!r} changes more than the weight's product; remove it")
            if not adapter.active:
                continue
            if _plain_locon(adapter):
                way = _low_rank_of(adapter, self.weight.kind)
                low_rank[number] = (way.down, way.up, way.scale)
            else:
                dense[number] = self._dense(adapter)
        return Routes.of(low_rank, dense, len(self._adapters))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if x.kind is not self.weight.kind or x.device is not self.weight.device:
            raise RefusedInput(
                f"AdaptedLinear: x of {x.kind.value} on {x.device.name}, wanted {self.weight.kind.value} on "
                f"{self.weight.device.name}; call to({self.weight.kind.value}), or bring it there"
            )
        shape = check_linear("AdaptedLinear", x, self.weight, self.bias)
        found = self.active()
        mode = self.mode or ("separate" if self.training else "merged")
        if found and found[0].module.dora_scale is not None:
            return self._dora(x, found[0]) if self._recorded(x, found) else self._merged(x)
        if self._recorded(x, found):
            return self._differentiable(x, found)
        if mode == "merged" or not found:
            return self._merged(x)
        rows = matrix_of(x, self.weight.shape[1])
        if rows.strides[1] != 1 or rows.strides[0] < rows.shape[1] or not rows.aligned:
            rows = converted(rows, rows.kind)
        return shaped(self._separate(rows), shape)

    def _recorded(self, x: Tensor, found: list[Adapter]) -> bool:
        return autograd.wanted((x, *(factor for adapter in found for factor in adapter.tensors.values())))

    def _merged(self, x: Tensor) -> Tensor:
        return tensor.linear(x, self.merged_weight(), self.merged_bias())

    def _differentiable(self, x: Tensor, found: list[Adapter]) -> Tensor:
        """The base frozen, each adapter's term beside it; one LoCon takes part in the base's own sum."""
        base, bias = self.weight.detach(), self.merged_bias()
        bias = None if bias is None else bias.detach()
        if len(found) == 1 and _plain_locon(found[0]) and not found[0].dropout:
            down, up = _locon_factors(found[0], x.kind, self.training)
            return low_rank_linear(x, base, down, up, found[0].scale, bias)
        y = tensor.linear(x, base, bias)
        for adapter in found:
            if self.drops(adapter):
                continue
            term = self._term(x, adapter)
            y = y + (tensor.dropout(term, adapter.dropout) if self.training and adapter.dropout else term)
        return y

    def _term(self, x: Tensor, adapter: Adapter) -> Tensor:
        module, factors = adapter.module, adapter.tensors
        scale = adapter.scale if module.scalar is None else factors["scalar"] * adapter.scale
        if self.training and adapter.rank_dropout and _plain_locon(adapter):
            down, up = _locon_factors(adapter, x.kind, True)
            return tensor.linear(tensor.linear(x, down) * scale, up)
        if module.algorithm == "ia3":
            return tensor.linear(
                x, (self.weight.detach() * _ia3(factors["weight"], module.on_input) * scale).to(x.kind)
            )
        return linear_term(module.algorithm, factors, x, self.weight.shape, scale).to(x.kind)

    def _dora(self, x: Tensor, adapter: Adapter) -> Tensor:
        return tensor.linear(x, self.decomposed(adapter).to(x.kind), self.merged_bias())

    def _separate(self, x: Tensor) -> Tensor:
        """The layer on a matrix, [m, in] -> [m, out], by one sum."""
        ways: _Ways = self._kept("ways", self._make_ways)
        bias = self.merged_bias()
        if ways.blocks:
            return self._by_blocks(x, ways.blocks, bias)
        m, (n, k) = x.shape[0], self.weight.shape
        stride = 0 if x.is_contiguous else x.strides[0]
        segment = Segment(k, a=x.kind, b=x.kind, a_stride=stride)
        terms = tuple(LowRankTerm(way.down.shape[0], 0, x.kind) for way in ways.low_rank)
        steps = () if bias is None else (Bias(bias.kind),)
        segments = (segment,) * (1 + len(ways.dense))
        descriptor = SegmentedMatmulDescriptor(m, n, segments, x.kind, None, steps, low_rank=terms)
        out = empty((m, n), x.kind, x.device)
        args = SegmentedMatmulArgs(
            out.mut(),
            [(x.ref(), self.weight.ref()), *((x.ref(), weight.ref()) for weight, _ in ways.dense)],
            [1.0, *(scale for _, scale in ways.dense)],
            [] if bias is None else [bias.ref()],
            [(way.down.ref(), way.up.ref()) for way in ways.low_rank],
            [way.scale for way in ways.low_rank],
        )
        run(SegmentedMatmulPlan.select(None, descriptor, device=x.device), args)
        return out

    def _by_blocks(self, x: Tensor, blocks: tuple[_Blocks, ...], bias: Tensor | None) -> Tensor:
        """The columns of y in groups: each a product with its rows of W, plus w2 over its blocks of the mixed x."""
        m, (n, k) = x.shape[0], self.weight.shape
        columns, depth = blocks[0].w2.shape
        groups, kind = n // columns, x.kind
        x = x if x.is_contiguous else converted(x, x.kind)
        base = Segment(k, a=kind, b=kind, a_shared=True, b_batch_stride=columns * k)
        others = [
            Segment(depth, a=kind, b=kind, a_stride=groups * depth, a_batch_stride=depth, b_shared=True) for _ in blocks
        ]
        steps = () if bias is None else (Bias(bias.kind, per_batch=True),)
        descriptor = SegmentedMatmulDescriptor(
            m, columns, (base, *others), kind, groups, steps, out_stride=n, out_batch_stride=columns
        )
        out = empty((m, n), kind, x.device)
        weights = _grouped(self.weight, (groups, columns, k), (columns * k, k, 1))
        pairs = [(x.ref(), weights.ref())]
        for way in blocks:
            mixed = mix_blocks(x, way.w1)
            pairs.append((_grouped(mixed, (groups, m, depth), (depth, groups * depth, 1)).ref(), way.w2.ref()))
        target = _grouped(out, (groups, m, columns), (columns, n, 1))
        operands = [] if bias is None else [shaped(bias, (groups, columns)).ref()]
        run(
            SegmentedMatmulPlan.select(None, descriptor, device=x.device),
            SegmentedMatmulArgs(target.mut(), pairs, epilogue=operands),
        )
        return out

    def _make_ways(self) -> _Ways:
        found, kind = self.active(), self.weight.kind
        if len(found) and all(adapter.module.algorithm == "lokr" for adapter in found):
            blocks = [_blocks_of(adapter, kind) for adapter in found]
            if len({(way.w2.shape, way.together) for way in blocks}) == 1:
                return _Ways((), (), tuple(blocks))
        low_rank = tuple(_low_rank_of(adapter, kind) for adapter in found if _plain_locon(adapter))
        dense = tuple(self._dense(adapter) for adapter in found if not _plain_locon(adapter))
        return _Ways(low_rank, dense, ())

    def _dense(self, adapter: Adapter) -> tuple[Tensor, float]:
        """The delta at scale 1 in the weight's kind, and its scale."""
        binding, factors, scale = adapter.module.weight_term(self.weight.shape)
        if adapter.module.algorithm == "ia3":
            made = adapter.module.merge_into(self.weight.array()).reshape(self.weight.shape)
            return (from_array(made) - self.weight.detach()).to(self.weight.kind), adapter.strength
        made = delta(binding.source, factors, self.weight.shape, 1.0, self.weight.kind)
        return from_array(made.reshape(self.weight.shape)), scale * adapter.strength


def _grouped(x: Tensor, shape: tuple[int, int, int], strides: tuple[int, int, int]) -> Tensor:
    return Tensor(x.storage, shape, x.kind, strides, x.offset)


def _plain_locon(adapter: Adapter) -> bool:
    return adapter.module.algorithm == "locon" and MID not in adapter.tensors and adapter.module.scalar is None


def _locon_factors(adapter: Adapter, kind: ElementKind, training: bool) -> tuple[Tensor, Tensor]:
    """Down [r, in] and up [out, r] in x's kind, with gradients; ranks drop out while training."""
    down, up = (adapter.tensors[name].reshape(adapter.tensors[name].shape[0], -1) for name in (DOWN, UP))
    if training and adapter.rank_dropout:
        kept = tensor.rand((down.shape[0], 1), device=down.device) >= adapter.rank_dropout
        down = down * kept
    return down.to(kind), up.to(kind)


def _ia3(vector: Tensor, on_input: bool) -> Tensor:
    return vector.reshape(1, -1) if on_input else vector.reshape(-1, 1)


def _low_rank_of(adapter: Adapter, kind: ElementKind) -> _LowRank:
    """The factors in the weight's kind, with ranks of zeros up to a multiple of eight."""
    _, _, scale = adapter.module.weight_term(adapter.module.shape)
    with autograd.no_grad():
        down, up = _locon_factors(adapter, kind, False)
        missing = -down.shape[0] % _UNIT
        if missing:
            down, up = down.pad([(0, missing), (0, 0)]), up.pad([(0, 0), (0, missing)])
        return _LowRank(down.contiguous(), up.contiguous(), scale * adapter.strength)


def _blocks_of(adapter: Adapter, kind: ElementKind) -> _Blocks:
    """The scaled w1, and w2 repeated along a diagonal until it has columns enough for a tile."""
    _, _, scale = adapter.module.weight_term(adapter.module.shape)
    factors = {name: from_array(array) for name, array in adapter.module.factors.items()}
    with autograd.no_grad():
        w1, w2 = (_half(factors, i) for i in (1, 2))
        a, c = w1.shape[0], w2.shape[0]
        together = next(g for g in range(1, a + 1) if a % g == 0 and (g * c >= _BLOCK_COLUMNS or g == a))
        w1 = (w1.to(ElementKind.F32) * (scale * adapter.strength)).to(kind)
        return _Blocks(w1.contiguous(), _diagonal(w2.to(kind).contiguous(), together), together)


def _half(factors: dict[str, Tensor], i: int) -> Tensor:
    if f"lokr_w{i}" in factors:
        return factors[f"lokr_w{i}"].reshape(factors[f"lokr_w{i}"].shape[0], -1)
    left, right = factors[f"lokr_w{i}_a"], factors[f"lokr_w{i}_b"]
    return (left.to(ElementKind.F32) @ right.to(ElementKind.F32)).to(ElementKind.F32)


def _diagonal(block: Tensor, count: int) -> Tensor:
    """The matrix I kron block."""
    if count == 1:
        return block
    identity = DeviceArray.from_numpy(np.eye(count, dtype=np.float32), device=block.device)
    return from_array(make_kronecker(identity, block.array(), 1.0, block.kind))
