"""Several threads on one device: each is bound to it, and each has scratch memory of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np

from lycoris import nn, tensor
from lycoris.buffers import scratch
from plans.core import Device


def in_threads(count, work):
    """What ``work(number)`` gives in threads that all run at once."""
    together = Barrier(count)

    def begin(number):
        together.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def test_scratch_is_a_thread_s_own_and_grows(device: Device):
    first = scratch(device, 1000)
    assert scratch(device, 10) is first
    others = in_threads(3, lambda number: scratch(device, 1000))
    assert len({id(buffer) for buffer in (first, *others)}) == 4
    assert len({buffer.address for buffer in (first, *others)}) == 4
    grown = scratch(device, 1001)
    assert grown.nbytes >= 1001
    assert scratch(device, 1000) is grown


def test_layers_train_in_threads(device: Device):
    """The work takes scratch memory; results are those of one thread, bit for bit."""

    def work(number):
        model = nn.MLP(8, 32, generator=tensor.Generator(number))
        x = tensor.randn((40, 8), seed=number)
        loss = tensor.mse_loss(model(x), x)
        loss.backward()
        return [parameter.grad.numpy() for parameter in model.trained().values()]

    alone = [work(number) for number in range(3)]
    for found, wanted in zip(in_threads(3, work), alone, strict=True):
        for gradient, exact in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(gradient, exact)
