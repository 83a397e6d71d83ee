"""What the plans of hyper-connections share: the order of mixing weights, operands by name, scratch, checks."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.sinkhorn import EXTENTS
from plans.core import (
    ElementKind,
    InvalidProblem,
    MathPrecision,
    Operand,
    PrecisionGuarantee,
    TensorRef,
    Workspace,
)
from plans.core.plan import Arguments

KINDS = (ElementKind.F32, ElementKind.BF16)
_BLOCKS = 2**31
_F32 = ElementKind.F32


def weights_count(n: int) -> int:
    """How many mixing weights a sample has: s_pre [n], s_post [n] and M [n, n], which lie in a line in this order."""
    return n * (n + 2)


def weight_parts(line: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The parts of lines [..., n (n + 2)]: [..., n], [..., n] and [..., n, n]."""
    return line[..., :n], line[..., n : 2 * n], line[..., 2 * n :].reshape(*line.shape[:-1], n, n)


def weight_line(pre: np.ndarray, post: np.ndarray, mixing: np.ndarray) -> np.ndarray:
    """Lines from their parts."""
    return np.concatenate([pre, post, mixing.reshape(*mixing.shape[:-2], -1)], -1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), of the side of exp that does not overflow."""
    return np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x)))


def check_streams(where: str, batch: int, hidden_dim: int, n_streams: int) -> None:
    """Raise :class:`InvalidProblem` unless all are positive and there is a channel a stream."""
    if min(batch, hidden_dim, n_streams) < 1:
        raise InvalidProblem(
            f"{where}: batch {batch}, hidden_dim {hidden_dim} and n_streams {n_streams}, wanted all positive; "
            "skip what is empty"
        )
    if hidden_dim < n_streams:
        raise InvalidProblem(
            f"{where}: hidden_dim {hidden_dim} < n_streams {n_streams}, wanted at least one channel a stream; "
            "give fewer streams"
        )


def refuses_kinds(batch: int, n_streams: int, **kinds: ElementKind | None) -> str:
    """Why the portable kernels do not compute a problem, or ""; an operand that is not there has kind None."""
    for name, kind in kinds.items():
        if kind not in (*KINDS, None):
            return f"takes {name} {' or '.join(k.value for k in KINDS)}, not {kind.value}"
    if n_streams > EXTENTS[-1]:
        return f"takes 1 to {EXTENTS[-1]} streams, not {n_streams}"
    return "" if batch < _BLOCKS else "takes fewer than 2**31 samples"


def static_operands(n: int) -> tuple[Operand, ...]:
    """The parameters of a static H: ``h_pre``, ``h_post`` and ``h_res``."""
    return (Operand("h_pre", _F32, (n,)), Operand("h_post", _F32, (n,)), Operand("h_res", _F32, (n, n)))


def dynamic_operands(n: int, hidden_dim: int, projection: ElementKind) -> tuple[Operand, ...]:
    """The parameters of a dynamic H: ``projection``, ``alpha`` and ``bias``, rows in the order of the weights."""
    m = weights_count(n)
    return (
        Operand("projection", projection, (m, n * hidden_dim)),
        Operand("alpha", _F32, (3,)),
        Operand("bias", _F32, (m,)),
    )


def gradients_of(parameters: tuple[Operand, ...]) -> tuple[Operand, ...]:
    """The gradients of parameters: ``d_`` and the name, fp32, written."""
    return tuple(Operand(f"d_{operand.name}", _F32, operand.shape, writes=True) for operand in parameters)


class NamedArguments(Arguments):
    """The tensors of one run, given by the names of the descriptor's operands; those written must not overlap any."""

    def __init__(self, descriptor: Any, **tensors: TensorRef) -> None:
        super().__init__()
        self._order = [operand.name for operand in descriptor.operands()]
        if unknown := sorted(tensors.keys() - set(self._order)):
            raise InvalidProblem(f"no operand is named {', '.join(unknown)}; the operands are {', '.join(self._order)}")
        self._tensors = tensors

    def __getitem__(self, name: str) -> Any:
        """The data pointer of an operand."""
        return self._tensors[name].data

    def tensors(self) -> list[TensorRef | None]:
        """The operands in the order of their declaration."""
        return [self._tensors.get(name) for name in self._order]


def scratch_bytes(arrays: dict[str, int]) -> int:
    """The workspace that fp32 arrays of so many elements take, one after the other, each at a multiple of 16 bytes."""
    return 4 * sum(-(-count // 4) * 4 for count in arrays.values())


def scratch_pointers(workspace: Workspace, arrays: dict[str, int]) -> list[Any]:
    """Pointers to the arrays in the workspace, in their order."""
    pointers, start = [], 0
    for count in arrays.values():
        pointers.append(workspace.buffer.pointer(np.float32, start))
        start += scratch_bytes({"": count})
    return pointers


def fp32_guarantee(units: float, derivation: str) -> PrecisionGuarantee:
    """A deterministic kernel that computes in fp32."""
    return PrecisionGuarantee(
        math_precision=MathPrecision.F32,
        accumulator=_F32,
        deterministic=True,
        bit_stable_on_same_hardware=True,
        rounding_units=units,
        derivation=derivation,
    )
