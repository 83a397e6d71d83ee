"""Many weights in few launches: members that one kernel computes go in one launch, the others by launches of their own.

    plan = GroupedWeightPlan.select(stream, GroupedWeightDescriptor(tuple(descriptors)))
    args = GroupedWeightArgs([WeightArgs(...), ...], table=device.allocate(plan.table_size(), stream))
    plan.upload(stream, args)
    plan.run(stream, workspace, args)

A launch reads its members' parameters from a table in device memory, one row a member, and from a list of blocks
which member and which block of it each of its blocks computes. Rows come first in the table. The lists, which are
larger, follow; they depend on the plan alone, so that other arguments need new rows only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from kernels.target import Kernel
from plans.core.device import ALIGNMENT, Device, DeviceBuffer
from plans.core.errors import BufferTooSmall, InvalidProblem, MisalignedOperand, NoSku
from plans.core.operand import Extent, check_overlaps, extents
from plans.core.plan import Arguments, Contract, Launches, PlanPreference
from plans.core.tensor import TensorMut, TensorRef
from plans.core.workspace import NO_WORKSPACE, Workspace
from plans.weight.descriptor import WeightArgs, WeightDescriptor
from plans.weight.plan import WeightPlan

_BLOCK_WORDS = 4
"""int32 words of a block in a list: the member's row in the table, and x, y, z in the grid of its own launch."""


@dataclass(frozen=True)
class GroupedWeightDescriptor:
    """Weights that are computed together, each as its own descriptor says; none depends on another's result."""

    members: tuple[WeightDescriptor, ...]


class GroupedWeightArgs(Arguments):
    """The arguments of each member in the descriptor's order, and ``table``: at least ``plan.table_size()`` bytes.

    Members may share what they read, and their not-finite flag. No table is needed where its size is 0.
    """

    def __init__(self, members: Sequence[WeightArgs], table: DeviceBuffer | None = None) -> None:
        super().__init__()
        self.members, self.table = tuple(members), table
        self.encoded_by: GroupedWeightPlan | None = None

    def tensors(self) -> list[TensorRef]:
        """All members' tensors, member by member."""
        return [tensor for member in self.members for tensor in member.tensors()]


@dataclass(frozen=True)
class _Group:
    """Members that one launch computes, and where in the table their rows and their blocks begin."""

    kernel: Kernel
    members: tuple[int, ...]
    rows_at: int
    blocks_at: int
    block_count: int


