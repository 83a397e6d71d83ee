"""Products that mix the left factor of their last segment themselves, beside their first tiles."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from matmul_cases import BF16, F16, F32, gather, scatter

from kernels.matmul.wgmma_mix import COUNTERS, MOST_BLOCKS, MixBeside
from kernels.target import SIMULATOR
from plans.block_mix import BlockMixDescriptor, BlockMixPlan
from plans.core import Device, InvalidProblem, TensorMut
from plans.core.tensor_map import constants
from plans.matmul import (
    Bias,
    MixedMatmulArgs,
    MixedMatmulDescriptor,
    MixedMatmulPlan,
    Segment,
    SegmentedMatmulArgs,
    SegmentedMatmulDescriptor,
)
from plans.matmul.mixed import MixedProgram
from plans.matmul.wgmma import candidate_tiles

needs_hopper = pytest.mark.skipif(Device.open().arch < (9, 0), reason="wgmma is an instruction of sm_90a")

# m, blocks of z, of x, their width, columns of a block of the result, blocks put together, layout, w transposed
SHAPES = [
    (130, 16, 8, 40, 64, 1, "NT", False),
    (70, 8, 8, 64, 64, 1, "NN", True),
    (5, 24, 40, 32, 32, 2, "NT", True),
    (140, 48, 16, 72, 64, 1, "NN", False),
]
LARGE = [
    (4096, 48, 48, 64, 64, 4, "NT", False),
    (1000, 64, 64, 64, 64, 4, "NN", True),
    (777, 56, 24, 136, 64, 2, "NT", True),
    (4099, 8, 8, 384, 384, 1, "NN", True),
]


def of_blocks(m, blocks, in_blocks, width, columns, together, layout, transposed, kind=BF16, out=BF16, **more):
    """A base layer with LoKr beside it: groups of ``together`` blocks of columns."""
    groups, k, n = blocks // together, in_blocks * width, blocks * columns
    own, depth, lead = together * columns, together * width, k if layout[1] == "T" else n
    base = Segment(
        k, layout, kind, kind, a_stride=k + 8, a_shared=True, b_stride=lead,
        b_batch_stride=own * lead if layout[1] == "T" else own,
    )  # fmt: skip
    late = Segment(
        depth, layout, kind, kind, a_stride=groups * depth, a_batch_stride=depth, b_shared=True, diagonal=together,
        late=True,
    )  # fmt: skip
    product = SegmentedMatmulDescriptor(m, own, (base, late), out, groups, out_stride=n, out_batch_stride=own, **more)
    mix = BlockMixDescriptor(m, blocks, in_blocks, width, kind, kind, kind, transposed, k + 8)
    return MixedMatmulDescriptor(product, mix)


class Run:
    """Random operands, and runs of a program over them."""

    def __init__(self, device, rng, descriptor, scale=-0.5):
        self.device, self.descriptor, product = device, descriptor, descriptor.product
        out, *operands = descriptor.operands()
        self.values = [rng.standard_normal(o.shape).astype(o.element.values) for o in operands]
        late = product.segments[1]
        if late.diagonal > 1:
            shape = [extent // late.diagonal for extent in operands[3].shape]
            self.values[3] *= np.kron(np.eye(late.diagonal), np.ones(shape)).astype(self.values[3].dtype)
        self.values[-2] = self.values[0]  # x is the base's own left factor
        tensors = [scatter(device, o, v) for o, v in zip(operands, self.values, strict=True)]
        z = operands[2]
        count = z.shape[0] * z.shape[1] * z.shape[2]
        buffer = device.upload(np.full(2 * count, 0xFF, np.uint8))
        self.z = TensorMut(
            buffer.pointer(z.element.storage), z.shape, z.strides, z.element, count, device.ordinal, buffer
        )
        self.out, self.operand, self.scale = scatter(device, out, np.full(out.shape, np.nan)), out, scale
        args = SegmentedMatmulArgs(self.out, [tensors[:2], (self.z, tensors[3])], epilogue=tensors[4:-2])
        self.args = MixedMatmulArgs(args, tensors[0], tensors[-1], scale)

    def check(self, plan):
        """z against the mix of x, the result against the product with the z that was found."""
        stream, d = self.device.stream(), self.descriptor
        plan.run(stream, None, self.args)
        self.device.synchronize(stream)
        z = self.device.download(self.z.owner, self.z.element.values, d.mix.operands()[0].shape)
        exact, magnitude = d.mix.reference(self.values[-2], self.values[-1], self.scale)
        kept = BlockMixPlan.skus[1].guarantee(d.mix).accepts(z, exact, magnitude, d.mix.out)
        assert kept.all(), f"{(~kept).sum()} of {kept.size} of z beyond the guarantee"
        groups = np.moveaxis(z.reshape(d.mix.rows, d.product.batch, -1), 1, 0)
        pairs = [(self.values[0], self.values[1]), (groups, self.values[3])]
        exact, magnitude = d.product.reference(pairs, None, self.values[4:-2])
        kept = plan.precision_guarantee.accepts(
            gather(self.device, self.out, self.operand), exact, magnitude, self.operand.element
        )
        assert kept.all(), f"{(~kept).sum()} of {kept.size} results beyond the guarantee"
        counters = constants(self.device).counters(self.z.address, COUNTERS)
        if SIMULATOR:
            assert not counters[:COUNTERS].any()


def plan_of(descriptor, device, columns=None, cluster=1):
    """The plan, with tiles of so many columns where they are given."""
    sku = MixedMatmulPlan.skus[0]
    if columns is not None:
        found = candidate_tiles(descriptor.product)
        (tile,) = (t for t in found if (t.columns, t.cluster) == (columns, cluster))
        sku = dataclasses.replace(sku, build=lambda d, where: MixedProgram(d, where, tile))
    return MixedMatmulPlan(descriptor, sku, device)


@needs_hopper
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixes_and_multiplies(device, rng, shape):
    """Twice, since counters have to be as they were; rows that tiles and items end within."""
    descriptor = of_blocks(*shape, out=F32 if shape[0] % 2 else BF16)
    run, plan = Run(device, rng, descriptor), plan_of(descriptor, device, 64, 1 + (shape[0] > 100))
    for _ in range(2):
        run.check(plan)


@needs_hopper
@pytest.mark.skipif(SIMULATOR, reason="takes minutes there")
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_mixes_and_multiplies_much(device, rng, shape):
    descriptor = of_blocks(*shape)
    run, plan = Run(device, rng, descriptor), plan_of(descriptor, device)
    for _ in range(3):
        run.check(plan)


@needs_hopper
def test_half_floats_and_a_bias(device, rng):
    descriptor = of_blocks(66, 8, 16, 32, 64, 1, "NT", False, F16, F16, epilogue=(Bias(F16, per_batch=True),))
    Run(device, rng, descriptor, 0.25).check(plan_of(descriptor, device, 64))


def test_room_for_items():
    """Whole tiles of 16 lines, items that fit beside w, and several of them for each warp."""
    for blocks in ((8, 8), (5, 3), (16, 8), (48, 48), (64, 64), (64, 8), (8, 64), (56, 24)):
        for transposed in (False, True):
            mix = MixBeside.of(*blocks, transposed)
            assert mix.slots >= 2, mix
            used = mix.w_lines * 128 + 3 * mix.slots * mix.item_bytes
            assert used <= mix.tail_at and mix.numbers_at + 12 * mix.slots <= mix.shared_bytes, mix
            assert mix.lines >= max(blocks) and mix.item_bytes % 512 == 0, mix


def test_what_is_refused(device):
    sku = MixedMatmulPlan.skus[0]
    good = of_blocks(64, 16, 8, 40, 64, 1, "NT", False)
    assert not sku.refuses(good)
    many = of_blocks(64, 16, 72, 40, 64, 1, "NT", False)
    assert sku.refuses(many) == f"wants 1 to {MOST_BLOCKS} blocks of x and of z, found (72, 16)"
    odd = of_blocks(64, 16, 7, 40, 64, 1, "NT", False)
    assert "multiple of 8 elements apart, found (7, 40" in sku.refuses(odd)
    with pytest.raises(InvalidProblem, match="0 late segments, wanted one"):
        MixedMatmulDescriptor(SegmentedMatmulDescriptor(64, 64, (Segment(64),)), good.mix)
    with pytest.raises(InvalidProblem, match="give the late segment's A that layout"):
        MixedMatmulDescriptor(good.product, dataclasses.replace(good.mix, out_blocks=17))
    run = Run(device, np.random.default_rng(0), good, float("nan"))
    if device.arch >= (9, 0):
        with pytest.raises(InvalidProblem, match="scale nan, wanted a finite fp32 value"):
            plan_of(good, device).run(device.stream(), None, run.args)
