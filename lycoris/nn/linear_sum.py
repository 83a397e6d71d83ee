"""The sum that a linear layer with adapters is, prepared: plans and launches are kept for inputs of the same place.

y = x W^T + b + sum_i s_i (x D_i^T) U_i^T + sum_j s_j x dW_j^T          LoCons, and adapters with a delta
y_l = x W_l^T + b_l + sum_m w1[l, m] (x_m w2^T)                         LoKrs: block l of y, block m of x
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lycoris.buffers import scratch, stream_of
from lycoris.formats.keys import DOWN, MID, UP
from lycoris.nn.adapted import Adapter
from lycoris.ops.weight import delta
from lycoris.tensor import Tensor, autograd, from_array
from lycoris.tensor.kronecker import diagonal, together_of
from lycoris.tensor.launch import converted, refused, shaped
from lycoris.tensor.products import matrix_of
from lycoris.tensor.tensor import Layout, Storage, layout_of
from plans.block_mix import BlockMixArgs, BlockMixDescriptor, BlockMixPlan
from plans.core import BackendKind, DeviceBuffer, ElementKind, TensorMut, Workspace
from plans.core.device import driver_errors
from plans.core.plan import Launches, bound
from plans.matmul import Bias, LowRankTerm, Segment, SegmentedMatmulArgs, SegmentedMatmulDescriptor, SegmentedMatmulPlan

_UNIT = 8
_ALIGNMENT = 256
_MOST_CALLS = 64
"""Launches kept for one shape of the input: with a pool, outputs come back to the same few addresses."""


@dataclass(frozen=True)
class LowRank:
    """A LoCon's factors as products take them: down [r, in], up [out, r], r a multiple of eight; and its scale."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Blocks:
    """A LoKr: w1 [a, b] times its scale, and w2 of ``together`` blocks, block-diagonal [together * c, together * d]."""

    w1: Tensor
    w2: Tensor
    together: int


@dataclass(frozen=True)
class Ways:
    """How the active adapters take part in the sum."""

    low_rank: tuple[LowRank, ...]
    dense: tuple[tuple[Tensor, float], ...]
    blocks: tuple[Blocks, ...]


@dataclass(frozen=True)
class _Prepared:
    """Launches for matrices of one shape: ``make(x, out, scratch)``, and those made already, by the three's places."""

    scratch_bytes: int
    make: Callable[[Tensor, Tensor, DeviceBuffer | None], Launches]
    made: dict[tuple[int, int, int], Callable[[Any], None]]