class GroupedWeightPlan(Contract):
    """Many weights in few launches.

    Each member is computed by a SKU of :class:`WeightPlan`, with that SKU's guarantee and, bit for bit, its result:
    ``plan.members[i].sku``, ``plan.members[i].precision_guarantee``. It is the one selected for the weight alone, but
    that Kronecker products walk (``vector``) from smaller sizes on where there are others beside them.
    """

    name = "grouped weight"

    def __init__(self, descriptor: GroupedWeightDescriptor, members: Sequence[WeightPlan], device: Device) -> None:
        self.members = tuple(members)
        self._workspaces = _places([member.workspace_size() for member in self.members])
        super().__init__(descriptor, device, self._workspaces[-1])
        self._groups, self._rows_bytes, self._table_bytes = _make_groups(self.members)
        self._launchers = [group.kernel.launcher((group.block_count, 1, 1)) for group in self._groups]
        grouped = {i for group in self._groups for i in group.members}
        self._single = [i for i, member in enumerate(self.members) if i not in grouped and not member.program.empty]

    @classmethod
    def make(cls, descriptor: GroupedWeightDescriptor, preference: PlanPreference, device: Device) -> Self:
        """Select each member's plan, and group what shares a kernel.

        Raises :class:`NoSku` where a member has none, or where all together need more workspace than preferred.
        """
        plans: dict[WeightDescriptor, WeightPlan] = {}
        for member in descriptor.members:
            if member not in plans:
                plans[member] = WeightPlan.member(member, preference, device)
        plan = cls(descriptor, [plans[member] for member in descriptor.members], device)
        needed, allowed = plan.workspace_size(), preference.max_workspace_bytes
        if needed > allowed:
            reason = f"needs {needed} bytes of workspace, preference allows {allowed}"
            raise NoSku(cls.name, f"{len(plan.members)} weights", {"all together": reason})
        return plan

    def table_size(self) -> int:
        """Bytes of the table that ``run`` reads."""
        return self._table_bytes

    def can_implement(self, args: GroupedWeightArgs) -> None:
        """Check every member's arguments, their overlaps with each other, and the table.

        Raises a :class:`plans.core.PlanError` that names member, operand, found and wanted.
        """
        if len(args.members) != len(self.members):
            raise InvalidProblem(
                f"{self.name}: {len(args.members)} members given, wanted {len(self.members)}; "
                "give one for each descriptor"
            )
        found: set[Extent] = set()
        for i, (plan, member) in enumerate(zip(self.members, args.members, strict=True)):
            plan.check(f"{self.name}: member {i}", member)
            found.update(extents(plan.operands, member.tensors(), f"member {i} "))
        if self._table_bytes:
            self._check_table(args.table)
            found.add(Extent(args.table.address, args.table.address + self._table_bytes, False, "table"))
        check_overlaps(self.name, found)

    def _check_table(self, table: DeviceBuffer | None) -> None:
        if table is None:
            raise InvalidProblem(
                f"{self.name}: no table given, wanted plan.table_size() bytes: {self._table_bytes}; allocate them"
            )
        found, wanted = table.device.ordinal, self.device.ordinal
        if found != wanted:
            raise InvalidProblem(
                f"{self.name}: the table is on device {found}, the plan is for device {wanted}; allocate it there"
            )
        if table.nbytes < self._table_bytes:
            raise BufferTooSmall(f"{self.name}: table", self._table_bytes, table.nbytes, "bytes")
        if table.address % 8:
            raise MisalignedOperand(
                f"{self.name}: the table lies at {table.address:#x}, wanted a multiple of 8; allocate it on its own"
            )

    def encode(self, args: GroupedWeightArgs, blocks: bool = True) -> np.ndarray:
        """What ``args.table`` has to hold when ``run`` is executed, as bytes; checks the arguments.

        Without ``blocks`` only the leading part that depends on the arguments: enough where the rest is there from
        earlier arguments of the same plan.
        """
        self.can_implement(args)
        encoded = np.zeros(self._table_bytes if blocks else self._rows_bytes, np.uint8)
        for group in self._groups:
            rows = [self.members[i].program.arguments(args.members[i], NO_WORKSPACE) for i in group.members]
            words = _table_words(rows)
            encoded[group.rows_at : group.rows_at + words.nbytes] = words.reshape(-1).view(np.uint8)
        if blocks:
            encoded[self._rows_bytes :] = self._block_lists
        args.encoded_by = self
        return encoded

    def upload(self, stream: object, args: GroupedWeightArgs, blocks: bool = True) -> None:
        """Encode, and copy to ``args.table`` on ``stream``; not for a stream that is being captured."""
        encoded = self.encode(args, blocks)
        if encoded.nbytes:
            self.device.copy_in(args.table, 0, encoded, stream)

    @functools.cached_property
    def _block_lists(self) -> np.ndarray:
        """The part of the table after the rows."""
        lists = np.zeros(self._table_bytes - self._rows_bytes, np.uint8)
        for group in self._groups:
            at = group.blocks_at - self._rows_bytes
            words = lists[at : at + 4 * _BLOCK_WORDS * group.block_count].view(np.int32).reshape(-1, _BLOCK_WORDS)
            grids = [_grid_blocks(self.members[i].program.grid) for i in group.members]
            words[:, 0] = np.repeat(np.arange(len(grids)), [len(grid) for grid in grids])
            np.concatenate(grids, out=words[:, 1:])
        return lists

    def launches(self, args: GroupedWeightArgs, workspace: Workspace) -> Launches:
        """One launch a group, and those of the members that are in none; the largest first."""
        if self._groups and args.encoded_by is not self:
            raise InvalidProblem(
                f"{self.name}: the table was not encoded for these arguments; call plan.upload(stream, args) before run"
            )
        found: list[tuple[int, Launches]] = []
        for group, launcher in zip(self._groups, self._launchers, strict=True):
            table = args.table.pointer(np.int64, group.rows_at), args.table.pointer(np.int32, group.blocks_at)
            found.append((sum(map(self._elements, group.members)), [(launcher, table)]))
        for i in self._single:
            own = _part(workspace, self._workspaces[i], self.members[i].workspace_size())
            found.append((self._elements(i), self.members[i].launches(args.members[i], own)))
        found.sort(key=lambda launch: -launch[0])
        return [launch for _, several in found for launch in several]

    def _elements(self, member: int) -> int:
        rows, columns = self.members[member].descriptor.matrix
        return rows * columns


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _places(sizes: Sequence[int]) -> list[int]:
    """Where each of several things begins, one after the other and aligned, and where the last one ends."""
    return [int(at) for at in np.cumsum([0, *map(_aligned, sizes)])]


