"""What every plan shares: SKUs, guarantees, tensors, workspace, errors, the plan contract, the device."""

from plans.core.device import Device, DeviceBuffer
from plans.core.errors import (
    BufferTooSmall,
    DeviceError,
    InvalidProblem,
    MisalignedOperand,
    NoSku,
    PlanError,
    Unsupported,
    WorkspaceTooSmall,
)
from plans.core.operand import Operand
from plans.core.plan import Plan, PlanPreference, Sku
from plans.core.precision import ElementKind, MathPrecision, PrecisionGuarantee
from plans.core.sku import ArchSku, BackendKind, KernelSku, OpCategory
from plans.core.tensor import TensorMut, TensorRef
from plans.core.workspace import Workspace

__all__ = [
    "ArchSku",
    "BackendKind",
    "BufferTooSmall",
    "Device",
    "DeviceBuffer",
    "DeviceError",
    "ElementKind",
    "InvalidProblem",
    "KernelSku",
    "MathPrecision",
    "MisalignedOperand",
    "NoSku",
    "OpCategory",
    "Operand",
    "Plan",
    "PlanError",
    "PlanPreference",
    "PrecisionGuarantee",
    "Sku",
    "TensorMut",
    "TensorRef",
    "Unsupported",
    "Workspace",
    "WorkspaceTooSmall",
]
