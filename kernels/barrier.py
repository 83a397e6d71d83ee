"""Hopper's asynchronous machinery (sm_90): mbarriers, clusters, the bulk tensor copy engine (TMA), register hand-over.

Shared memory is named by 32-bit addresses here (:data:`shared_address`), tensor maps by 64-bit global addresses;
a map describes a matrix and the box of it that is copied. Twins are in `simulator_hopper.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from kernels import simulator_hopper as twins
from kernels.ptx import GLOBAL, SHARED, instruction
from kernels.target import device

shared_address = instruction("mov.u32 $0, $1;", (SHARED,), "r", twin=twins.shared_address, pure=True)

# (barrier, arrivals that complete a phase)
barrier_init = instruction("mbarrier.init.shared::cta.b64 [$0], $1;", "rr", twin=twins.barrier_init)
barrier_init_visible = instruction("fence.mbarrier_init.release.cluster;", "", twin=twins.nothing)
# (barrier, bytes): arrives, and lets the phase wait for so many bytes.
barrier_expect_bytes = instruction(
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "rr", twin=twins.barrier_expect_bytes
)
barrier_arrive = instruction("mbarrier.arrive.shared::cta.b64 _, [$0];", "r", twin=twins.barrier_arrive)
# (barrier, rank): arrives at the barrier of that address in another block of the cluster. A release of cluster scope
# would wait for all of the thread's memory operations; what is handed back here was read by products already done.
barrier_arrive_remote = instruction(
    "{ .reg .b32 there; mapa.shared::cluster.u32 there, $0, $1; mbarrier.arrive.shared::cluster.b64 _, [there]; }",
    "rr",
    twin=twins.barrier_arrive_remote,
)
# (barrier, parity): waits until the phase of that parity is complete; a barrier begins in phase 0, so 1 passes at once.
# Ten seconds in vain are a fault of the kernel's, or a tensor map's: it then fails instead of hanging.
barrier_wait = instruction(
    "{ .reg .pred done; .reg .b64 now, end; "
    "mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @done bra DONE_${:uid}; "
    "mov.u64 end, %globaltimer; add.u64 end, end, 10000000000; "
    "AGAIN_${:uid}: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @done bra DONE_${:uid}; "
    "mov.u64 now, %globaltimer; setp.lt.u64 done, now, end; @done bra AGAIN_${:uid}; trap; DONE_${:uid}: }",
    "rr",
    twin=twins.barrier_wait,
)

# Programmatic dependent launch: a grid lets the next one begin before it ends, and that one waits where it needs it.
next_grid_may_begin = instruction("griddepcontrol.launch_dependents;", "", twin=twins.nothing)
wait_for_previous_grid = instruction("griddepcontrol.wait;", "", twin=twins.nothing)
grid_blocks = instruction(
    "{ .reg .u32 n; mov.u32 $0, %nctaid.x; mov.u32 n, %nctaid.y; mul.lo.u32 $0, $0, n; mov.u32 n, %nctaid.z; "
    "mul.lo.u32 $0, $0, n; }",
    "",
    "r",
    twin=twins.grid_blocks,
    pure=True,
)


MANY_BLOCKS = 512
"""As many blocks as an H200 holds of a kernel of four a multiprocessor, about."""


@functools.cache
def entrance(early: bool, any_size: bool = False) -> Callable:
    """``enter()``, the first statement of a kernel that may be ``early``: after it, what came before is done.

    It also lets the next grid's blocks take the places that this one's leave: after the wait, since grids of a few
    blocks would queue on some multiprocessors and leave others idle. A kernel of ``any_size`` does so before the wait
    where it has MANY_BLOCKS, which saves it some tenths of a microsecond.
    """

    @device
    def enter():
        if early:
            many = any_size and grid_blocks() >= np.uint32(MANY_BLOCKS)
            if many:
                next_grid_may_begin()
            wait_for_previous_grid()
            if not many:
                next_grid_may_begin()

    return enter


HOPPER = {"architectures": (9, 0, "a")}
"""Options of a kernel with instructions of this module."""


def early_options(early: bool) -> dict:
    """A kernel's launch options for that."""
    return HOPPER | {"early": True} if early else {}


cluster_rank = instruction("mov.u32 $0, %cluster_ctarank;", "", "r", twin=twins.cluster_rank, pure=True)
cluster_barrier = instruction(
    "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;", "", twin=twins.cluster_barrier
)

