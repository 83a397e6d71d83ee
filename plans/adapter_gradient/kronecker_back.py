"""What a LoKr of few, wide blocks adds to x's gradient, and w1's gradient, in one pass over g and x (Hopper).

For y_l = scale * sum_m w1[l, m] (x_m w2^T), and g the gradient of y:

    d_x_tm = scale * sum_l w1[l, m] (g_tl w2)      [rows, in blocks, in width]
    d_w1[l, m] = scale * sum_t (g_tl w2) . x_tm    [out blocks, in blocks]

LoKr arXiv:2212.10650. Of other blocks, and on other devices, products and `blocks` make them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels.adapter_gradient.kronecker_back import (
    COLUMNS,
    LEAST_STAGES,
    LINES,
    ROWS,
    STORED_ROWS,
    BackTile,
    kronecker_back,
)
from kernels.target import SIMULATOR
from kernels.wgmma import DEPTH
from plans.adapter_gradient.kronecker_problem import LEAST_ROWS, KroneckerProblem
from plans.core.device import Device
from plans.core.operand import Operand
from plans.core.plan import Arguments, Launches, Plan, Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind
from plans.core.tensor import TensorMut, TensorRef
from plans.core.tensor_map import Box, map_address
from plans.core.workspace import Workspace
from plans.partial_sums import SLOTS, Partial, Sums

_HALVES = (ElementKind.BF16, ElementKind.F16)
_UNIT = 8
_LARGEST = 1 << 31
_MULTIPROCESSORS = 3 if SIMULATOR else SLOTS // 2
_MOST_READS = 4
"""How often g is worth being read, from L2: once for each part of w2 that a block of threads holds."""


@dataclass(frozen=True)
class KroneckerBackDescriptor(KroneckerProblem):
    """d_x_tm = scale * sum_l w1[l, m] (g_tl w2), d_w1[l, m] = scale * sum_t (g_tl w2) . x_tm.

    Extents and kinds are :class:`KroneckerProblem`'s; d_x is of the operands' kind.
    """

    title, of_element, of_out = "Kronecker back", "g, x, w1, w2 and d_x", "d_w1"

    def operands(self) -> tuple[Operand, ...]:
        """``d_x``, ``d_w1``, ``g``, ``x``, ``w1``, ``w2``."""
        g, x, w1, w2 = self.given()
        return (
            Operand("d_x", self.element, x.shape, writes=True),
            Operand("d_w1", self.out, w1.shape, writes=True),
            *(g, x, w1, w2),
        )

    @staticmethod
    def exact(g: np.ndarray, x: np.ndarray, w1: np.ndarray, w2: np.ndarray, scale: float) -> list[np.ndarray]:
        """d_x and d_w1."""
        u = (g.reshape(-1, g.shape[2]) @ w2).reshape(*g.shape[:2], w2.shape[1])  # one product, not one a row
        return [scale * (w1.T @ u), scale * np.tensordot(u, x, axes=((0, 2), (0, 2)))]


class KroneckerBackArgs(Arguments):
    """The tensors of one run, and a finite scale."""

    def __init__(
        self,
        d_x: TensorMut,
        d_w1: TensorMut,
        g: TensorRef,
        x: TensorRef,
        w1: TensorRef,
        w2: TensorRef,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.d_x, self.d_w1, self.g, self.x, self.w1, self.w2 = d_x, d_w1, g, x, w1, w2
        self.scale = float(scale)

    def tensors(self) -> list[TensorRef]:
        """``d_x``, ``d_w1``, ``g``, ``x``, ``w1``, ``w2``."""
        return [self.d_x, self.d_w1, self.g, self.x, self.w1, self.w2]


def _tile(descriptor: KroneckerBackDescriptor) -> BackTile:
    """The columns of w2 that leave room for stages and waste least; of those the most."""
    depth = -(-descriptor.out_width // DEPTH)
    tiles = [BackTile(columns // DEPTH, depth) for columns in COLUMNS]
    fitting = [tile for tile in tiles if tile.stages >= LEAST_STAGES] or tiles[-1:]
    return min(fitting, key=lambda tile: _across(descriptor, tile) * tile.across)


def _across(descriptor: KroneckerBackDescriptor, tile: BackTile) -> int:
    """Parts of w2's columns."""
    return -(-descriptor.in_width // (tile.across * DEPTH))


def _blocks(descriptor: KroneckerBackDescriptor) -> int:
    """Blocks of threads: for each part of w2's columns as many, which share the rows."""
    across = _across(descriptor, _tile(descriptor))
    return across * max(1, min(_MULTIPROCESSORS // across, -(-descriptor.rows // ROWS)))


def _partial(descriptor: KroneckerBackDescriptor) -> Partial:
    return Partial(_blocks(descriptor), descriptor.out_blocks, descriptor.in_blocks)


def _refuses(descriptor: KroneckerBackDescriptor) -> str:
    d = descriptor
    if d.element not in _HALVES:
        return f"wants g, x, w1 and w2 of bf16 or fp16, found {d.element.value}"
    if not min(d.rows, d.out_blocks, d.in_blocks, d.out_width, d.in_width):
        return "wants rows and blocks of something: TMA has no map of nothing"
    if d.out_width % _UNIT or d.in_width % _UNIT:
        return f"wants widths of multiples of {_UNIT}, found {d.out_width} and {d.in_width}"
    if max(d.out_blocks, d.in_blocks) > LINES:
        return f"wants at most {LINES} x {LINES} blocks, found {d.out_blocks} x {d.in_blocks}"
    if _tile(d).stages < LEAST_STAGES:
        return f"wants {DEPTH} columns of w2 to fit shared memory, found {d.out_width} rows"
    return f"wants fewer than 2**31 rows, found {d.rows}" if d.rows >= _LARGEST else ""


def _guarantee(descriptor: KroneckerBackDescriptor) -> PrecisionGuarantee:
    d = descriptor
    rounding = 2.0**16 if d.element is ElementKind.BF16 else 2.0**13
    return PrecisionGuarantee(
        math_precision=MathPrecision.BF16_TENSOR_CORE,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=rounding + 2.0 * d.out_width + 2.0 * max(LINES, d.rows * d.in_width) + _blocks(d) + 20.0,
        derivation=(
            f"g w2 is rounded to {d.element.value}; 2 units a term (the tensor core truncates it at "
            "fp32's last place); the sums of two rows, of warps and of blocks a unit each; the scale's rounding and "
            "product"
        ),
    )


class _Program:
    """The pass, and the sums of d_w1's parts."""

    reads_addresses = True

    def __init__(self, descriptor: KroneckerBackDescriptor, device: Device) -> None:
        self.descriptor, self.device, self.tile = descriptor, device, _tile(descriptor)
        made = kronecker_back(descriptor.element.value, self.tile)
        self.launch = made.launcher((_blocks(descriptor), 1, 1), overlaps=True)
        self.sums = Sums((_partial(descriptor),), descriptor.out, early=True)

    def bind(self, args: KroneckerBackArgs, workspace: Workspace) -> Launches:
        """Both launches."""
        d, (parts,) = self.descriptor, self.sums.pointers(workspace)
        w2 = Box.of_matrix(args.w2.address, d.element, (d.out_width, d.in_width), d.in_width, (DEPTH, DEPTH))
        maps = [
            self._rows_map(args.g, d.out_blocks, d.out_width, ROWS),
            self._rows_map(args.x, d.in_blocks, d.in_width, ROWS),
            map_address(self.device, w2),
            self._rows_map(args.d_x, d.in_blocks, d.in_width, STORED_ROWS),
        ]
        numbers = (d.out_blocks, d.in_blocks, -(-d.rows // ROWS), _across(d, self.tile), np.float32(args.scale))
        sums = self.sums.arguments([args.d_w1], workspace, args.scale)
        return [(self.launch, (parts, args.w1.data, *maps, *numbers)), (self.sums.launch, sums)]

    def _rows_map(self, tensor: TensorRef, blocks: int, width: int, rows: int) -> int:
        """The map of rows of blocks, of which a box has so many."""
        shape, box = (self.descriptor.rows, blocks, width), (rows, LINES, DEPTH)
        return map_address(
            self.device, Box.of_blocks(tensor.address, self.descriptor.element, shape, blocks * width, box)
        )


class KroneckerBackPlan(Plan):
    """d_x and d_w1 of a LoKr; see :class:`KroneckerBackDescriptor`."""

    name = "Kronecker back"
    skus = (
        Sku(
            name="streamed",
            backend=BackendKind.STREAMED,
            arch=ArchSku.SM90A,
            refuses=_refuses,
            guarantee=_guarantee,
            build=_Program,
            workspace=lambda descriptor: _partial(descriptor).nbytes,
            alignment=16,
        ),
    )

    @classmethod
    def is_fast(cls, descriptor: KroneckerBackDescriptor, device: Device) -> bool:
        """Whether the pass can be made there and is worth it: rows fill tiles, and g is not read too often."""
        d = descriptor
        if device.arch < ArchSku.SM90A.value or SIMULATOR or d.rows < LEAST_ROWS or _refuses(d):
            return False
        return 2 * d.out_blocks > LINES and d.in_width > DEPTH and _across(d, _tile(d)) <= _MOST_READS
