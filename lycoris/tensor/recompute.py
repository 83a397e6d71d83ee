"""Memory for time: a part of the graph of which only the arguments are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lycoris.tensor import autograd, streams
from lycoris.tensor.tensor import Tensor


def checkpoint(fn: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """fn(*args), of which only the arguments are kept: the way back computes it once more, by the same random numbers.

    ``fn`` gives one tensor and does the same both times. Leaves that it uses beside its arguments get their gradients
    too. Raises RefusedInput on the way back where it draws more random numbers than it did.
    """

    def run() -> tuple[list[Tensor], Tensor]:
        with autograd.enable_grad():
            inner = [a.detach().requires_grad_(a.requires_grad) for a in args]
            return inner, fn(*inner)

    if not autograd.is_grad_enabled():
        return fn(*args)
    with streams.noted() as drawn:
        _, first = run()
    out = first.detach()
    if not first.requires_grad:
        return out

    def pull(g: Tensor, edges: Sequence[autograd.Node | None]) -> list[Tensor | None]:
        with streams.repeated(drawn):
            inner, result = run()
        autograd.backward([result], [g])
        return [None if e is None or a.grad is None else a.grad.to(e.kind) for e, a in zip(edges, inner, strict=True)]

    return autograd.record("checkpoint", out, args, args, pull)