# The barrier in two halves: what comes between them need not wait for the other blocks.
cluster_arrive = instruction("barrier.cluster.arrive.release.aligned;", "", twin=twins.nothing)
cluster_wait = instruction("barrier.cluster.wait.acquire.aligned;", "", twin=twins.cluster_barrier)
# (shared address, rank): a word at the same address in another block of the cluster.
shared_load_remote = instruction(
    "{ .reg .b32 there; mapa.shared::cluster.u32 there, $1, $2; ld.shared::cluster.b32 $0, [there]; }",
    "rr",
    "r",
    twin=twins.shared_load_remote,
)


# (shared address, pointer, element, bytes, barrier): a copy of a multiple of 16 bytes, counted at the barrier.
bulk_load = instruction(
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
    ("r", GLOBAL, "r", "r"),
    twin=twins.bulk_load,
)


@functools.cache
def tma_load(axes: int) -> Callable:
    """A primitive (shared address, map, barrier, coordinates): a box to shared memory, counted at the barrier.

    Coordinates are signed 32-bit numbers, the contiguous axis first; what lies outside of the tensor arrives as zeros.
    """

    def load(address, tensor_map, counted, *coordinates):
        twins.tma_load(address, tensor_map, counted, coordinates)

    return instruction(
        f"cp.async.bulk.tensor.{axes}d.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[$0], [$1, {_numbered(3, axes)}], [$2];",
        "rlr" + "r" * axes,
        twin=load,
    )


@functools.cache
def tma_load_multicast(axes: int) -> Callable:
    """The same to every block of the cluster whose bit is set in a last operand, counted at each one's own barrier."""

    def load(address, tensor_map, counted, *coordinates):
        *coordinates, mask = coordinates
        twins.tma_load_multicast(address, tensor_map, counted, coordinates, mask)

    return instruction(
        f"cp.async.bulk.tensor.{axes}d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        f"[$0], [$1, {_numbered(3, axes)}], [$2], ${3 + axes};",
        "rlr" + "r" * axes + "h",
        twin=load,
    )


@functools.cache
def tma_store(axes: int) -> Callable:
    """A primitive (map, shared address, coordinates): a box from shared memory to a tensor, clipped at its edges."""

    def store(tensor_map, address, *coordinates):
        twins.tma_store(tensor_map, address, coordinates)

    return instruction(
        f"cp.async.bulk.tensor.{axes}d.global.shared::cta.bulk_group [$0, {_numbered(2, axes)}], [$1];",
        "lr" + "r" * axes,
        twin=store,
    )


def _numbered(first: int, count: int) -> str:
    return "{" + ", ".join(f"${first + i}" for i in range(count)) + "}"


tma_store_commit = instruction("cp.async.bulk.commit_group;", "", twin=twins.tma_store_commit)
# A map in device memory that the host has written becomes visible to the loads and stores of the thread's block (of
# other threads after a barrier).
tensor_map_acquire = instruction("fence.proxy.tensormap::generic.acquire.sys [$0], 128;", "l", twin=twins.nothing)
# Orders a thread's ordinary writes to shared memory before later reads by TMA and wgmma.
shared_visible_to_tma = instruction("fence.proxy.async.shared::cta;", "", twin=twins.nothing)
# (shared address, 4 words): four 8x8 matrices of 16-bit values; lane 8 j + i gives the address of row i of matrix j.
store_matrix = instruction(
    "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1,$2,$3,$4};", "rrrrr", twin=twins.store_matrix
)

# (shared address, 2 words)
shared_store64 = instruction("st.shared.v2.b32 [$0], {$1,$2};", "rrr", twin=twins.shared_store64)


@functools.cache
def tma_store_wait_read(pending: int) -> Callable:
    """A primitive that waits until at most ``pending`` of the thread's groups of stores still read shared memory."""

    def wait_read():
        twins.tma_store_wait_read(pending)

    return instruction(f"cp.async.bulk.wait_group.read {pending};", "", twin=wait_read)


@functools.cache
def registers_give(count: int) -> Callable:
    """A primitive by which a warpgroup keeps ``count`` registers a thread and gives the rest back."""
    return instruction(f"setmaxnreg.dec.sync.aligned.u32 {count};", "", twin=twins.nothing)


@functools.cache
def registers_take(count: int) -> Callable:
    """A primitive by which a warpgroup waits for ``count`` registers a thread."""
    return instruction(f"setmaxnreg.inc.sync.aligned.u32 {count};", "", twin=twins.nothing)
