"""Many products of different extents in few launches, as serving needs it: the rows of each adapter are one product.

    plan = GroupedMatmulPlan.select(stream, GroupedMatmulDescriptor(tuple(descriptors)))
    args = GroupedMatmulArgs([SegmentedMatmulArgs(...), ...], table=device.allocate(plan.table_size(), stream))
    plan.upload(stream, args)
    plan.run(stream, None, args)

Products of one layout, kind, epilogue and number of segments go in one launch, whatever their extents. It reads each
product's parameters from a table in device memory and from a list of blocks which tile of which product a block makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from kernels.target import Kernel
from plans.core.device import Device, DeviceBuffer
from plans.core.errors import InvalidProblem
from plans.core.operand import Extent, check_operands, check_overlaps, extents
from plans.core.plan import Arguments, Contract, Launches, PlanPreference, Sku
from plans.core.precision import PrecisionGuarantee
from plans.core.table import check_table, places, table_words
from plans.core.tensor import TensorRef
from plans.core.workspace import Workspace
from plans.matmul import mma, portable
from plans.matmul.descriptor import MatmulDescriptor, SegmentedMatmulArgs, SegmentedMatmulDescriptor
from plans.matmul.plan import SegmentedMatmulPlan, check_numbers
from plans.matmul.program import MatmulProgram, kernel_segments, kernel_steps


class _MemberPlan(SegmentedMatmulPlan):
    """How members are chosen."""

    name = "grouped matmul"
    skus = (mma.MMA, portable.PORTABLE_MEMBER)


@dataclass(frozen=True)
class GroupedMatmulDescriptor:
    """Products that are computed together, each as its own descriptor says; none depends on another's result."""

    members: tuple[SegmentedMatmulDescriptor | MatmulDescriptor, ...]


class GroupedMatmulArgs(Arguments):
    """The arguments of each member in the descriptor's order, and ``table``: at least ``plan.table_size()`` bytes."""

    def __init__(self, members: Sequence[SegmentedMatmulArgs], table: DeviceBuffer | None = None) -> None:
        super().__init__()
        self.members, self.table = tuple(members), table
        self.encoded_by: GroupedMatmulPlan | None = None

    def tensors(self) -> list[TensorRef]:
        """All members' tensors, member by member."""
        return [tensor for member in self.members for tensor in member.tensors()]


@dataclass(frozen=True)
class _Member:
    """One product: what computes it, and its flattened arguments' source."""

    chosen: Sku
    descriptor: SegmentedMatmulDescriptor
    program: MatmulProgram


@dataclass(frozen=True)
class _Group:
    """Members that one launch computes; ``words`` are a table row's."""

    kernel: Kernel
    words: int
    members: tuple[int, ...]
    blocks: int


