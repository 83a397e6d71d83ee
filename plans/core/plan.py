"""
The plan contract: descriptor -> select -> can_implement -> run, the same for every family.

A family is a :class:`Plan` subclass with a name and a table of :class:`Sku` rows, fastest first. Operands are
declared by the descriptor as data; every check and its message comes from that declaration.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from plans.core.device import Device
from plans.core.errors import (
    BufferTooSmall,
    InvalidProblem,
    MisalignedOperand,
    NoSku,
    WorkspaceTooSmall,
)
from plans.core.precision import ElementKind, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind, KernelSku
from plans.core.tensor import TensorMut, TensorRef
from plans.core.workspace import NO_WORKSPACE, Workspace


@dataclass(frozen=True)
class Operand:
    """One tensor of a plan: its name, admissible kinds, shape, whether it is written, and its alignment in bytes."""

    name: str
    element: ElementKind
    shape: tuple[int, ...]
    writes: bool = False
    alignment: int = 0


@dataclass(frozen=True)
class PlanPreference:
    """
    What the caller wants of a selection; every field is obeyed.

    ``prefer_backend`` admits only SKUs of that technique, ``max_workspace_bytes`` only those that need no more,
    and ``allow_sm90a=False`` leaves Hopper-only kernels out.
    """

    max_workspace_bytes: int = 1 << 62
    allow_sm90a: bool = True
    prefer_backend: BackendKind | None = None


class Descriptor(Protocol):
    """A frozen, hashable description of a problem."""

    def operands(self) -> tuple[Operand, ...]:
        """The tensors of the problem, in the order in which arguments are bound."""


class Program(Protocol):
    """A SKU built for one descriptor on one device: compiled kernels with their grids."""

    def bind(self, args: Any, workspace: Workspace) -> list[tuple[Callable, tuple]]:
        """(launcher, flat arguments) in the order in which they run."""


@dataclass(frozen=True)
class Sku:
    """
    One way to compute a family.

    ``refuses(descriptor)`` answers with the reason the user will read, or with "". ``guarantee`` and
    ``workspace`` are functions of the descriptor; ``build(descriptor, device)`` compiles.
    """

    name: str
    backend: BackendKind
    arch: ArchSku
    refuses: Callable[[Any], str]
    guarantee: Callable[[Any], PrecisionGuarantee]
    build: Callable[[Any, Device], Program]
    workspace: Callable[[Any], int] = lambda _descriptor: 0
    alignment: int = 0


class Plan:
    """A problem bound to the SKU that computes it; immutable, usable from several threads."""

    name: ClassVar[str]
    skus: ClassVar[tuple[Sku, ...]]

    def __init__(self, descriptor: Any, chosen: Sku, device: Device) -> None:
        self.descriptor = descriptor
        self.device = device
        self.chosen = chosen
        self.operands: tuple[Operand, ...] = descriptor.operands()
        self._workspace_bytes = chosen.workspace(descriptor)
        self._program = chosen.build(descriptor, device)

    @classmethod
    def select(
        cls,
        stream: Any,
        descriptor: Descriptor,
        preference: PlanPreference | None = None,
        device: Device | None = None,
    ) -> Any:
        """
        The first SKU that accepts, compiled and bound; cached by device, descriptor and preference.

        Raises :class:`InvalidProblem` for a descriptor that contradicts itself and :class:`NoSku` with every
        refusal where nothing accepts.
        """
        del stream  # selection launches nothing; the argument keeps the seeds' signature
        device = device or Device.open("auto")
        preference = preference or PlanPreference()
        key = (cls, device.ordinal, descriptor, preference)
        with _lock:
            plan = _cache.get(key)
            if plan is None:
                plan = _cache[key] = cls(descriptor, cls._choose(descriptor, preference, device), device)
        return plan

    @classmethod
    def _choose(cls, descriptor: Any, preference: PlanPreference, device: Device) -> Sku:
        refusals: dict[str, str] = {}
        for sku in cls.skus:
            reason = cls._reason_against(sku, descriptor, preference, device)
            if not reason:
                return sku
            refusals[sku.name] = reason
        raise NoSku(cls.name, descriptor, refusals)

    @staticmethod
    def _reason_against(sku: Sku, descriptor: Any, preference: PlanPreference, device: Device) -> str:
        if preference.prefer_backend is not None and sku.backend is not preference.prefer_backend:
            return f"preference asks for {preference.prefer_backend.value}"
        if sku.arch.value > device.arch:
            return f"needs compute capability {sku.arch.value}, found {device.arch}"
        if sku.arch is ArchSku.SM90A and not preference.allow_sm90a:
            return "preference leaves sm_90a out"
        reason = sku.refuses(descriptor)
        if not reason and sku.workspace(descriptor) > preference.max_workspace_bytes:
            return f"needs {sku.workspace(descriptor)} bytes of workspace, preference allows {preference.max_workspace_bytes}"
        return reason

    @property
    def sku(self) -> KernelSku:
        """The identity of the selected kernel."""
        first = self.operands[0]
        last = self.operands[-1]
        return KernelSku(
            category=self.descriptor.category,
            op=self.name,
            element=first.element,
            aux_element=last.element if last is not first else None,
            layout=getattr(self.descriptor, "layout_name", None),
            epilogue=getattr(self.descriptor, "epilogue_name", None),
            arch=self.chosen.arch,
            backend=self.chosen.backend,
            precision_guarantee=self.precision_guarantee,
        )

    @property
    def precision_guarantee(self) -> PrecisionGuarantee:
        """What the selected kernel promises."""
        return self.chosen.guarantee(self.descriptor)

    def workspace_size(self) -> int:
        """Bytes of workspace that ``run`` needs."""
        return self._workspace_bytes

    def can_implement(self, args: Any) -> None:
        """Check the arguments; raises a :class:`PlanError` naming operand, found and wanted."""
        check_operands(self.name, self.operands, args.tensors(), self.device, self.chosen.alignment)

    def run(self, stream: Any, workspace: Workspace | None, args: Any) -> None:
        """
        Launch on ``stream``; asynchronous, allocates nothing.

        Arguments are checked when they are first used with this plan and workspace; running the same argument
        object again costs the launch alone.
        """
        bound = args.bound.get(self)
        if bound is None or bound[0] is not workspace:
            bound = args.bound[self] = (workspace, self._bind(workspace or NO_WORKSPACE, args))
        for launch, arguments in bound[1]:
            launch(stream, arguments)

    def _bind(self, workspace: Workspace, args: Any) -> list[tuple[Callable, tuple]]:
        self.can_implement(args)
        if workspace.nbytes < self._workspace_bytes:
            raise WorkspaceTooSmall(self.name, self._workspace_bytes, workspace.nbytes)
        return self._program.bind(args, workspace)


class Arguments:
    """Base of a family's arguments: subclasses give ``tensors()`` in the order of the declared operands."""

    def __init__(self) -> None:
        self.bound: dict[Plan, tuple[Workspace | None, list]] = {}

    def tensors(self) -> Sequence[TensorRef | None]:
        """The operands, None where one is missing."""
        raise TypeError("Arguments is abstract")


