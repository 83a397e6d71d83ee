"""A model's linear layers with adapters on them: put there, trained, saved, loaded.

adapters = adapt(model, LoConModule, rank=4, seed=7)          # the base is frozen, the factors are trained
optimizer = AdamW(parameters_of(adapters), 1e-3)
...
save("adapter.safetensors", {f"lycoris_{name}": module for name, module in adapters.items()})
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lycoris.algorithms import LycorisModule
from lycoris.algorithms.ranked import RankedModule
from lycoris.formats.keys import UP
from lycoris.nn.layers import Linear
from lycoris.nn.linear import AdaptedLinear
from lycoris.nn.module import Module
from lycoris.tensor import Tensor


def adapt(
    model: Module,
    algorithm: type[RankedModule],
    rank: int,
    alpha: float | None = None,
    *,
    name: str = "adapter",
    where: Callable[[str], bool] = lambda path: True,
    seed: int | None = None,
    **options: Any,
) -> dict[str, LycorisModule]:
    """Freeze a model and put a new adapter on every linear layer whose path ``where`` accepts, in an AdaptedLinear.

    ``alpha`` and ``options`` are those of the algorithm's ``new_linear``; the i-th layer's factors come from
    ``seed + i``. Gives the modules by their layers' paths with _ for dots, as adapter files name them; their tensors
    require gradients.
    """
    model.requires_grad_(False)
    made: dict[str, LycorisModule] = {}
    for path, layer, holder, attribute in _linears(model):
        if not where(path):
            continue
        adapted = layer if isinstance(layer, AdaptedLinear) else AdaptedLinear(layer.weight, layer.bias)
        out, columns = adapted.weight.shape
        own = None if seed is None else seed + len(made)
        settings = {"dtype": adapted.weight.kind, "device": adapted.weight.device, "seed": own} | options
        module = algorithm.new_linear(columns, out, rank, alpha, **settings)
        adapted.add(name, module)
        adapted.train(model.training)
        for factor in module.tensors().values():
            factor.requires_grad_()
        _put(holder, attribute, adapted)
        made[path.replace(".", "_")] = module
    return made


def parameters_of(adapters: dict[str, LycorisModule]) -> list[Tensor]:
    """The tensors that are trained, module by module."""
    return [factor for module in adapters.values() for factor in module.tensors().values()]


FIRST_ZERO: dict[str, tuple[str, ...]] = {
    "locon": (UP,), "loha": ("hada_w2_a",), "lokr": ("lokr_w2", "lokr_w2_b"),
}  # fmt: skip
"""Algorithm -> the factors that start at zero: B of the low-rank product B A that LoRA+ is about."""


def lora_plus(adapters: dict[str, LycorisModule], rate: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Groups for an optimiser: factors that start at zero learn ``ratio`` times as fast: LoRA+, arXiv:2402.12354.

    What other adapters train beside their factors (scalars, norms of a DoRA) learns at ``rate``.
    """
    slow: list[Tensor] = []
    fast: list[Tensor] = []
    for module in adapters.values():
        for name, factor in module.tensors().items():
            (fast if name in FIRST_ZERO[module.algorithm] else slow).append(factor)
    return [{"parameters": slow, "rate": rate}, {"parameters": fast, "rate": rate * ratio}]


def _linears(model: Module) -> list[tuple[str, Linear | AdaptedLinear, Module, str]]:
    """(path, layer, the layer that holds it, its name there) of every linear layer."""
    found = []
    for path, module in model.modules():
        if isinstance(module, Module):
            for name, child in module.children():
                if isinstance(child, Linear | AdaptedLinear):
                    found.append((f"{path}.{name}" if path else name, child, module, name))
    return found


def _put(holder: Module, name: str, layer: AdaptedLinear) -> None:
    attribute, _, number = name.partition(".")
    if number:
        parts = list(getattr(holder, attribute))
        parts[int(number)] = layer
        setattr(holder, attribute, parts)
    else:
        setattr(holder, attribute, layer)
