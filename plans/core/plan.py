"""The plan contract: descriptor -> select -> can_implement -> run, the same for every family.

A family is a :class:`Plan` subclass with a name and a table of :class:`Sku` rows, fastest first. Operands are
declared by the descriptor as data; every check and its message comes from that declaration.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from kernels.target import bound
from plans.core.device import Device, device_error, driver_errors
from plans.core.errors import NoSku, WorkspaceTooSmall
from plans.core.operand import Operand, check_operands, check_overlaps, extents
from plans.core.precision import PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind, KernelSku
from plans.core.tensor import TensorMut, TensorRef
from plans.core.workspace import NO_WORKSPACE, Workspace

Launches = list[tuple[Callable, tuple]]
"""(launcher, flat arguments) in the order in which they run."""


@dataclass(frozen=True)
class PlanPreference:
    """What the caller wants of a selection; every field is obeyed.

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
    """A SKU built for one descriptor on one device: compiled kernels with their grids.

    One whose launches depend on operands' addresses otherwise than as arguments, as those of TMA do, says so by a true
    ``reads_addresses``.
    """

    def bind(self, args: Any, workspace: Workspace) -> Launches:
        """The launches of one run."""


@dataclass(frozen=True)
class Sku:
    """One way to compute a family.

    ``refuses(descriptor)`` answers with the reason the user will read, or with "". ``guarantee`` and
    ``workspace`` are functions of the descriptor; ``build(descriptor, device)`` compiles. ``suits(descriptor)`` says
    whether it is the fast choice where it accepts: rows that do come first.
    """

    name: str
    backend: BackendKind
    arch: ArchSku
    refuses: Callable[[Any], str]
    guarantee: Callable[[Any], PrecisionGuarantee]
    build: Callable[[Any, Device], Program]
    workspace: Callable[[Any], int] = lambda _descriptor: 0
    alignment: int = 0
    suits: Callable[[Any], bool] = lambda _descriptor: True


class Contract:
    """What single plans and groups of them share: selection with its cache, and runs that are bound once.

    A subclass says what a selection makes (``make``), what it checks (``can_implement``) and what it launches
    (``launches``). Its objects are immutable and usable from several threads.
    """

    name: ClassVar[str]

    def __init__(self, descriptor: Any, device: Device, workspace_bytes: int) -> None:
        self.descriptor, self.device = descriptor, device
        self._workspace_bytes = workspace_bytes

    @classmethod
    def select(
        cls,
        stream: Any,
        descriptor: Descriptor,
        preference: PlanPreference | None = None,
        device: Device | None = None,
    ) -> Self:
        """The first SKU that accepts, compiled and bound; cached by device, descriptor and preference.

        Raises :class:`InvalidProblem` for a descriptor that contradicts itself, :class:`NoSku` with every refusal
        where nothing accepts, and :class:`DeviceError` where the device has no room for the kernels.
        """
        del stream  # selection launches nothing; the argument keeps the seeds' signature
        device = device or Device.open("auto")
        preference = preference or PlanPreference()
        key = (cls, device.ordinal, descriptor, preference)
        with _lock:
            plan = _cache.get(key)
            if plan is None:
                try:
                    plan = _cache[key] = cls.make(descriptor, preference, device)
                except driver_errors() as error:
                    raise device_error(f"{cls.name}: loading its kernels", error) from error
        return plan

    @classmethod
    def make(cls, descriptor: Any, preference: PlanPreference, device: Device) -> Self:
        """A new plan; ``select`` keeps it."""
        raise TypeError(f"{cls.__name__} is abstract")

    def workspace_size(self) -> int:
        """Bytes of workspace that ``run`` needs."""
        return self._workspace_bytes

    def can_implement(self, args: Any) -> None:
        """Check the arguments; raises a :class:`PlanError` naming operand, found and wanted."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def launches(self, args: Any, workspace: Workspace) -> Launches:
        """What ``run`` launches for arguments that ``can_implement`` has checked."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def run(self, stream: Any, workspace: Workspace | None, args: Any) -> None:
        """Launch on ``stream``; asynchronous, allocates nothing.

        Arguments are checked when they are first used with this plan and workspace; running the same argument
        object again costs the launch alone.
        """
        found = args.bound.get(self)
        if found is None or found[0] is not workspace:
            found = args.bound[self] = (workspace, bound(self._bind(workspace or NO_WORKSPACE, args)))
        try:
            found[1](stream)
        except driver_errors() as error:
            raise device_error(f"{self.name}: launching on {self.device.name}", error) from error

    def _bind(self, workspace: Workspace, args: Any) -> Launches:
        self.can_implement(args)
        if workspace.nbytes < self._workspace_bytes:
            raise WorkspaceTooSmall(self.name, self._workspace_bytes, workspace.nbytes)
        return self.launches(args, workspace)


