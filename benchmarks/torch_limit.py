"""What cuBLAS and cuDNN take, through torch in this process: the same graph replay over rotated buffers as ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from problem import repeats
from timing import rotations


class TorchReplay:
    """A CUDA graph of ``call(*tensors)`` for each set of tensors, launched again and again."""

    def __init__(
        self, call: Callable[..., Any], shapes: Sequence[tuple[int, ...]], channels_last: bool = False
    ) -> None:
        torch = self.torch = pytest.importorskip("torch", reason="the limit is measured through torch")
        nbytes = 2 * sum(torch.Size(shape).numel() for shape in shapes)
        sets = [[self._random(shape, channels_last) for shape in shapes] for _ in range(rotations(nbytes, 2))]
        self._stream, self._graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        self._count = len(sets) * repeats(len(sets))
        with torch.cuda.stream(self._stream), torch.no_grad():
            for tensors in sets[:2]:  # what the first calls choose and allocate is no part of the graph
                call(*tensors)
            self._stream.synchronize()
            with torch.cuda.graph(self._graph, stream=self._stream):
                for tensors in sets * repeats(len(sets)):
                    call(*tensors)
        self._sets = sets

    def _random(self, shape: tuple[int, ...], channels_last: bool) -> Any:
        torch = self.torch
        tensor = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.05
        return tensor.to(memory_format=torch.channels_last) if channels_last and tensor.ndim == 4 else tensor

    def seconds(self) -> float:
        """Launch the graph and wait for it: device seconds of one call."""
        start, stop = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        with self.torch.cuda.stream(self._stream):
            start.record(self._stream)
            self._graph.replay()
            stop.record(self._stream)
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3 / self._count
