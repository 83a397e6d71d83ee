"""What a plan refuses, and why: every message names the operand, what was found and what was wanted."""

from __future__ import annotations


class PlanError(Exception):
    """A plan could not be selected, its arguments do not fit it, or the device failed."""


class Unsupported(PlanError):
    """The problem is well formed, but nothing here computes it."""


class InvalidProblem(PlanError):
    """A descriptor or an operand contradicts itself or the plan: a shape, a kind, a device, an overlap."""


class MisalignedOperand(PlanError):
    """An operand's address is not a multiple of what the plan's kernel needs."""


class BufferTooSmall(PlanError):
    """An operand's buffer ends before what it should hold."""

    def __init__(self, operand: str, needed: int, got: int, unit: str = "elements") -> None:
        super().__init__(f"{operand}: the buffer holds {got} {unit}, wanted {needed}; pass the whole tensor")
        self.needed, self.got = needed, got


class WorkspaceTooSmall(PlanError):
    """The workspace is smaller than ``plan.workspace_size()``."""

    def __init__(self, plan: str, needed: int, got: int) -> None:
        super().__init__(f"{plan}: workspace of {got} bytes, wanted {needed}; allocate plan.workspace_size() bytes")
        self.needed, self.got = needed, got


class DeviceError(PlanError):
    """The device or its driver failed: no memory left, a lost device, a fault in work launched before."""


class NoSku(PlanError):
    """No SKU accepts the descriptor on this device under this preference; the message lists every refusal."""

    def __init__(self, plan: str, descriptor: object, refusals: dict[str, str]) -> None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        super().__init__(f"{plan}: no SKU for {descriptor} ({reasons}); give what one of them takes")
        self.refusals = refusals
