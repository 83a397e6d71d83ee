"""The mixing weights of a stage of dynamic hyper-connections in a cluster of blocks (sm_90).

Sums over channels are put together by warp, by block and by cluster, in this order: each block makes the weights of
some of the samples, from what all blocks send it, and sends them to all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from kernels import bits, warp
from kernels.barrier import cluster_rank, shared_address, shared_store_counted
from kernels.hyper_connection.cluster_stage import OF_LINES, OF_SUMS, SAMPLES, Layout, Team, counters
from kernels.hyper_connection.lanes import mixing_by_lanes
from kernels.hyper_connection.static import post_weight, pre_weight
from kernels.simulator import WARP
from kernels.sinkhorn_thread import inverse
from kernels.target import device


@device
def opaque(count):
    """A number that the compiler does not know, so that it does not unroll a loop at the price of registers."""
    return np.int64(bits.again(np.uint32(count)))


@functools.cache
def sender(n: int, team: Team) -> Callable:
    """A device function: the sums of a stage over the block to the blocks that make the weights of its samples."""
    width, blocks, warps, lanes, layout = n * (n + 2) + 1, team.blocks, team.warps, team.lanes, Layout(n, team)
    values, own_values, address = SAMPLES * width, SAMPLES // blocks * width, counters(n, team).address
    sums_at, inbox_at = layout.sums, layout.inbox

    @device
    def send(shared, floats, stage):
        parity = np.uint32(stage & np.uint32(1))
        counted = address(shared, OF_SUMS, parity)
        for index in range(np.int64(warp.thread_index()), values, lanes):
            e, total = np.uint32(index), np.float32(0)
            for i in range(warps):
                total += floats[e + np.uint32(sums_at + i * values)]
            owner = np.uint32(e // np.uint32(own_values))
            line = np.uint32(np.uint32(parity * np.uint32(blocks)) + cluster_rank())
            place = np.uint32(np.uint32(line - owner) * np.uint32(own_values)) + e + np.uint32(inbox_at)
            there = shared_address(shared, np.int64(np.uint32(np.uint32(2) * np.uint32(place))))
            shared_store_counted(there, counted, owner, bits.f32_bits(total))

    return send


@functools.cache
def maker(mode: str, n: int, team: Team) -> Callable:
    """A device function of one warp: the mixing weights of the block's samples of a stage, to every block.

    It leaves the samples' ``projected`` and ``mixing`` in memory as well.
    """
    outputs, blocks, samples, project = n * (n + 2), team.blocks, SAMPLES // team.blocks, mixing_by_lanes(mode)
    width, layout, s_pre, count = outputs + 1, Layout(n, team), pre_weight(mode), counters(n, team)
    values = samples * width
    inbox_at, lines_at, wait, address = layout.inbox, layout.lines, count.wait, count.address

    @device
    def add_up(floats, at, projected, b, batch, flat, eps, lane):
        """P and r, in the place of the first block's sums."""
        for index in range(lane, opaque(values), WARP):
            e, total = np.uint32(index), np.float32(0)
            for rank in range(blocks):
                total += floats[np.uint32(at + e) + np.uint32(rank * values)]
            if np.uint32(e % np.uint32(width)) == np.uint32(outputs):
                total = np.float32(math.sqrt(total / np.float32(flat) + eps))
            floats[at + e] = total
            if b + np.int64(np.uint32(e // np.uint32(width))) < batch:
                projected[b * np.int64(width) + index] = total

    @device
    def from_logits(floats, at, alpha, bias, mixing, b, batch, eps, lane):
        """The logits, and of s_pre and s_post the weights."""
        for index in range(lane, opaque(samples * outputs), WARP):
            e = np.uint32(index)
            own = np.uint32(e // np.uint32(outputs))
            line, k = (
                np.uint32(at + np.uint32(own * np.uint32(width))),
                np.uint32(e - np.uint32(own * np.uint32(outputs))),
            )
            group = min(np.uint32(k // np.uint32(n)), np.uint32(2))
            value = alpha[group] * (floats[line + k] * inverse(floats[line + np.uint32(outputs)])) + bias[k]
            if group == np.uint32(0):
                value = s_pre(value, eps)
            elif group == np.uint32(1):
                value = post_weight(value)
            floats[line + k] = value
            if group < np.uint32(2) and b + np.int64(own) < batch:
                mixing[b * np.int64(outputs) + index] = value

    @device
    def mixing_of(floats, at, mixing, b, batch, iterations, eps, lane):
        """M of the samples, two at once."""
        i, j = np.uint32(np.uint32(lane >> np.uint32(2)) & np.uint32(3)), np.uint32(lane & np.uint32(3))
        inside = i < np.uint32(n) and j < np.uint32(n)
        cell = np.uint32(np.uint32(i * np.uint32(n)) + j) + np.uint32(2 * n) if inside else np.uint32(2 * n)
        for pair in range(samples // 2):
            own = np.uint32(lane >> np.uint32(4)) + np.uint32(2 * pair)
            place = np.uint32(at + np.uint32(np.uint32(own) * np.uint32(width))) + np.uint32(cell)
            x = project(floats[place], inside, iterations, eps)
            if inside:
                floats[place] = x
                if b + np.int64(own) < batch:
                    mixing[(b + np.int64(own)) * np.int64(outputs) + np.int64(cell)] = x

    @device
    def make(shared, floats, stage, projected, alpha, bias, mixing, first, batch, flat, iterations, eps):
        lane, parity = np.uint32(warp.thread_index() % np.uint32(WARP)), np.uint32(stage & np.uint32(1))
        at, index = np.uint32(parity * np.uint32(blocks * values) + np.uint32(inbox_at)), np.int64(lane)
        sample0 = np.uint32(cluster_rank() * np.uint32(samples))
        b = first + np.int64(sample0)
        wait(shared, OF_SUMS, stage, lane == np.uint32(0))
        add_up(floats, at, projected, b, batch, flat, eps, index)
        warp.sync_warp()
        from_logits(floats, at, alpha, bias, mixing, b, batch, eps, index)
        warp.sync_warp()
        mixing_of(floats, at, mixing, b, batch, iterations, eps, lane)
        warp.sync_warp()
        own_line = np.uint32(np.uint32(parity * np.uint32(SAMPLES)) + sample0)
        counted, place = address(shared, OF_LINES, parity), np.uint32(own_line * np.uint32(width) + np.uint32(lines_at))
        for own in range(index, opaque(values), WARP):
            e = np.uint32(own)
            there = shared_address(shared, np.int64(np.uint32(np.uint32(2) * np.uint32(place + e))))
            for rank in range(blocks):
                shared_store_counted(there, counted, np.uint32(rank), bits.f32_bits(floats[at + e]))

    return make
