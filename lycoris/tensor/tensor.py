"""Tensor: a shape, strides and an element kind over device memory, and its place in the graph of gradients.

    x = tensor.randn((4096, 3072), seed=1, requires_grad=True)
    loss = (x @ w.t()).gelu().mean()
    loss.backward()
    x.grad                                     # a tensor, fp32; may be read, changed or replaced

A tensor owns no code: what it can do is in tables (`lycoris.tensor.pointwise`, `.reductions`, `.views`, ...), whose
rows are made methods here.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from lycoris.buffers import DeviceArray, stream_of
from lycoris.errors import RefusedInput
from lycoris.replay import only_recorded
from plans.core import Device, DeviceBuffer, ElementKind, TensorMut, TensorRef
from plans.core.tensor import contiguous_strides

Shape = tuple[int, ...]
compact_strides = functools.lru_cache(1 << 14)(contiguous_strides)
FLOATS = (ElementKind.BF16, ElementKind.F16, ElementKind.F32)


class Layout:
    """How a tensor's elements lie from its first one on. Equal layouts are one object, so that lookups are cheap."""

    __slots__ = ("contiguous", "itemsize", "kind", "nbytes", "shape", "size", "strides")

    def __init__(self, shape: Shape, kind: ElementKind, strides: Shape | None) -> None:
        compact = compact_strides(shape)
        self.shape, self.kind, self.strides = shape, kind, compact if strides is None else strides
        # Wherever strides matter they are those of a contiguous tensor.
        self.contiguous = strides is None or all(
            s == c or e == 1 for s, c, e in zip(strides, compact, shape, strict=True)
        )
        self.size, self.itemsize = math.prod(shape), kind.itemsize
        self.nbytes = self.size * self.itemsize


_layouts: dict[tuple, Layout] = {}


def layout_of(shape: Shape, kind: ElementKind, strides: Shape | None = None) -> Layout:
    """The layout of a shape and kind; without strides, a contiguous one."""
    found = _layouts.get((shape, kind, strides))
    if found is None:
        whole = Layout(shape, kind, strides)
        # With the strides named or not it is the same layout.
        found = _layouts.setdefault((shape, kind, whole.strides), whole)
        _layouts[shape, kind, strides] = found
    return found


class Storage:
    """Device memory that tensors share, and how often it was changed in place."""

    __slots__ = ("buffer", "version")

    def __init__(self, buffer: DeviceBuffer) -> None:
        self.buffer, self.version = buffer, 0


class Tensor:
    """Elements of ``kind`` at ``offset + sum(index * strides)`` of a storage; views share it.

    ``device`` is where they lie, ``address`` where the first one does. ``grad`` is the accumulated gradient, fp32, of a
    leaf that requires one. ``node`` is what made the tensor, where gradients flow through it
    (`lycoris.tensor.autograd`).
    """

    __slots__ = (
        "__weakref__", "address", "contiguous_", "device", "grad", "kind", "layout", "node", "offset", "requires_grad",
        "shape", "storage", "strides",
    )  # fmt: skip

    __array_ufunc__ = None  # NumPy leaves operators with an array on the left to us

    def __init__(self, storage: Storage, layout: Layout, offset: int = 0) -> None:
        self.storage, self.layout, self.offset = storage, layout, offset
        self.shape, self.kind = layout.shape, layout.kind
        self.strides, self.contiguous_ = layout.strides, layout.contiguous
        buffer = storage.buffer
        self.device: Device = buffer.device
        self.address = buffer.address + offset * layout.itemsize
        self.requires_grad = False
        self.grad: Tensor | None = None
        self.node: Any = None

    def viewed(self, shape: Shape, strides: Shape | None = None, offset: int | None = None) -> Tensor:
        """The same memory under another shape, without a way back for gradients; without strides, a contiguous one."""
        return Tensor(self.storage, layout_of(shape, self.kind, strides), self.offset if offset is None else offset)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.layout.size

    @property
    def is_leaf(self) -> bool:
        """Whether no operation that gradients flow through made it."""
        return self.node is None or self.node.leaf is not None

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        return self.contiguous_

    @property
    def aligned(self) -> bool:
        """Whether the first element lies at a multiple of 16 bytes."""
        return not self.address & 15

    def requires_grad_(self, wanted: bool = True) -> Tensor:
        """Ask for a gradient of this leaf, or no more. Raises RefusedInput for integers and for what is no leaf."""
        if wanted and self.kind not in FLOATS:
            raise RefusedInput(f"requires_grad: a tensor of {self.kind.value} has no gradient; use bf16, f16 or f32")
        if not self.is_leaf:
            raise RefusedInput("requires_grad: the tensor is the result of an operation; detach() it first")
        self.requires_grad = wanted
        return self

    def detach(self) -> Tensor:
        """The same memory, with no way back for gradients."""
        return Tensor(self.storage, self.layout, self.offset)

    def ref(self) -> TensorRef:
        """The tensor as plans read it."""
        return self._as(TensorRef)

    def mut(self) -> TensorMut:
        """The tensor as plans write it."""
        return self._as(TensorMut)

    @property
    def argument(self) -> Any:
        """Where the first element lies, as kernels take it: an address, or in the simulator a flat array."""
        return self.storage.buffer.pointer(self.kind.storage, self.offset * self.layout.itemsize)

    @property
    def available(self) -> int:
        """How many elements the memory holds from the first one on."""
        return self.storage.buffer.nbytes // self.layout.itemsize - self.offset

    def _as(self, made: type) -> Any:
        device = self.storage.buffer.device.ordinal
        return made(self.argument, self.shape, self.strides, self.kind, self.available, device, self.storage)

    def numpy(self) -> np.ndarray:
        """A copy on the host, in the kind's NumPy type; waits for what was launched before."""
        source, device = self.contiguous(), self.device
        start, nbytes = source.offset * self.kind.itemsize, self.size * self.kind.itemsize
        part = source.storage.buffer.part(start, nbytes)
        return device.download(part, self.kind.values, self.shape, stream_of(device))

    def item(self) -> float | int:
        """The only element. Raises RefusedInput where there are others."""
        if self.size != 1:
            raise RefusedInput(
                f"item: a tensor of shape {self.shape} has {self.size} elements, wanted one; "
                "use numpy(), or reduce it first"
            )
        return self.numpy().reshape(()).astype(np.float64 if self.kind in FLOATS else np.int64).item()

    def array(self) -> DeviceArray:
        """The elements for `lycoris.ops` and `lycoris.algorithms`, without a copy where they lie so."""
        source = self if self.contiguous_ and self.aligned else self.clone()
        start, nbytes = source.offset * self.kind.itemsize, self.size * self.kind.itemsize
        return DeviceArray(source.storage.buffer.part(start, nbytes), self.shape, self.kind)

    def __len__(self) -> int:
        if not self.shape:
            raise RefusedInput("len: a tensor without axes has no length; use item()")
        return self.shape[0]

    def __float__(self) -> float:
        return float(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __repr__(self) -> str:
        extra = ", requires_grad=True" if self.requires_grad else ""
        return f"Tensor(shape={self.shape}, kind={self.kind.value}, device={self.device.name!r}{extra})"


def changed(*tensors: Tensor) -> None:
    """Count in-place changes, by which a gradient that needs the old values is refused; again at each replay."""
    for tensor in tensors:
        tensor.storage.version += 1
    work = only_recorded()
    if work is not None:
        work.changed += [tensor.storage for tensor in tensors]
