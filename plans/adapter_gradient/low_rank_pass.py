"""What a LoCon's gradients need of g, from one pass over it on the multiprocessors that a product leaves idle.

    u = scale g U [rows, rank]        parts whose sum is g^T t [out, rank]

The product that makes x's gradient takes u late, and `LowRankGradientPlan` the parts, beside the gradient of D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernels.adapter_gradient.low_rank_pass import BOXES, MOST_RANKS, MOST_ROWS, SPAN, UNIT, PassTile, low_rank_pass
from kernels.wgmma import DEPTH
from plans.core.device import Device
from plans.core.errors import InvalidProblem
from plans.core.operand import Operand
from plans.core.plan import Arguments, Launches, Plan, Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind, OpCategory
from plans.core.tensor import TensorMut, TensorRef
from plans.core.tensor_map import Box, map_address
from plans.core.workspace import Workspace
from plans.matmul.program import MatmulProgram

_KINDS = (ElementKind.BF16, ElementKind.F16)
_LARGEST = 1 << 31
_RANK_UNIT, _MOST_PARTS = 8, 32
_PAIR = 2

_LEAST_ELEMENTS = 1 << 22
"""Elements of g that are worth tensor maps, which name addresses and so cost the host."""

# In cycles as a product's count has them (`plans.matmul.streamed`): what a multiprocessor reads beside a product, what
# each of all reads, and a launch's beginning and end.
_BYTES_A_CYCLE, _BYTES_A_CYCLE_OF_ALL, _FIXED_CYCLES = 44.0, 21.0, 3000.0


@dataclass(frozen=True)
class LowRankPassDescriptor:
    """u = scale g U and parts of g^T t.

    Attributes:
        rows: Rows of g, t and u.
        out_features: Columns of g, rows of U.
        rank: Columns of t, U and u.
        blocks: Multiprocessors to be used, which the launch after leaves.
        element: The kind of g, t, U and u.
        g_stride: Elements from a row of g to the next; 0 where it is contiguous.
    """

    rows: int
    out_features: int
    rank: int
    blocks: int
    element: ElementKind = ElementKind.BF16
    g_stride: int = 0

    category = OpCategory.MATMUL

    def __post_init__(self) -> None:
        if min(self.rows, self.out_features, self.rank, self.blocks) < 1:
            found = (self.rows, self.out_features, self.rank, self.blocks)
            raise InvalidProblem(f"low-rank pass: rows, out, rank, blocks {found}, wanted at least 1 of each")
        if self.g_stride and self.g_stride < self.out_features:
            raise InvalidProblem(
                f"low-rank pass: g has stride {self.g_stride}, wanted at least {self.out_features}; "
                "give 0 where it is contiguous"
            )

    @property
    def tile_rows(self) -> int:
        """Rows of a tile: what gives all blocks the same."""
        rounds = -(-self.rows // (self.blocks * MOST_ROWS))
        return -(-self.rows // (rounds * self.blocks * UNIT)) * UNIT

    @property
    def parts(self) -> int:
        """Parts of g^T t: one of each tile."""
        return -(-self.rows // self.tile_rows)

    def operands(self) -> tuple[Operand, ...]:
        """``u``, ``parts``, which are written, ``g``, ``up``, ``t``."""
        d, kind = self, self.element
        return (
            Operand("u", kind, (d.rows, d.rank), writes=True),
            Operand("parts", ElementKind.F32, (d.parts, d.out_features, d.rank), writes=True),
            Operand("g", kind, (d.rows, d.out_features), layout=(d.g_stride or d.out_features, 1)),
            Operand("up", kind, (d.out_features, d.rank)),
            Operand("t", kind, (d.rows, d.rank)),
        )

    def reference(self, arrays: Sequence[np.ndarray], scale: float = 1.0) -> list[tuple[np.ndarray, np.ndarray]]:
        """Results for g, up, t in float64, each with the magnitude that its guarantee is relative to."""

        def both(g: np.ndarray, up: np.ndarray, t: np.ndarray, factor: float) -> list[np.ndarray]:
            tiles = [slice(first, first + self.tile_rows) for first in range(0, self.rows, self.tile_rows)]
            return [factor * (g @ up), np.stack([g[rows].T @ t[rows] for rows in tiles])]

        exact = [np.asarray(array, np.float64) for array in arrays]
        return list(zip(both(*exact, scale), both(*map(np.abs, exact), abs(scale)), strict=True))


class LowRankPassArgs(Arguments):
    """The tensors of one run, and the scale of u."""

    def __init__(
        self, u: TensorMut, parts: TensorMut, g: TensorRef, up: TensorRef, t: TensorRef, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.u, self.parts, self.g, self.up, self.t, self.scale = u, parts, g, up, t, float(scale)

    def tensors(self) -> list[TensorRef]:
        """``u``, ``parts``, ``g``, ``up``, ``t``."""
        return [self.u, self.parts, self.g, self.up, self.t]


def _refuses(descriptor: LowRankPassDescriptor) -> str:
    d = descriptor
    if d.element not in _KINDS:
        return f"wants g, t and U of bf16 or fp16, found {d.element.value}"
    strides = (d.out_features, d.g_stride, d.rank)
    if any(number % _RANK_UNIT for number in strides) or d.rank > MOST_RANKS:
        return f"wants columns, strides and at most {MOST_RANKS} ranks in multiples of {_RANK_UNIT}, found {strides}"
    if d.parts > _MOST_PARTS:
        return f"wants at most {_MOST_PARTS} parts, found {d.parts}"
    most = max(d.rows, d.parts * d.out_features)
    return f"wants fewer than 2**31 rows and columns of parts, found {most}" if most >= _LARGEST else ""


def _guarantee(descriptor: LowRankPassDescriptor) -> PrecisionGuarantee:
    return PrecisionGuarantee(
        math_precision=MathPrecision.BF16_TENSOR_CORE,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=2.0 * max(descriptor.out_features, descriptor.tile_rows) + 4.0,
        derivation=(
            "2 units a term (the tensor core truncates it at fp32's last place); the scale's rounding and product"
        ),
    )


class _Program:
    """One launch."""

    reads_addresses = True

    def __init__(self, descriptor: LowRankPassDescriptor, device: Device) -> None:
        self.descriptor, self.device = descriptor, device
        self.tile = PassTile(descriptor.tile_rows)
        blocks = -(-min(descriptor.blocks, descriptor.parts) // _PAIR) * _PAIR
        self.launch = low_rank_pass(descriptor.element.value, self.tile).launcher((blocks, 1, 1), overlaps=True)

    def bind(self, args: LowRankPassArgs, workspace: Workspace) -> Launches:
        """The launch."""
        d, line = self.descriptor, SPAN // 2
        box = self.tile.rows // BOXES
        maps = [
            self._map(args.g, (d.rows, d.out_features), d.g_stride or d.out_features, (box, DEPTH)),
            self._map(args.up, (d.out_features, d.rank), d.rank, (DEPTH, line)),
            self._map(args.t, (d.rows, d.rank), d.rank, (box, line)),
        ]
        extents = (d.rows, d.out_features, d.rank)
        return [(self.launch, (args.u.data, args.parts.data, *maps, *extents, np.float32(args.scale)))]

    def _map(self, tensor: TensorRef, shape: tuple[int, int], stride: int, box: tuple[int, int]) -> int:
        swizzle = box[1] * tensor.element.itemsize
        return map_address(self.device, Box.of_matrix(tensor.address, tensor.element, shape, stride, box, swizzle))


class LowRankPassPlan(Plan):
    """u and the parts of g^T t; see :class:`LowRankPassDescriptor`."""

    name = "low-rank pass"
    skus = (
        Sku(
            name="streamed",
            backend=BackendKind.STREAMED,
            arch=ArchSku.SM90A,
            refuses=_refuses,
            guarantee=_guarantee,
            build=_Program,
            alignment=16,
        ),
    )


def _cycles(descriptor: LowRankPassDescriptor) -> float:
    """How long it takes beside a product, by the bytes that a block loads."""
    tiles = -(-descriptor.parts // descriptor.blocks)
    stages = tiles * -(-descriptor.out_features // DEPTH)
    return _FIXED_CYCLES + stages * 2 * DEPTH * (descriptor.tile_rows + descriptor.rank) / _BYTES_A_CYCLE


def pass_beside(
    second: MatmulProgram, device: Device, g: tuple[int, int], rank: int, element: ElementKind, g_stride: int = 0
) -> LowRankPassDescriptor | None:
    """The pass over g, of so many rows and columns, before a product that takes u late, where it pays.

    It runs on multiprocessors that the product leaves idle in its last round of tiles, and saves that g is read again;
    None where it would hold the product up for longer than that.
    """
    (rows, out_features), (blocks, cycles) = g, second.spare()
    if not blocks or rows * out_features < _LEAST_ELEMENTS or rank > MOST_RANKS:
        return None
    descriptor = LowRankPassDescriptor(rows, out_features, rank, blocks, element, g_stride)
    if device.arch < ArchSku.SM90A.value or _refuses(descriptor):
        return None
    saved = out_features * (2 * rows - 4 * descriptor.parts * rank) / (device.multiprocessors * _BYTES_A_CYCLE_OF_ALL)
    return descriptor if _cycles(descriptor) - cycles < saved else None