def _part(workspace: Workspace, start: int, nbytes: int) -> Workspace:
    return Workspace(workspace.buffer.part(start, nbytes)) if nbytes else NO_WORKSPACE


def _make_groups(members: Sequence[WeightPlan]) -> tuple[list[_Group], int, int]:
    """Groups by kernel, bytes of all rows, and bytes of the table."""
    by_kernel: dict[Kernel, list[int]] = {}
    for i, member in enumerate(members):
        if member.program.group_kernel is not None and not member.program.empty:
            by_kernel.setdefault(member.program.group_kernel, []).append(i)
    sizes = [8 * _row_words(members[found[0]]) * len(found) for found in by_kernel.values()]
    counts = [sum(int(np.prod(members[i].program.grid)) for i in found) for found in by_kernel.values()]
    places = _places([*sizes, *(4 * _BLOCK_WORDS * count for count in counts)])
    groups = [
        _Group(kernel, tuple(found), places[n], places[len(sizes) + n], counts[n])
        for n, (kernel, found) in enumerate(by_kernel.items())
    ]
    return groups, places[len(sizes)], places[-1]


def _row_words(plan: WeightPlan) -> int:
    """Words of a table row: as many as the member's own launch has arguments."""
    null = {o.name: TensorMut(0, o.shape, o.strides, o.element, 0, plan.device.ordinal) for o in plan.operands}
    factors = [[null[o.name] for o in group] for group in plan.descriptor.source_operands]
    args = WeightArgs(null["out"], factors, [0.0] * len(factors), null.get("base"))
    return len(plan.program.arguments(args, NO_WORKSPACE))


def _table_words(rows: Sequence[tuple]) -> np.ndarray:
    """Rows of kernel arguments as 64-bit words: addresses, integers, and fp32 values by their bits."""
    words = np.empty((len(rows), len(rows[0])), np.int64)
    for column, values in enumerate(zip(*rows, strict=True)):
        if isinstance(values[0], np.float32):
            words[:, column] = np.array(values, np.float32).view(np.uint32)
        elif isinstance(values[0], np.ndarray):
            words[:, column] = [array.ctypes.data for array in values]
        else:
            words[:, column] = values
    return words


@functools.lru_cache(maxsize=256)
def _grid_blocks(grid: tuple[int, int, int]) -> np.ndarray:
    """x, y, z of every block, in the order in which a GPU begins them: x runs fastest."""
    blocks = np.indices(grid[::-1], np.int32).reshape(3, -1)[::-1].T
    return np.ascontiguousarray(blocks)
