"""What layers share: the tensors they hold, by the names of their attributes; training or not; saving and loading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lycoris.errors import RefusedInput
from lycoris.nn.adapted import Adapted
from lycoris.tensor import Tensor, from_numpy, no_grad


class Module:
    """A layer: tensors and other layers as attributes, also in lists; calling it runs ``forward``.

    Names are attributes' joined by dots, so that a block's weight is ``blocks.0.attention.qkv.weight``. An
    `AdaptedLinear` counts with its base; its adapters are named by their own (`trained`).
    """

    training: bool = True

    def forward(self, *args: Any) -> Any:
        """What the layer computes."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def __call__(self, *args: Any) -> Any:
        """Run ``forward``."""
        return self.forward(*args)

    def children(self) -> Iterator[tuple[str, Any]]:
        """(name, layer or tensor) of the attributes, in the order in which they were set."""
        for name, value in vars(self).items():
            if isinstance(value, list | tuple):
                yield from ((f"{name}.{i}", part) for i, part in enumerate(value) if _held(part))
            elif _held(value):
                yield name, value

    def modules(self, prefix: str = "") -> Iterator[tuple[str, Module | Adapted]]:
        """(path, layer) of the layer itself and everything in it."""
        yield prefix, self
        for name, child in self.children():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(child, Module):
                yield from child.modules(path)
            elif isinstance(child, Adapted):
                yield path, child

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the model by its path: weights, biases, tables; not those of adapters."""
        found: dict[str, Tensor] = {}
        for path, module in self.modules():
            at = f"{path}." if path else ""
            if isinstance(module, Adapted):
                named = {"weight": module.weight, "bias": module.bias}
            else:
                named = {name: child for name, child in module.children() if isinstance(child, Tensor)}
            found |= {f"{at}{name}": tensor for name, tensor in named.items() if tensor is not None}
        return found

    def trained(self) -> dict[str, Tensor]:
        """What requires a gradient, by its path; with adapters' factors as ``<path>.<adapter>.<factor>``."""
        found = {path: tensor for path, tensor in self.tensors().items() if tensor.requires_grad}
        for path, module in self.modules():
            if isinstance(module, Adapted):
                found |= {f"{path}.{name}": tensor for name, tensor in module.parameters() if tensor.requires_grad}
        return found

    def requires_grad_(self, wanted: bool = True) -> Module:
        """Ask for gradients of every tensor of the model, or no more."""
        for tensor in self.tensors().values():
            tensor.requires_grad_(wanted)
        return self

    def train(self, training: bool = True) -> Module:
        """Whether dropouts take part, here and in everything inside."""
        for _, module in self.modules():
            if module is self:
                self.training = training
            elif isinstance(module, Adapted):
                module.train(training)
            else:
                module.training = training
        return self

    def state_dict(self) -> dict[str, np.ndarray]:
        """Every tensor of the model on the host, by its path."""
        return {path: tensor.numpy() for path, tensor in self.tensors().items()}

    def load_state_dict(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set every tensor of the model. Raises RefusedInput where one does not fit, and changes nothing."""
        own = self.tensors()
        for name in sorted(own.keys() ^ arrays.keys()):
            where = "missing" if name in own else "no tensor of the model"
            raise RefusedInput(f"load_state_dict: {name} is {where}; load what state_dict gave for such a model")
        for name, tensor in own.items():
            given = arrays[name]
            if given.shape != tensor.shape or given.dtype != tensor.kind.values:
                found, wanted = f"{given.dtype} {given.shape}", f"{tensor.kind.values} {tensor.shape}"
                raise RefusedInput(
                    f"load_state_dict: {name} is {found}, wanted {wanted}; load what state_dict gave for such a model"
                )
        with no_grad():
            for name, tensor in own.items():
                tensor.copy_(from_numpy(arrays[name], tensor.device))


def _held(value: Any) -> bool:
    return isinstance(value, Tensor | Module | Adapted)
