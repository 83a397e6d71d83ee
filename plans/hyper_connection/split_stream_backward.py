"""The fast gradients of hyper-connections around a sublayer: the SKUs "stream" of their backward plans.

See ``kernels/hyper_connection/stream_backward.py``; with a dynamic H what comes before the sublayer goes back as the
whole connection does (``plans/hyper_connection/dynamic_stream_backward.py``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.hardware import WARP
from kernels.hyper_connection import stream as stream_kernel
from kernels.hyper_connection import stream_backward as kernel
from kernels.hyper_connection.lanes import kept_bytes
from kernels.hyper_connection.sums import finish_static, sum_parts
from plans.core import Device, Workspace
from plans.hyper_connection.common import NamedArguments, scratch_bytes, scratch_pointers, weights_count
from plans.hyper_connection.stream import Launch, refuses_stream
from plans.hyper_connection.stream_backward import blocks_for
from plans.sinkhorn import gradient_units, gradient_units_by_thread

_F32_BYTES = 4


def pieces_of(d: Any) -> int:
    """In how many pieces of its channels a sample comes: a launch each, where there is no norm over all of them."""
    if _held(d) or d.hidden_dim % stream_kernel.RUN:
        return 1
    return -(-d.hidden_dim // (stream_kernel.RUN * stream_kernel.MOST_THREADS))


def _piece(d: Any) -> int:
    """The channels of a piece, of the last one at most."""
    runs = -(-d.hidden_dim // stream_kernel.RUN)
    return stream_kernel.RUN * -(-runs // pieces_of(d))


def _shape(d: Any, most_bytes: int) -> stream_kernel.Shape | None:
    """How a block holds a piece of a sample's x, d and one more line."""
    n = d.n_streams
    if n > kernel.MOST_STREAMS:
        return None
    runs = 2 if 2 * n <= kernel.MOST_STREAMS else 1
    return stream_kernel.shape_for(d.element.value, 2 * n + 1, _piece(d), most_bytes, runs, _held(d))


def _launches(
    launch: Any, d: Any, read: tuple, written: tuple, lines: int, blocks: int, eps: np.float32
) -> list[Launch]:
    """A launch for every piece; each leaves ``lines`` lines of sums."""
    piece, found = _piece(d), []
    for number in range(pieces_of(d)):
        first = number * piece
        sizes = (first, min(piece, d.hidden_dim - first), d.hidden_dim, number * lines, d.batch, blocks, 0, eps)
        found.append((launch, (*read, *written, *sizes)))
    return found


def _held(d: Any) -> int:
    return 0 if getattr(d, "gamma", None) is None else _F32_BYTES


def _refuses(d: Any, most_bytes: int, sinkhorn: Any, gamma: Any) -> str:
    if d.n_streams > kernel.MOST_STREAMS:
        return f"holds the sums of up to {kernel.MOST_STREAMS} streams in registers, not of {d.n_streams}"
    shape = _shape(d, most_bytes)
    return refuses_stream(sinkhorn, d.n_streams, d.hidden_dim, d.batch, shape, element=d.element, gamma=gamma)


def refuses_post(d: Any, most_bytes: int) -> str:
    """Why the streaming kernel does not compute a gradient of what comes after the sublayer, or ""."""
    return _refuses(d, most_bytes, None, None)


def refuses_pre(d: Any, most_bytes: int) -> str:
    """Why the streaming kernel does not compute a gradient of what comes before the sublayer, or ""."""
    return "takes a static H" if d.projection is not None else _refuses(d, most_bytes, d.sinkhorn, d.gamma)


def _blocks(d: Any, most_bytes: int) -> int:
    return blocks_for(d.batch, _shape(d, most_bytes).threads)


def _sum_units(d: Any, most_bytes: int, samples: int) -> float:
    shape = _shape(d, most_bytes)
    of_thread, of_block = stream_kernel.RUN * shape.runs, 6 + shape.threads // WARP
    return 4 * (d.n_streams + 8) + 2 * (of_thread + of_block) + of_thread * samples + of_block + 40