class GroupedMatmulPlan(Contract):
    """Many products in few launches; ``plan.guarantee(i)`` is what member i is promised."""

    name = "grouped matmul"

    def __init__(self, descriptor: GroupedMatmulDescriptor, chosen: Sequence[Sku], device: Device) -> None:
        super().__init__(descriptor, device, 0)
        problems = [_segmented(member) for member in descriptor.members]
        keys: dict[tuple, list[int]] = {}
        for i, (sku, problem) in enumerate(zip(chosen, problems, strict=True)):
            keys.setdefault((sku.name, *_family(problem)), []).append(i)
        self._members: list[_Member | None] = [None] * len(problems)
        self._groups: list[_Group] = []
        for members in keys.values():
            self._make_group(chosen[members[0]], members, problems)
        sizes = [8 * group.words * len(group.members) for group in self._groups]
        blocks = [8 * group.blocks for group in self._groups]
        self._places = places([*sizes, *blocks])
        self._rows_bytes = self._places[len(sizes)]
        self._launchers = [group.kernel.launcher((group.blocks, 1, 1)) for group in self._groups]
        self._block_lists = self._encode_blocks()

    def _make_group(self, sku: Sku, members: list[int], problems: list[SegmentedMatmulDescriptor]) -> None:
        own = [problems[i] for i in members]
        if sku is mma.MMA:
            tile = mma.tile_of_group(own)
            programs = [mma.MmaProgram(problem, self.device, tile, member=True) for problem in own]
            kernel, words = mma.group_kernel([program.problem for program in programs], tile)
        else:
            programs = [portable.PortableProgram(problem, self.device) for problem in own]
            kernel, words = portable.group_kernel(programs[0])
        for i, program in zip(members, programs, strict=True):
            self._members[i] = _Member(sku, problems[i], program)
        busy = tuple(i for i in members if not self._members[i].program.empty)
        if busy:
            self._groups.append(_Group(kernel, words, busy, sum(self._members[i].program.blocks for i in busy)))

    @classmethod
    def make(cls, descriptor: GroupedMatmulDescriptor, preference: PlanPreference, device: Device) -> Self:
        """Choose each member's technique; raises :class:`NoSku` where a member has none."""
        chosen = [_MemberPlan.choose(_segmented(member), preference, device) for member in descriptor.members]
        return cls(descriptor, chosen, device)

    def table_size(self) -> int:
        """Bytes of the table that ``run`` reads."""
        return self._places[-1]

    def guarantee(self, member: int) -> PrecisionGuarantee:
        """What a member's result is promised."""
        return self._members[member].chosen.guarantee(self._members[member].descriptor)

    def can_implement(self, args: GroupedMatmulArgs) -> None:
        """Check every member's arguments, their overlaps with each other, and the table.

        Raises a :class:`plans.core.PlanError` that names member, operand, found and wanted.
        """
        if len(args.members) != len(self._members):
            raise InvalidProblem(
                f"{self.name}: {len(args.members)} members given, wanted {len(self._members)}; "
                "give one for each descriptor"
            )
        found: set[Extent] = set()
        for i, (member, own) in enumerate(zip(self._members, args.members, strict=True)):
            where = f"{self.name}: member {i}"
            operands = member.descriptor.operands()
            check_operands(where, operands, own.tensors(), self.device, member.chosen.alignment)
            check_numbers(where, member.descriptor, own)
            found.update(extents(operands, own.tensors(), f"member {i} "))
        if self.table_size():
            check_table(self.name, args.table, self.table_size(), self.device)
            found.add(Extent(args.table.address, args.table.address + self.table_size(), False, "table"))
        check_overlaps(self.name, found)

    def encode(self, args: GroupedMatmulArgs) -> np.ndarray:
        """What ``args.table`` has to hold when ``run`` is executed, as bytes; checks the arguments."""
        self.can_implement(args)
        encoded = np.zeros(self.table_size(), np.uint8)
        for group, at in zip(self._groups, self._places, strict=False):
            words = table_words([self._members[i].program.arguments(args.members[i]) for i in group.members])
            encoded[at : at + words.nbytes] = words.reshape(-1).view(np.uint8)
        encoded[self._rows_bytes :] = self._block_lists
        args.encoded_by = self
        return encoded

    def upload(self, stream: object, args: GroupedMatmulArgs) -> None:
        """Encode, and copy to ``args.table`` on ``stream``; not for a stream that is being captured."""
        encoded = self.encode(args)
        if encoded.nbytes:
            self.device.copy_in(args.table, 0, encoded, stream)

    def _encode_blocks(self) -> np.ndarray:
        """Two int32 words a block: its product's row in the table, and its number in the product."""
        lists = np.zeros(self._places[-1] - self._rows_bytes, np.uint8)
        for number, group in enumerate(self._groups):
            at = self._places[len(self._groups) + number] - self._rows_bytes
            counts = [self._members[i].program.blocks for i in group.members]
            words = lists[at : at + 8 * group.blocks].view(np.int32).reshape(-1, 2)
            words[:, 0] = np.repeat(np.arange(len(counts)), counts)
            words[:, 1] = np.concatenate([np.arange(count) for count in counts])
        return lists

    def launches(self, args: GroupedMatmulArgs, workspace: Workspace) -> Launches:
        """One launch a group."""
        if self._groups and args.encoded_by is not self:
            raise InvalidProblem(
                f"{self.name}: the table was not encoded for these arguments; call plan.upload(stream, args) before run"
            )
        count = len(self._groups)
        found = []
        for number, launcher in enumerate(self._launchers):
            rows = args.table.pointer(np.int64, self._places[number])
            found.append((launcher, (rows, args.table.pointer(np.int32, self._places[count + number]))))
        return found


def _segmented(descriptor: SegmentedMatmulDescriptor | MatmulDescriptor) -> SegmentedMatmulDescriptor:
    return descriptor.segmented if isinstance(descriptor, MatmulDescriptor) else descriptor


def _family(descriptor: SegmentedMatmulDescriptor) -> tuple:
    """What products of one launch have in common."""
    return (kernel_segments(descriptor), descriptor.out, kernel_steps(descriptor))