class Plan(Contract):
    """A problem bound to the SKU that computes it."""

    skus: ClassVar[tuple[Sku, ...]]

    def __init__(self, descriptor: Any, chosen: Sku, device: Device) -> None:
        super().__init__(descriptor, device, chosen.workspace(descriptor))
        self.chosen = chosen
        self.operands: tuple[Operand, ...] = descriptor.operands()
        self.program = chosen.build(descriptor, device)

    @classmethod
    def make(cls, descriptor: Any, preference: PlanPreference, device: Device) -> Self:
        """The plan of the first SKU that accepts."""
        return cls(descriptor, cls.choose(descriptor, preference, device), device)

    @classmethod
    def choose(cls, descriptor: Any, preference: PlanPreference, device: Device) -> Sku:
        """The SKU that ``select`` takes; nothing is compiled. Raises :class:`NoSku` where none accepts.

        The first that accepts and suits, else the first that accepts.
        """
        refusals = {sku.name: cls._reason_against(sku, descriptor, preference, device) for sku in cls.skus}
        accepting = [sku for sku in cls.skus if not refusals[sku.name]]
        if not accepting:
            raise NoSku(cls.name, descriptor, refusals)
        return next((sku for sku in accepting if sku.suits(descriptor)), accepting[0])

    @staticmethod
    def _reason_against(sku: Sku, descriptor: Any, preference: PlanPreference, device: Device) -> str:
        if preference.prefer_backend is not None and sku.backend is not preference.prefer_backend:
            return f"preference asks for {preference.prefer_backend.value}"
        if sku.arch.value > device.arch:
            return f"needs compute capability {sku.arch.value}, found {device.arch}"
        if sku.arch is ArchSku.SM90A and not preference.allow_sm90a:
            return "preference leaves sm_90a out"
        if reason := sku.refuses(descriptor):
            return reason
        needed, allowed = sku.workspace(descriptor), preference.max_workspace_bytes
        return f"needs {needed} bytes of workspace, preference allows {allowed}" if needed > allowed else ""

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

    @property
    def reads_addresses(self) -> bool:
        """Whether launches depend on operands' addresses otherwise than as arguments."""
        return getattr(self.program, "reads_addresses", False)

    def can_implement(self, args: Any) -> None:
        """Check the arguments; raises a :class:`PlanError` naming operand, found and wanted."""
        self.check(self.name, args)
        check_overlaps(self.name, extents(self.operands, args.tensors()))

    def check(self, where: str, args: Any) -> None:
        """Compare the arguments with their declaration, but not with each other; messages begin with ``where``."""
        check_operands(where, self.operands, args.tensors(), self.device, self.chosen.alignment)

    def launches(self, args: Any, workspace: Workspace) -> Launches:
        """The program's launches."""
        return self.program.bind(args, workspace)


class Arguments:
    """Base of a family's arguments: subclasses give ``tensors()`` in the order of the declared operands."""

    def __init__(self) -> None:
        self.bound: dict[Contract, tuple[Workspace | None, Callable[[Any], None]]] = {}

    def tensors(self) -> Sequence[TensorRef | None]:
        """The operands, None where one is missing."""
        raise TypeError("Arguments is abstract")


class UnaryArguments(Arguments):
    """``out`` from ``source``; the two must not overlap."""

    def __init__(self, out: TensorMut, source: TensorRef) -> None:
        super().__init__()
        self.out, self.source = out, source

    def tensors(self) -> list[TensorRef]:
        """``out`` and ``source``."""
        return [self.out, self.source]


_cache: dict[Hashable, Contract] = {}
_lock = threading.RLock()