def check_operands(
    plan: str,
    operands: Sequence[Operand],
    tensors: Sequence[TensorRef | None],
    device: Device,
    alignment: int,
) -> None:
    """Compare tensors with their declaration, one by one; raises naming operand, found and wanted."""
    if len(tensors) != len(operands):
        names = ", ".join(o.name for o in operands)
        raise InvalidProblem(f"{plan}: {len(tensors)} operands given, wanted {len(operands)}: {names}")
    for operand, tensor in zip(operands, tensors, strict=True):
        where = f"{plan}: operand {operand.name}"
        if tensor is None:
            raise InvalidProblem(f"{where} is missing; wanted {operand.element.value} of shape {operand.shape}")
        if not isinstance(tensor, TensorRef):
            raise InvalidProblem(f"{where} is a {type(tensor).__name__}; wanted a TensorRef")
        if tensor.element is not operand.element:
            raise InvalidProblem(f"{where} holds {tensor.element.value}, wanted {operand.element.value}; cast it first")
        if tensor.shape != operand.shape:
            raise InvalidProblem(f"{where} has shape {tensor.shape}, wanted {operand.shape}")
        if not tensor.contiguous:
            raise InvalidProblem(f"{where} has strides {tensor.stride}; wanted it contiguous, copy it first")
        if tensor.device != device.ordinal:
            raise InvalidProblem(f"{where} is on device {tensor.device}, the plan is for device {device.ordinal}")
        if tensor.available < tensor.count:
            raise BufferTooSmall(f"{plan}: {operand.name}", tensor.count, tensor.available)
        if operand.writes and not isinstance(tensor, TensorMut):
            raise InvalidProblem(f"{where} is written, but a read-only TensorRef was given; wanted a TensorMut")
        wanted = max(operand.alignment, alignment, operand.element.itemsize)
        if tensor.count and tensor.address % wanted:
            raise MisalignedOperand(f"{where} lies at address {tensor.address:#x}, wanted a multiple of {wanted} bytes")


_cache: dict[Hashable, Plan] = {}
_lock = threading.RLock()