class LinearSum:
    """The sums above for one state of a layer's adapters."""

    def __init__(self, weight: Tensor, bias: Tensor | None, ways: Ways) -> None:
        self.weight, self.bias, self.ways = weight, bias, ways
        self._prepared: dict[tuple[int, int], _Prepared] = {}
        self._as_it_lies: dict[Layout, tuple[_Prepared, Layout]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """The layer, [..., in] -> [..., out]."""
        found = None if x.address & 15 else self._as_it_lies.get(x.layout)
        if found is None:
            x, *found = self._placed(x)
        prepared, layout = found
        device = x.device
        stream = stream_of(device)
        out = Tensor(Storage(device.allocate(layout.nbytes, stream)), layout)
        work = scratch(device, prepared.scratch_bytes, stream) if prepared.scratch_bytes else None
        place = (x.address, out.address, 0 if work is None else work.address)
        launches = prepared.made.get(place)
        if launches is None:
            launches = self._bound(prepared, x, out, work)
        try:
            launches(stream)
        except driver_errors() as error:
            raise refused(device, error) from error
        return out

    def _placed(self, x: Tensor) -> tuple[Tensor, _Prepared, Layout]:
        """The input as the sum reads it, with contiguous, aligned rows; what is prepared; and the result's layout."""
        n, k = self.weight.shape
        rows = matrix_of(x, k)
        if rows.strides[1] != 1 or rows.strides[0] < k or not rows.aligned:
            rows = converted(rows, rows.kind)
        key = (rows.shape[0], rows.strides[0])
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepared[key] = (self._by_blocks if self.ways.blocks else self._as_one)(*key)
        layout = layout_of((*x.shape[:-1], n), x.kind)
        if rows.address == x.address:
            self._as_it_lies[x.layout] = prepared, layout
        return rows, prepared, layout

    def _bound(self, prepared: _Prepared, x: Tensor, out: Tensor, work: DeviceBuffer | None) -> Callable[[Any], None]:
        """Launches for these places; nothing of the tensors is kept but where they lie."""
        if len(prepared.made) >= _MOST_CALLS:
            prepared.made.clear()
        n, k = self.weight.shape
        rows = matrix_of(x, k)
        launches = bound(prepared.make(rows, shaped(out, (rows.shape[0], n)), work) if out.size else [])
        prepared.made[x.address, out.address, 0 if work is None else work.address] = launches
        return launches

    def _as_one(self, m: int, stride: int) -> _Prepared:
        """One product with low-rank terms and further segments."""
        (n, k), kind, ways = self.weight.shape, self.weight.kind, self.ways
        segment = Segment(k, a=kind, b=kind, a_stride=0 if stride == k else stride)
        terms = tuple(LowRankTerm(way.down.shape[0], 0, kind) for way in ways.low_rank)
        steps = () if self.bias is None else (Bias(self.bias.kind),)
        segments = (segment,) * (1 + len(ways.dense))
        descriptor = SegmentedMatmulDescriptor(m, n, segments, kind, None, steps, low_rank=terms)
        plan = SegmentedMatmulPlan.select(None, descriptor, device=self.weight.device)

        def make(x: Tensor, out: Tensor, work: DeviceBuffer | None) -> Launches:
            args = SegmentedMatmulArgs(
                out.mut(),
                [(x.ref(), self.weight.ref()), *((x.ref(), weight.ref()) for weight, _ in ways.dense)],
                [1.0, *(scale for _, scale in ways.dense)],
                [] if self.bias is None else [self.bias.ref()],
                [(way.down.ref(), way.up.ref()) for way in ways.low_rank],
                [way.scale for way in ways.low_rank],
            )
            plan.can_implement(args)
            return plan.launches(args, Workspace(work))

        return _Prepared(plan.workspace_size(), make, {})

    def _by_blocks(self, m: int, stride: int) -> _Prepared:
        """The columns of y in groups: each a product with its rows of W, plus w2 over its blocks of the mixed x."""
        (n, k), kind, blocks = self.weight.shape, self.weight.kind, self.ways.blocks
        columns, depth = blocks[0].w2.shape
        groups, device = n // columns, self.weight.device
        a_stride = 0 if stride == k else stride
        base = Segment(k, a=kind, b=kind, a_stride=a_stride, a_shared=True, b_batch_stride=columns * k)
        mixed_segment = Segment(
            depth, a=kind, b=kind, a_stride=groups * depth, a_batch_stride=depth, b_shared=True,
            diagonal=blocks[0].together, late=True,
        )  # fmt: skip
        steps = () if self.bias is None else (Bias(self.bias.kind, per_batch=True),)
        descriptor = SegmentedMatmulDescriptor(
            m, columns, (base, *(mixed_segment for _ in blocks)), kind, groups, steps,
            out_stride=n, out_batch_stride=columns,
        )  # fmt: skip
        plan = SegmentedMatmulPlan.select(None, descriptor, device=device)
        w1 = blocks[0].w1.shape
        early = plan.chosen.backend is BackendKind.WGMMA
        idle, cycles = plan.program.spare() if early else (0, 0.0)
        spare = (idle, cycles / len(blocks))
        mixing = BlockMixDescriptor(m, *w1, k // w1[1], kind, kind, kind, x_stride=a_stride, early=early, spare=spare)
        mix = BlockMixPlan.select(None, mixing, device=device)
        one = -(-m * groups * depth * kind.itemsize // _ALIGNMENT) * _ALIGNMENT
        own = plan.workspace_size()

        def make(x: Tensor, out: Tensor, work: DeviceBuffer | None) -> Launches:
            found: Launches = []
            pairs = [(x.ref(), _grouped(self.weight, (groups, columns, k), (columns * k, k, 1)).ref())]
            for number, way in enumerate(blocks):
                place = work.part(own + number * one, one)
                args = BlockMixArgs(place.tensor(kind, (m, groups * depth)), x.ref(), way.w1.ref())
                mix.can_implement(args)
                found += mix.launches(args, Workspace())
                mixed = TensorMut(
                    place.pointer(kind.storage), (groups, m, depth), (depth, groups * depth, 1), kind,
                    m * groups * depth, device.ordinal, place,
                )  # fmt: skip
                pairs.append((mixed, way.w2.ref()))
            operands = [] if self.bias is None else [shaped(self.bias, (groups, columns)).ref()]
            target = _grouped(out, (groups, m, columns), (columns, n, 1))
            args = SegmentedMatmulArgs(target.mut(), pairs, epilogue=operands)
            plan.can_implement(args)
            return found + plan.launches(args, Workspace(work.part(0, own) if own else None))

        return _Prepared(own + len(blocks) * one, make, {})


def _grouped(x: Tensor, shape: tuple[int, int, int], strides: tuple[int, int, int]) -> Tensor:
    return x.viewed(shape, strides)


def ways_of(found: list[Adapter], weight: Tensor) -> Ways:
    """How adapters take part in the sum of a layer with this weight."""
    kind = weight.kind
    if found and all(adapter.module.algorithm == "lokr" for adapter in found):
        blocks = [_blocks_of(adapter, kind) for adapter in found]
        if len({(way.w1.shape, way.w2.shape) for way in blocks}) == 1:
            return Ways((), (), tuple(blocks))
    low_rank = tuple(low_rank_of(adapter, kind) for adapter in found if is_plain_locon(adapter))
    return Ways(low_rank, tuple(dense_of(adapter, weight) for adapter in found if not is_plain_locon(adapter)), ())


def dense_of(adapter: Adapter, weight: Tensor) -> tuple[Tensor, float]:
    """An adapter's delta at scale 1 in the weight's kind, and its scale."""
    binding, factors, scale = adapter.module.weight_term(weight.shape)
    if adapter.module.algorithm == "ia3":
        made = from_array(adapter.module.merge_into(weight.array()).reshape(weight.shape))
        return (made - weight.detach()).to(weight.kind), adapter.strength
    made = delta(binding.source, factors, weight.shape, 1.0, weight.kind)
    return from_array(made.reshape(weight.shape)), scale * adapter.strength


def is_plain_locon(adapter: Adapter) -> bool:
    """Whether the adapter is a product of two matrices and a number."""
    return adapter.module.algorithm == "locon" and MID not in adapter.tensors and adapter.module.scalar is None


def locon_factors(factors: Mapping[str, Tensor], kind: ElementKind) -> tuple[Tensor, Tensor]:
    """Down [r, in] and up [out, r] in x's kind, with gradients."""
    down, up = [x if len(x.shape) == 2 else x.reshape(x.shape[0], -1) for x in (factors[DOWN], factors[UP])]
    return down if down.kind is kind else down.to(kind), up if up.kind is kind else up.to(kind)


def low_rank_of(adapter: Adapter, kind: ElementKind) -> LowRank:
    """The factors in the weight's kind, with ranks of zeros up to a multiple of eight."""
    _, _, scale = adapter.module.weight_term(adapter.module.shape)
    with autograd.no_grad():
        down, up = locon_factors(adapter.tensors, kind)
        missing = -down.shape[0] % _UNIT
        if missing:
            down, up = down.pad([(0, missing), (0, 0)]), up.pad([(0, 0), (0, missing)])
        return LowRank(down.contiguous(), up.contiguous(), scale * adapter.strength)


def _blocks_of(adapter: Adapter, kind: ElementKind) -> Blocks:
    """The scaled w1, and w2 repeated along a diagonal until it has columns enough for a tile."""
    _, _, scale = adapter.module.weight_term(adapter.module.shape)
    factors = {name: from_array(array) for name, array in adapter.module.factors.items()}
    with autograd.no_grad():
        w1, w2 = (_half(factors, i) for i in (1, 2))
        a, c = w1.shape[0], w2.shape[0]
        together = together_of(a, c, w2.device)
        w1 = (w1.to(ElementKind.F32) * (scale * adapter.strength)).to(kind)
        return Blocks(w1.contiguous(), diagonal(w2.to(kind).contiguous(), together), together)


def _half(factors: dict[str, Tensor], i: int) -> Tensor:
    if f"lokr_w{i}" in factors:
        return factors[f"lokr_w{i}"].reshape(factors[f"lokr_w{i}"].shape[0], -1)
    left, right = factors[f"lokr_w{i}_a"], factors[f"lokr_w{i}_b"]
    return left.to(ElementKind.F32) @ right.to(ElementKind.F32)
