"""Launches prepared once: arguments are those of a plan that lists them anew, wherever operands and workspace lie."""

from __future__ import annotations

import gc
import sys

import numpy as np
import pytest

from kernels.target import SIMULATOR
from lycoris import tensor
from lycoris.tensor import launch
from plans.core import BufferTooSmall, DeviceBuffer, ElementKind, InvalidProblem, Workspace
from plans.core.plan import UnaryArguments
from plans.core.prepared import Prepared
from plans.matmul import Segment, SegmentedMatmulArgs, SegmentedMatmulDescriptor, SegmentedMatmulPlan
from plans.matmul.descriptor import LowRankTerm
from plans.pointwise import PointwisePlan

BF16, F32 = ElementKind.BF16, ElementKind.F32


class Copy:
    """A stand-in for a plan: its only launch writes behind the first element, and to the workspace's second part."""

    def __init__(self, device, bind, reads_addresses=False):
        self.device, self._bind, self.reads_addresses = device, bind, reads_addresses

    def workspace_size(self):
        return 512

    def launches(self, args, workspace):
        return [("launch", self._bind(args, workspace.buffer))]


def address(pointer):
    return pointer.ctypes.data if SIMULATOR else pointer


def operands(device, count=8):
    source = tensor.from_numpy(np.arange(count, dtype=np.float32), device)
    return launch.empty((count,), F32, device), source


def test_places_are_filled_with_addresses(device):
    def bind(args, work):
        behind = args.out.data[1:] if isinstance(args.out.data, np.ndarray) else args.out.data + 4
        return (args.source.data, behind, 7, work.part(256, 256).pointer(np.float32, 16), np.float32(2))

    prepared = Prepared(Copy(device, bind), _refs(*operands(device)), UnaryArguments)
    for _ in range(2):
        out, source = operands(device)
        work = device.allocate(512)
        [(_, (first, second, seven, third, two))] = prepared.launches([out.argument, source.argument], work)
        assert (address(first), address(second)) == (source.address, out.address + 4)
        assert (address(third), seven, two) == (work.address + 272, 7, 2)


def test_a_program_that_reads_addresses_gets_them(device):
    def bind(args, work):
        return (args.out.address, args.source.address % 4096, work.address)

    out, source = operands(device)
    work = device.allocate(512)
    with pytest.raises((AttributeError, TypeError)):
        Prepared(Copy(device, bind), _refs(out, source), UnaryArguments)
    prepared = Prepared(Copy(device, bind, True), _refs(out, source), UnaryArguments)
    for out, source in (operands(device), operands(device)):
        for _ in range(2):
            [(_, found)] = prepared.launches([out.argument, source.argument], work)
            assert found == (out.address, source.address % 4096, work.address)


def test_memory_is_not_kept(device):
    out, source = operands(device)
    prepared = Prepared(Copy(device, lambda args, work: (args.out.data,)), _refs(out, source), UnaryArguments)
    held = [out.storage, source.storage]
    before = [sys.getrefcount(storage) for storage in held]
    del out, source
    gc.collect()
    # What is left are the list, the comprehension's variable and getrefcount's argument.
    assert before == [4, 4]
    assert [sys.getrefcount(storage) for storage in held] == [3, 3]
    assert prepared.workspace_bytes == 512


def test_operands_are_checked_where_it_is_asked_for(device):
    out, source = tensor.ones((8,), device=device), tensor.ones((4,), device=device)
    descriptor = launch.PointwiseDescriptor((launch.leaf(0),), (8,), (launch.View(F32),), (launch.View(F32),))
    plan = PointwisePlan.select(None, descriptor, device=device)
    prepared = Prepared(plan, _refs(out, out.clone()), lambda a, b: launch.PointwiseArgs([a], [b]))
    prepared.check([out.argument, source.argument], [8, 8])
    with pytest.raises(BufferTooSmall, match="pointwise: x0: the buffer holds 4 elements, wanted 8"):
        prepared.check([out.argument, source.argument], [8, 4])
    with pytest.raises(InvalidProblem, match="operand out0 is written"):
        prepared.check([out.argument, (out.detach()[4:]).argument], [8, 8])


def test_a_real_plan_s_launches(device):
    """A sum with a low-rank term, whose program takes parts of its operands and of its workspace."""
    term = LowRankTerm(24)
    descriptor = SegmentedMatmulDescriptor(40, 16, (Segment(32),), BF16, low_rank=(term,))
    plan = SegmentedMatmulPlan.select(None, descriptor, device=device)
    shapes = [(40, 16), (40, 32), (16, 32), (24, 32), (16, 24)]

    def make(out, a, b, down, up):
        return SegmentedMatmulArgs(out, [(a, b)], low_rank=[(down, up)], low_rank_scales=[0.5])

    def given():
        return [launch.empty(shape, BF16, device) for shape in shapes]

    prepared = Prepared(plan, _refs(*given()), make)
    tensors, work = given(), device.allocate(max(1, plan.workspace_size()))
    found = prepared.launches([x.argument for x in tensors], work if plan.workspace_size() else None)
    wanted = plan.launches(make(*_refs(*tensors)), Workspace(work))
    assert len(found) == len(wanted) >= 1
    for (one, arguments), (other, others) in zip(found, wanted, strict=True):
        assert one is other
        for a, b in zip(arguments, others, strict=True):
            if isinstance(b, np.ndarray):
                assert (a.ctypes.data, a.dtype, a.shape) == (b.ctypes.data, b.dtype, b.shape)
            else:
                assert a == b


def test_numbers_are_part_of_what_is_kept(device):
    """Kernels take numbers as arguments that were prepared: another number, and another sign of zero, is another."""
    x = tensor.ones((3,), device=device)
    assert [(x * number).numpy()[0] for number in (2.0, 3.0, 2.0)] == [2, 3, 2]
    assert [bool(np.signbit((x * number).numpy()[0])) for number in (0.0, -0.0)] == [False, True]


def test_what_is_kept_is_bounded(device, monkeypatch):
    monkeypatch.setattr(launch, "_MOST_KEPT", 2)
    monkeypatch.setattr(launch, "_kept", {})
    x = tensor.ones((3,), device=device)
    for number in range(5):
        assert (x + float(number)).numpy()[0] == 1 + number
        assert 1 <= len(launch._kept) <= 2


def _refs(out, *sources):
    return [out.mut(), *(source.ref() for source in sources)]


def test_workspace_without_an_address(device):
    """Its parts are places too, and tensors in it."""

    def bind(args, work):
        assert isinstance(work, DeviceBuffer)
        return (work.part(128, 384).tensor(F32, (4, 4), 64).data,)

    prepared = Prepared(Copy(device, bind), _refs(*operands(device)), UnaryArguments)
    work = device.allocate(512)
    out, source = operands(device)
    [(_, (found,))] = prepared.launches([out.argument, source.argument], work)
    assert address(found) == work.address + 192