def post_units(d: Any, most_bytes: int) -> float:
    """Sums over streams; a thread's channels over the samples of its block or one, the block's and the blocks'."""
    if d.per_sample:
        return _sum_units(d, most_bytes, 1) + pieces_of(d)
    blocks = _blocks(d, most_bytes)
    return _sum_units(d, most_bytes, -(-d.batch // blocks)) + blocks * pieces_of(d)


def pre_units(d: Any, most_bytes: int, counted: float) -> float:
    """As :func:`post_units`; or Sinkhorn's, which the magnitude counts as so many times less than ``counted``."""
    blocks = _blocks(d, most_bytes)
    own = _sum_units(d, most_bytes, -(-d.batch // blocks)) + blocks * pieces_of(d)
    return max(own, counted * gradient_units_by_thread(d.sinkhorn) / gradient_units(d.sinkhorn))


DERIVATION = (
    "sums over streams; a thread's channels over all samples of its block, then the block's and the blocks' sums; or "
    "Sinkhorn's, by reciprocals"
)


def _post_scratch(d: Any, most_bytes: int) -> dict[str, int]:
    m, pieces = weights_count(d.n_streams), pieces_of(d)
    if d.per_sample:
        return {} if pieces == 1 else {"sums": pieces * d.batch * m}
    return {"sums": pieces * _blocks(d, most_bytes) * m}


def post_workspace(d: Any, most_bytes: int) -> int:
    """Bytes of workspace."""
    return scratch_bytes(_post_scratch(d, most_bytes))


class PostStreamProgram:
    """A launch a piece of the channels, and one for their sums, or the blocks', where a line of weights has several."""

    def __init__(self, descriptor: Any, most_bytes: int, device: Device) -> None:
        self.descriptor, self.most_bytes = descriptor, most_bytes
        d, n, shape = descriptor, descriptor.n_streams, _shape(descriptor, most_bytes)
        made = kernel.stream_backward("post", d.element.value, None, n, shape, None if d.per_sample else "given")
        resident = device.multiprocessors * made.min_blocks
        self.blocks = min(d.batch, resident) if d.per_sample else _blocks(d, most_bytes)
        self.stream = made.launcher((self.blocks, 1, 1))
        # Sums of samples stay apart: they are added up over the pieces. Those of blocks are all added up.
        m, pieces = weights_count(n), pieces_of(d)
        self.width, self.rows = (d.batch * m, pieces) if d.per_sample else (m, pieces * self.blocks)
        self.sum = sum_parts().launcher((-(-self.width // WARP), 1, 1))

    def bind(self, args: NamedArguments, workspace: Workspace) -> list[Launch]:
        """The launches."""
        d, scratch = self.descriptor, _post_scratch(self.descriptor, self.most_bytes)
        x, mixing, d_mixing = args["x_expanded"], args["mixing"], args["d_mixing"]
        sums = scratch_pointers(workspace, scratch)[0] if scratch else d_mixing
        # The kernel reads no gamma and no logits here, and writes no gradient of a gamma.
        read = (x, mixing, args["d_out"], args["update"], mixing, mixing, mixing, mixing)
        written = (args["d_streams"], args["d_update"], sums, sums)
        lines = d.batch if d.per_sample else self.blocks
        launches = _launches(self.stream, d, read, written, lines, self.blocks, np.float32(0))
        if scratch:
            launches.append((self.sum, (sums, d_mixing, d_mixing, self.width, self.width, self.rows)))
        return launches


def _pre_scratch(d: Any, most_bytes: int) -> dict[str, int]:
    blocks = _blocks(d, most_bytes)
    return {
        "sums": pieces_of(d) * blocks * weights_count(d.n_streams),
        "gamma_sums": blocks * d.hidden_dim if d.gamma is not None else 0,
    }


def pre_workspace(d: Any, most_bytes: int) -> int:
    """Bytes of workspace."""
    return scratch_bytes(_pre_scratch(d, most_bytes))


class PreStreamProgram:
    """A launch a piece of the channels, then the blocks' sums and back through the mixing weights of a static H."""

    def __init__(self, descriptor: Any, most_bytes: int, device: Device) -> None:
        self.descriptor, self.most_bytes = descriptor, most_bytes
        d, n, shape = descriptor, descriptor.n_streams, _shape(descriptor, most_bytes)
        gamma = None if d.gamma is None else d.gamma.value
        self.blocks = _blocks(d, most_bytes)
        made = kernel.stream_backward("pre", d.element.value, gamma, n, shape, "given")
        self.stream = made.launcher((self.blocks, 1, 1))
        of_gamma = 0 if gamma is None else -(-d.hidden_dim // WARP)
        kept = kept_bytes(1, d.sinkhorn_iters)
        self.finish = finish_static(d.mode.value, n, True).launcher((1 + of_gamma, 1, 1), kept)

    def bind(self, args: NamedArguments, workspace: Workspace) -> list[Launch]:
        """The launches."""
        d, eps = self.descriptor, np.float32(self.descriptor.eps)
        sums, gamma_sums = scratch_pointers(workspace, _pre_scratch(d, self.most_bytes))
        x, mixing, d_x = args["x_expanded"], args["mixing"], args["d_x"]
        logits = tuple(args[operand.name] for operand in d.parameters)
        # Without a gamma the kernels touch neither it nor its gradient; and the first writes none of an update.
        gamma, d_gamma = (args["rmsnorm_weight"], args["d_gamma"]) if d.gamma is not None else (mixing, gamma_sums)
        read = (x, gamma, args["d_streams"], args["d_aggregate"], mixing, *logits)
        gradients = (d_gamma, *(args[f"d_{operand.name}"] for operand in d.parameters))
        rows = pieces_of(d) * self.blocks
        finishing = (sums, gamma_sums, args["d_mixing"], *logits, *gradients, rows, self.blocks)
        launches = _launches(self.stream, d, read, (d_x, d_x, sums, gamma_sums), self.blocks, self.blocks, eps)
        return [*launches, (self.finish, (*finishing, d.hidden_dim, d.sinkhorn_iters, eps))]
