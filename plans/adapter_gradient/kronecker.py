"""Gradients of both of a LoKr's factors in one pass, for narrow blocks on Hopper.

For y_l = scale * sum_m w1[l, m] (x_m w2^T):

    d_w1[l, m] = scale * sum_t (g_tl w2) . x_tm                    [out blocks, in blocks]
    d_w2 = scale * sum_{t, l} g_tl^T (sum_m w1[l, m] x_tm)         [out width, in width]

LoKr arXiv:2212.10650. For other blocks, and on other devices, several passes are faster: `blocks` and products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels.adapter_gradient.kronecker import (
    MOST_BOXES,
    MOST_LINES,
    MOST_TILES,
    KroneckerTile,
    kronecker_gradient,
)
from kernels.adapter_gradient.kronecker_portable import kronecker_gradient_portable
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
from plans.partial_sums import SLOTS, Partial, Sums, partial_bytes

_UNIT = 8
_LARGEST = 1 << 31
_MULTIPROCESSORS = 2 if SIMULATOR else SLOTS // 2
_BYTES_A_CYCLE = 18.0
"""That a multiprocessor reads beside a product on all others, in cycles as a product's count has them: what its
warpgroups, which wait for each product, have multiplied by then.
"""


@dataclass(frozen=True)
class KroneckerGradientDescriptor(KroneckerProblem):
    """d_w1[l, m] = scale * sum_t (g_tl w2) . x_tm, d_w2 = scale * sum_{t, l} g_tl^T (sum_m w1[l, m] x_tm).

    Attributes:
        beside: The launch before this one makes nothing that is taken here, and waits itself for what came before: this
            one may run beside it, and ends after it.
        spare: Where it does, multiprocessors that the launch before leaves so many cycles before it ends.

    Extents and kinds are :class:`KroneckerProblem`'s.
    """

    beside: bool = False
    spare: tuple[int, float] = (0, 0.0)

    title, of_element, of_out = "Kronecker gradient", "g, x, w1 and w2", "gradients"

    def operands(self) -> tuple[Operand, ...]:
        """``d_w1``, ``d_w2``, ``g``, ``x``, ``w1``, ``w2``."""
        g, x, w1, w2 = self.given()
        return (
            Operand("d_w1", self.out, w1.shape, writes=True),
            Operand("d_w2", self.out, w2.shape, writes=True),
            *(g, x, w1, w2),
        )

    @staticmethod
    def exact(g: np.ndarray, x: np.ndarray, w1: np.ndarray, w2: np.ndarray, scale: float) -> list[np.ndarray]:
        """d_w1 and d_w2."""
        return [
            scale * np.einsum("tlc,cd,tmd->lm", g, w2, x, optimize=True),
            scale * np.einsum("tlc,lm,tmd->cd", g, w1, x, optimize=True),
        ]


class KroneckerGradientArgs(Arguments):
    """The tensors of one run, and a finite scale."""

    def __init__(
        self,
        d_w1: TensorMut,
        d_w2: TensorMut,
        g: TensorRef,
        x: TensorRef,
        w1: TensorRef,
        w2: TensorRef,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.d_w1, self.d_w2, self.g, self.x, self.w1, self.w2 = d_w1, d_w2, g, x, w1, w2
        self.scale = float(scale)

    def tensors(self) -> list[TensorRef]:
        """``d_w1``, ``d_w2``, ``g``, ``x``, ``w1``, ``w2``."""
        return [self.d_w1, self.d_w2, self.g, self.x, self.w1, self.w2]


def _tile(descriptor: KroneckerGradientDescriptor) -> KroneckerTile:
    """The fewest tiles of a row, of about one size."""
    tiles = -(-descriptor.out_blocks // MOST_LINES)
    lines = -(-descriptor.out_blocks // (16 * tiles)) * 16
    return KroneckerTile(lines, tiles, -(-descriptor.out_width // DEPTH), -(-descriptor.in_blocks // 16) * 16)


def _blocks(descriptor: KroneckerGradientDescriptor) -> int:
    """Blocks of threads, which share the rows."""
    return min(_MULTIPROCESSORS, -(-descriptor.rows // _tile(descriptor).rows))


def _shares(descriptor: KroneckerGradientDescriptor) -> tuple[int, int]:
    """How many blocks of threads begin before the others, and the rows that they take."""
    operands, (spare, cycles) = descriptor.operands(), descriptor.spare
    blocks, nbytes = _blocks(descriptor), max(1, sum(o.nbytes for o in operands if not o.writes))
    if not descriptor.beside or not 0 < spare < blocks:
        return 0, 0
    before = min(1.0, spare * cycles * _BYTES_A_CYCLE / nbytes)
    of_stage = _tile(descriptor).rows
    return spare, int((before + (1.0 - before) * spare / blocks) * descriptor.rows) // of_stage * of_stage


def _partials(descriptor: KroneckerGradientDescriptor) -> tuple[Partial, Partial]:
    d, number = descriptor, _blocks(descriptor)
    return Partial(number, d.out_blocks, d.in_blocks), Partial(number, d.in_width, d.out_width, transposed=True)


def _refuses(descriptor: KroneckerGradientDescriptor) -> str:
    d = descriptor
    if d.element is not ElementKind.BF16:
        return f"wants g, x, w1 and w2 of bf16, found {d.element.value}"
    if not min(d.rows, d.out_blocks, d.in_blocks, d.out_width, d.in_width):
        return "wants rows and blocks of something: TMA has no map of nothing"
    if any(extent % _UNIT for extent in (d.in_blocks, d.out_width, d.in_width)):
        found = f"{d.in_blocks} blocks of {d.out_width} and {d.in_width}"
        return f"wants blocks of x and widths of multiples of {_UNIT}, found {found}"
    most = (MOST_LINES * MOST_TILES, MOST_LINES, MOST_BOXES * DEPTH, DEPTH)
    found = (d.out_blocks, d.in_blocks, d.out_width, d.in_width)
    if any(extent > limit for extent, limit in zip(found, most, strict=True)):
        return f"wants at most {most[0]} x {most[1]} blocks of {most[2]} x {most[3]}, found {found}"
    return f"wants fewer than 2**31 rows, found {d.rows}" if d.rows >= _LARGEST else ""


def _guarantee(descriptor: KroneckerGradientDescriptor) -> PrecisionGuarantee:
    return PrecisionGuarantee(
        math_precision=MathPrecision.BF16_TENSOR_CORE,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=2.0**16
        + 2.0 * max(descriptor.out_width, descriptor.in_blocks)
        + 2.0 * descriptor.rows * max(descriptor.in_width, descriptor.out_blocks)
        + _blocks(descriptor)
        + 6.0,
        derivation=(
            "g w2 and the mixed x are rounded to bf16, 2**-8 of them; 2 units a term (the tensor core truncates it at "
            "fp32's last place); "
            "the sums of two warpgroups and of all blocks a unit each; the scale's rounding and product"
        ),
    )


class _Program:
    """The pass, and the sums of its parts."""

    reads_addresses = True

    def __init__(self, descriptor: KroneckerGradientDescriptor, device: Device) -> None:
        self.descriptor, self.device, self.tile = descriptor, device, _tile(descriptor)
        made = kronecker_gradient(descriptor.element.value, self.tile, descriptor.beside)
        self.launch = made.launcher((_blocks(descriptor), 1, 1), overlaps=True)
        self.sums = Sums(_partials(descriptor), descriptor.out, early=True)

    def bind(self, args: KroneckerGradientArgs, workspace: Workspace) -> Launches:
        """Both launches."""
        d = self.descriptor
        maps = [
            self._rows_map(args.g, d.out_blocks, d.out_width, self.tile.lines),
            self._rows_map(args.x, d.in_blocks, d.in_width, self.tile.in_lines),
            self._factor_map(args.w1, (d.out_blocks, d.in_blocks), self.tile.lines),
            self._factor_map(args.w2, (d.out_width, d.in_width), DEPTH),
        ]
        extents = (d.rows, d.out_blocks, d.in_blocks, d.out_width, d.in_width)
        given = (*self.sums.pointers(workspace), *maps, *extents, *_shares(d))
        results = self.sums.arguments([args.d_w1, args.d_w2], workspace, args.scale)
        return [(self.launch, given), (self.sums.launch, results)]

    def _rows_map(self, tensor: TensorRef, blocks: int, width: int, lines: int) -> int:
        """The map of rows of blocks, of which so many are lines of a box."""
        shape, box = (self.descriptor.rows, blocks, width), (1, lines, DEPTH)
        return map_address(
            self.device, Box.of_blocks(tensor.address, self.descriptor.element, shape, blocks * width, box)
        )

    def _factor_map(self, tensor: TensorRef, shape: tuple[int, int], lines: int) -> int:
        return map_address(
            self.device, Box.of_matrix(tensor.address, self.descriptor.element, shape, shape[1], (lines, DEPTH))
        )


class _PortableProgram:
    """One launch, a warp an element."""

    def __init__(self, descriptor: KroneckerGradientDescriptor, device: Device) -> None:
        d = descriptor
        self.extents = (d.rows, d.out_blocks, d.in_blocks, d.out_width, d.in_width)
        elements = d.out_blocks * d.in_blocks + d.out_width * d.in_width
        made = kronecker_gradient_portable(d.out.value, d.element.value)
        self.launch = made.launcher((elements, 1, 1)) if elements else None

    def bind(self, args: KroneckerGradientArgs, workspace: Workspace) -> Launches:
        """The launch; none where both gradients are empty."""
        if self.launch is None:
            return []
        return [(self.launch, (*(t.data for t in args.tensors()), *self.extents, np.float32(args.scale)))]


def _portable_refuses(descriptor: KroneckerGradientDescriptor) -> str:
    elements = descriptor.out_blocks * descriptor.in_blocks + descriptor.out_width * descriptor.in_width
    if max(elements, descriptor.rows) >= _LARGEST:
        return f"wants fewer than 2**31 rows and elements, found {descriptor.rows} and {elements}"
    return ""


def _portable_guarantee(descriptor: KroneckerGradientDescriptor) -> PrecisionGuarantee:
    d = descriptor
    return PrecisionGuarantee(
        math_precision=MathPrecision.F32,
        accumulator=ElementKind.F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=2.0 * d.rows * max(d.in_width, d.out_blocks) + 2.0 * max(d.out_width, d.in_blocks) + 8.0,
        derivation="a product and a sum for each term, of inner sums too; five sums of lanes; the scale",
    )


class KroneckerGradientPlan(Plan):
    """d_w1 and d_w2 of a LoKr; see :class:`KroneckerGradientDescriptor`."""

    name = "Kronecker gradient"
    skus = (
        Sku(
            name="streamed",
            backend=BackendKind.STREAMED,
            arch=ArchSku.SM90A,
            refuses=_refuses,
            guarantee=_guarantee,
            build=_Program,
            workspace=lambda descriptor: partial_bytes(_partials(descriptor)),
            alignment=16,
        ),
        Sku(
            name="portable",
            backend=BackendKind.PORTABLE,
            arch=ArchSku.ANY,
            refuses=_portable_refuses,
            guarantee=_portable_guarantee,
            build=_PortableProgram,
        ),
    )

    @classmethod
    def is_fast(cls, descriptor: KroneckerGradientDescriptor, device: Device) -> bool:
        """Whether the pass can be made there and is worth it."""
        enough = device.arch >= ArchSku.SM90A.value and descriptor.rows >= LEAST_ROWS
        return enough and not SIMULATOR and not _refuses(descriptor)
