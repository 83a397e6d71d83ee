"""Reverse-mode differentiation: a graph of nodes, walked backwards in the order in which it was made.

An operation calls `record` with its result, its inputs, the tensors that it needs again, and a pullback: for the
gradient of the result, the gradients of those inputs that want one. Contributions to one tensor are added in fp32, in
the order of the walk, so that two runs give the same bits. There is no second order: pullbacks record nothing.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from operator import attrgetter
from typing import TYPE_CHECKING

from lycoris.errors import RefusedInput
from lycoris.tensor.contributions import Part, Sum
from plans.core import ElementKind

if TYPE_CHECKING:
    from lycoris.tensor.tensor import Storage, Tensor

Pull = Callable[..., Sequence["Tensor | Part | None"]]
"""(gradient of the result, the inputs' nodes, None where no gradient is wanted) -> the inputs' gradients.

One that ``adds`` is given a third argument: what the first input's gradient is already, or None; it gives the sum.
"""

_numbers = itertools.count()


class Node:
    """What made a tensor: ``inputs`` are the nodes of what it was made from, None where no gradient is wanted.

    ``kind`` is that of the gradients that are handed on; ``leaf`` refers to the tensor of a leaf. ``uses`` counts the
    operations that took the tensor.
    """

    __slots__ = ("adds", "hooks", "inputs", "kind", "leaf", "name", "number", "pull", "saved", "shape", "uses")

    def __init__(self, name: str, shape: tuple[int, ...], kind: ElementKind) -> None:
        self.name, self.shape, self.kind, self.number = name, shape, kind, next(_numbers)
        self.inputs: tuple[Node | None, ...] = ()
        self.uses, self.adds = 0, False
        self.pull: Pull | None = None
        self.saved: Sequence[tuple[Storage, int]] = ()
        self.hooks: list[Callable[[Tensor], Tensor | None]] = []
        self.leaf: weakref.ref[Tensor] | None = None


class _Mode(threading.local):
    enabled = True


_mode = _Mode()


class _Switch(ContextDecorator):
    """Within, operations of this thread are recorded or not; a class, as a generator costs a microsecond more."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled

    def _recreate_cm(self) -> _Switch:  # every call of what is decorated has its own
        return _Switch(self._enabled)

    def __enter__(self) -> None:
        self._before, _mode.enabled = _mode.enabled, self._enabled

    def __exit__(self, *_: object) -> None:
        _mode.enabled = self._before


def no_grad() -> ContextDecorator:
    """Within, nothing is recorded and tensors that require gradients may be changed in place."""
    return _Switch(False)


def enable_grad() -> ContextDecorator:
    """Within, operations are recorded again, also inside of `no_grad`."""
    return _Switch(True)


def is_grad_enabled() -> bool:
    """Whether operations are recorded in this thread."""
    return _mode.enabled


def wanted(inputs: Sequence[Tensor]) -> bool:
    """Whether an operation on these tensors is to be recorded."""
    if _mode.enabled:
        for tensor in inputs:  # `any` of a generator takes three times as long, and every operation asks
            if tensor.requires_grad:
                return True
    return False


def edge(tensor: Tensor) -> Node:
    """The node of a tensor that requires a gradient; a leaf's is made when it is first asked for."""
    if tensor.node is None:
        # A leaf's gradient accumulates in fp32, whatever its own kind.
        tensor.node = Node("leaf", tensor.shape, ElementKind.F32)
        tensor.node.leaf = weakref.ref(tensor)
    return tensor.node


def record(
    name: str,
    out: Tensor,
    inputs: Sequence[Tensor],
    saved: Sequence[Tensor],
    pull: Pull,
    kind: ElementKind | None = None,
    adds: bool = False,
) -> Tensor:
    """Make ``out`` the result of an operation on ``inputs``; `wanted` has said that it is to be recorded.

    ``saved`` are the tensors that ``pull`` reads: a change to one of them in place makes the walk back an error. Its
    gradient has ``kind``, or that of ``out``. ``adds``: the pullback adds what the first input's gradient is already.
    """
    # A leaf's node is made first, so that the walk, latest nodes first, comes to it after all that it went into.
    edges = tuple([(tensor.node or edge(tensor)) if tensor.requires_grad else None for tensor in inputs])
    node = Node(name, out.shape, kind or out.kind)
    for taken in edges:
        if taken is not None:
            taken.uses += 1
    node.inputs, node.adds = edges, adds
    node.pull, node.saved = pull, [(tensor.storage, tensor.storage.version) for tensor in saved]
    out.node, out.requires_grad = node, True
    return out


def backward(
    tensors: Sequence[Tensor], gradients: Sequence[Tensor] | None = None, *, retain_graph: bool = False
) -> None:
    """Add the derivatives of ``tensors``, weighted by ``gradients`` (1 for single numbers), to the leaves' ``grad``.

    The graph is freed on the way unless ``retain_graph``. Raises RefusedInput for a tensor that requires no gradient,
    several elements without a gradient, a gradient of another shape, a graph that was freed, and where a tensor that is
    needed was changed in place.
    """
    _walk(_seeds("backward", tensors, gradients), retain_graph, None)


def backward_of(
    tensor: Tensor,
    gradient: Tensor | None = None,
    *,
    retain_graph: bool = False,
    check_finite: bool = False,
) -> None:
    """Add d(tensor) / d(leaf), weighted by ``gradient`` (1 for a single number), to the leaves' ``grad``.

    ``check_finite`` waits for the device and refuses a loss that is NaN or infinite. Raises RefusedInput as `backward`.
    """
    if check_finite and not math.isfinite(value := tensor.item()):
        raise RefusedInput(
            f"backward: the tensor is {value}; nothing was computed, look at the inputs or lower the rate"
        )
    backward([tensor], None if gradient is None else [gradient], retain_graph=retain_graph)


def register_hook(tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Callable[[], None]:
    """Call ``hook`` with the gradient of this tensor whenever it is known; what it returns replaces it.

    Returns a function that removes the hook. Raises RefusedInput where no gradient is asked for.
    """
    if not tensor.requires_grad:
        raise RefusedInput("register_hook: the tensor requires no gradient; call requires_grad_() first")
    hooks = edge(tensor).hooks
    hooks.append(hook)
    return lambda: hooks.remove(hook)


def grad(
    tensors: Sequence[Tensor] | Tensor,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor] | None = None,
    *,
    retain_graph: bool = False,
) -> list[Tensor | None]:
    """The derivatives of ``tensors`` by ``inputs``, None where they do not depend on one; no ``grad`` changes.

    Raises RefusedInput as `backward` does.
    """
    tensors = list(tensors) if isinstance(tensors, list | tuple) else [tensors]
    for number, tensor in enumerate(inputs):
        if not tensor.requires_grad:
            raise RefusedInput(f"grad: input {number} requires no gradient; call requires_grad_() before it is used")
    targets = [edge(tensor) for tensor in inputs]
    found = _walk(_seeds("grad", tensors, gradients), retain_graph, set(targets))
    return [found.get(node) for node in targets]


def _seeds(operation: str, tensors: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> list[tuple[Node, Tensor]]:
    made = []
    for number, tensor in enumerate(tensors):
        if not tensor.requires_grad:
            raise RefusedInput(f"{operation}: the tensor requires no gradient; none of what it was made from does")
        gradient = None if gradients is None else gradients[number]
        if gradient is None:
            if tensor.size != 1:
                raise RefusedInput(
                    f"{operation}: a tensor of shape {tensor.shape} without its gradient, wanted one element; "
                    "give it, or reduce it first"
                )
            gradient = tensor.detach().full_like(1)
        elif gradient.shape != tensor.shape:
            raise RefusedInput(
                f"{operation}: gradient of shape {gradient.shape}, wanted the tensor's, {tensor.shape}; "
                "give one of that shape"
            )
        made.append((edge(tensor), gradient))
    return made


def _walk(seeds: list[tuple[Node, Tensor]], retain_graph: bool, targets: set[Node] | None) -> dict[Node, Tensor]:
    """Latest nodes first, leaves last; gives the gradients of ``targets``, or without any adds to leaves' ``grad``."""
    sums: dict[Node, Sum] = {}
    heap: list[tuple[int, Node]] = []
    leaves: list[Node] = []
    found: dict[Node, Tensor] = {}
    needed = None if targets is None else _leading_to(targets, [node for node, _ in seeds])

    def contribute(node: Node, part: Tensor | Part, own: bool) -> Sum:
        summed = sums.get(node)
        if summed is not None:
            summed.add(part, own, node.kind)
            return summed
        if node.leaf is None:
            heapq.heappush(heap, (-node.number, node))
        else:
            leaves.append(node)
        if isinstance(part, Part):
            summed = Sum()
            summed.add(part, own, node.kind)
        else:
            summed = Sum(part, own)
        sums[node] = summed
        return summed

    with no_grad():
        for node, gradient in seeds:
            if needed is None or node in needed:
                contribute(node, gradient, False)
        while heap:
            _, node = heapq.heappop(heap)
            gradient = sums.pop(node).total(node.kind)
            if node.hooks:
                gradient = _hooked(node, gradient)
            if targets is not None and node in targets:
                found[node] = gradient
            edges = node.inputs if needed is None else tuple([e if e in needed else None for e in node.inputs])
            if any(edges):
                _pull(node, gradient, edges, sums, contribute, retain_graph)
        for node in leaves:
            summed = sums.pop(node)
            gradient = summed.total(node.kind)
            if node.hooks:
                gradient = _hooked(node, gradient)
            if targets is None:
                _accumulate(node.leaf(), gradient, summed.own and not node.hooks)
            elif node in targets:
                found[node] = gradient
    return found


def _hooked(node: Node, gradient: Tensor) -> Tensor:
    """A node's gradient after its hooks."""
    for hook in list(node.hooks):
        gradient = _replaced(node, gradient, hook(gradient))
    return gradient


def _leading_to(targets: set[Node], seeds: Sequence[Node]) -> set[Node]:
    """The nodes from which the walk comes to a target, targets themselves among them."""
    seen, order = set(seeds), list(seeds)
    for node in order:  # which grows
        for taken in node.inputs:
            if taken is not None and taken not in seen:
                seen.add(taken)
                if taken.inputs:
                    order.append(taken)
    found = targets & seen
    order.sort(key=attrgetter("number"))  # inputs before what was made of them
    for node in order:
        if not found.isdisjoint(node.inputs):
            found.add(node)
    return found


def _replaced(node: Node, gradient: Tensor, returned: Tensor | None) -> Tensor:
    if returned is None:
        return gradient
    if returned.shape != node.shape:
        raise RefusedInput(
            f"a hook of {node.name} gave a gradient of shape {returned.shape}, wanted {node.shape}; "
            "return that, or None"
        )
    return returned.detach().to(node.kind)


def _pull(
    node: Node,
    gradient: Tensor,
    edges: Sequence[Node | None],
    sums: dict[Node, Sum],
    contribute: Callable[[Node, Tensor | Part, bool], Sum],
    retain_graph: bool,
) -> None:
    """Hand the gradient on to the inputs that want it, which ``edges`` are."""
    if node.pull is None:
        raise RefusedInput(f"backward: the graph behind {node.name} was freed; pass retain_graph=True the time before")
    for storage, version in node.saved:
        if storage.version != version:
            raise RefusedInput(
                f"backward: a tensor that the gradient of {node.name} needs was changed in place since; use a copy"
            )
    if node.adds:
        already = sums.get(edges[0])
        gradients = node.pull(gradient, edges, None if already is None else already.take(edges[0].uses))
    else:
        gradients = node.pull(gradient, edges)
    if not retain_graph:
        node.pull, node.saved = None, ()
    seen = {gradient.storage}
    for target, part in zip(edges, gradients, strict=True):
        if target is not None and part is not None:
            assert part.shape == target.shape, (node.name, part.shape, target.shape)
            contribute(target, part, part.storage not in seen).received += 1
            seen.add(part.storage)


def _accumulate(leaf: Tensor | None, gradient: Tensor, own: bool) -> None:
    """A leaf's gradient is its own, contiguous, to be changed at will; what else flows may be shared."""
    if leaf is None:
        return
    if leaf.grad is None:
        leaf.grad = gradient if own and gradient.contiguous_ else gradient.clone()
    else:
        leaf.grad.add_(gradient)
