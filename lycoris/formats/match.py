"""Which tensors of a base an adapter's modules change.

Underscored names cannot be split into paths again, so the map is made from the base's own names. A base may hold one
component with bare names, or several, each behind its prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lycoris.errors import RefusedInput
from lycoris.formats.adapter import AdapterFile, AdapterModule
from lycoris.formats.keys import DORA
from lycoris.formats.names import COMPONENTS, diffusers_spelling, split_base_name, underscored
from lycoris.formats.shapes import HasShape, Shape, fits

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class MatchedModule:
    """A module and the base tensors it changes: its weight, and its bias where the module has a bias difference."""

    module: AdapterModule
    weight: str
    bias: str | None


@dataclass(frozen=True, slots=True)
class Matching:
    """An adapter laid over a base.

    Attributes:
        matched: In the adapter's order; no two change the same tensor.
        unmatched: Component -> modules in it that match nothing, though the base has the component.
        absent: Component -> all its modules; the base does not have it.
    """

    matched: tuple[MatchedModule, ...]
    unmatched: Mapping[str | None, tuple[str, ...]]
    absent: Mapping[str, tuple[str, ...]]


def match(adapter: AdapterFile, tensors: Mapping[str, HasShape], *, allow_unmatched: bool = False) -> Matching:
    """Find the base tensors that each module of `adapter` changes, and check that the shapes are theirs.

    Args:
        adapter: From `read_adapter`.
        tensors: The base's tensors by name.
        allow_unmatched: Leave out modules that match nothing, where otherwise they refuse the adapter.

    Raises:
        RefusedInput: no module matches; some do not and `allow_unmatched` is false; a name matches several tensors;
            two modules match one; a factor does not make the base's shape.
    """
    index = _BaseIndex.build(tensors)
    found = _settle_rivals([(module, index.find(module, adapter)) for module in adapter.modules], tensors)
    hits = [(module, layer) for module, layer in found if layer is not None]
    if not hits:
        raise RefusedInput(
            f"{adapter.path}: none of its {len(found)} modules matches the base: the adapter names "
            f"{_show([module.stem for module in adapter.modules])}, the base {_show(list(tensors))}; "
            "give the base that it was made for"
        )
    unmatched, absent = _missing(found, index)
    if unmatched and not allow_unmatched:
        missing = sum(map(len, unmatched.values()))
        parts = [f"{component or 'no component'}: {_show(stems)}" for component, stems in unmatched.items()]
        raise RefusedInput(
            f"{adapter.path}: {missing} of its {len(found)} modules match nothing in the base ({'; '.join(parts)}); "
            "give the base that it was made for, or merge the rest with --allow-unmatched"
        )
    matched = tuple(_check(adapter, module, layer, tensors) for module, layer in hits)
    _refuse_collisions(adapter, matched)
    return Matching(matched, unmatched, absent)


@dataclass(slots=True)
class _Region:
    """The layers behind one prefix of the base: by path, and by underscored path in its own and diffusers' spelling."""

    by_path: dict[str, str] = field(default_factory=dict)
    by_spelling: dict[str, list[str]] = field(default_factory=dict)

    def add(self, path: str, layer: str) -> None:
        self.by_path[path] = layer
        spelling = underscored(path)
        for name in {spelling, diffusers_spelling(spelling)}:
            self.by_spelling.setdefault(name, []).append(layer)

    def find(self, path: str) -> list[str]:
        # A path without a dot may be underscored, and then stand for others: `conv_in` for `conv.in`.
        if "." in path and path in self.by_path:
            return [self.by_path[path]]
        spelling = underscored(path)
        return self.by_spelling.get(spelling) or self.by_spelling.get(diffusers_spelling(spelling), [])


@dataclass(frozen=True, slots=True)
class _BaseIndex:
    """A base's layers: all by full name, and by region."""

    everything: _Region
    regions: dict[str, _Region]

    @classmethod
    def build(cls, tensors: Mapping[str, HasShape]) -> _BaseIndex:
        everything, regions = _Region(), dict[str, _Region]()
        for name in tensors:
            layer = name.removesuffix(".weight")
            # A parameter without a layer of its own goes by its full name; biases come with their weights.
            if name.endswith(".bias") or (layer == name and f"{name}.weight" in tensors):
                continue
            prefix, path = split_base_name(layer)
            everything.add(layer, layer)
            regions.setdefault(prefix, _Region()).add(path, layer)
        return cls(everything, regions)

    def has(self, component: str | None) -> bool:
        """Whether the base has the component; modules without one belong to whatever the base is."""
        return component is None or any(prefix in self.regions for prefix in COMPONENTS[component])

    def find(self, module: AdapterModule, adapter: AdapterFile) -> str | None:
        """The layer that `module` changes, or None."""
        bare = self.regions.get("")
        if module.component is None:
            groups = [[self.everything], list(self.regions.values())]
        else:
            own = [self.regions[prefix] for prefix in COMPONENTS[module.component] if prefix in self.regions]
            groups = [own, [bare] if bare else []]
        for group in groups:
            layers = sorted({layer for region in group for layer in region.find(module.path)})
            if len(layers) > 1:
                raise RefusedInput(
                    f"{adapter.path}: module {module.stem!r} can be {_show(layers)} of the base; "
                    "give a base with one of them"
                )
            if layers:
                return layers[0]
        return None


def _settle_rivals(
    found: Sequence[tuple[AdapterModule, str | None]], tensors: Mapping[str, HasShape]
) -> list[tuple[AdapterModule, str | None]]:
    """Give layers that modules of several components claim to the components whose shapes fit.

    SDXL's two text encoders have the same layer names: over one of them, bare, the other's modules match as well.
    """
    claims: dict[str, set[str | None]] = {}
    for module, layer in found:
        if layer is not None:
            claims.setdefault(layer, set()).add(module.component)
    rivals = set().union(*(components for components in claims.values() if len(components) > 1))
    misfits = set()
    for module, layer in found:
        if layer is not None and module.component in rivals:
            shape = tuple(tensors[_weight_of(layer, tensors)].shape)
            if _misfit(_oriented(module, shape), shape):
                misfits.add(module.component)
    if misfits == rivals:
        return list(found)
    return [(module, None if module.component in misfits else layer) for module, layer in found]


def _missing(
    found: Sequence[tuple[AdapterModule, str | None]], index: _BaseIndex
) -> tuple[dict[str | None, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Modules that match nothing, by component: (those that should have matched, those whose component is absent)."""
    unmatched: dict[str | None, tuple[str, ...]] = {}
    absent: dict[str, tuple[str, ...]] = {}
    for component in dict.fromkeys(module.component for module, _ in found):
        layers = [layer for module, layer in found if module.component == component]
        stems = tuple(module.stem for module, layer in found if module.component == component and layer is None)
        if component is not None and not any(layers) and not index.has(component):
            absent[component] = stems
        elif stems:
            unmatched[component] = stems
    return unmatched, absent


def _check(adapter: AdapterFile, module: AdapterModule, layer: str, tensors: Mapping[str, HasShape]) -> MatchedModule:
    """The base tensors of a module, once all its factors have proved to be of their shapes."""
    where = f"{adapter.path}: module {module.stem!r}"
    weight = _weight_of(layer, tensors)
    shape = tuple(tensors[weight].shape)
    module = _oriented(module, shape)
    if fault := _misfit(module, shape):
        raise RefusedInput(
            f"{where}: {fault}, {weight} of the base has shape {list(shape)}; give the base that it was made for"
        )
    if module.bias is None:
        return MatchedModule(module, weight, None)
    bias = f"{layer}.bias"
    if bias not in tensors:
        raise RefusedInput(f"{where}: key {module.bias.name!r} changes {bias}, which the base does not have")
    if tuple(tensors[bias].shape) != (module.bias.count,):
        raise RefusedInput(
            f"{where}: key {module.bias.name!r} has shape {list(module.bias.shape)}, "
            f"{bias} of the base has shape {list(tensors[bias].shape)}"
        )
    return MatchedModule(module, weight, bias)


def _weight_of(layer: str, tensors: Mapping[str, HasShape]) -> str:
    """A layer's weight, or the parameter itself where it belongs to no layer."""
    weight = f"{layer}.weight"
    return weight if weight in tensors else layer


def _misfit(module: AdapterModule, shape: Shape) -> str | None:
    """What of `module` does not make a weight of `shape`; None where all does."""
    found = module.delta_shape
    if module.algorithm == "ia3":
        axis = 1 if module.on_input else 0
        if shape[axis : axis + 1] == found:
            return None
        return f"its weight scales {found[0]} {'inputs' if axis else 'outputs'}"
    right = found == shape[::-1] if module.transposed else fits(found, shape)
    if not right:
        return f"its {module.algorithm} factors make {list(found)}{' transposed' if module.transposed else ''}"
    if module.dora is not None:
        axis = 0 if module.dora == "row" else 1
        magnitude = module.factors[DORA]
        if shape[axis : axis + 1] != (magnitude.count,):
            return (
                f"its dora_scale of shape {list(magnitude.shape)} holds the norms of {magnitude.count} {module.dora}s"
            )
    return None


def _oriented(module: AdapterModule, shape: Shape) -> AdapterModule:
    """fan_in_fan_out holds for a model's Conv1D layers only: a linear layer beside them shows by its shape."""
    found = module.delta_shape
    if module.transposed and shape == found != shape[::-1]:
        return replace(module, transposed=False)
    return module


def _refuse_collisions(adapter: AdapterFile, matched: Sequence[MatchedModule]) -> None:
    first: dict[str, str] = {}
    for row in matched:
        for name in filter(None, (row.weight, row.bias)):
            other = first.setdefault(name, row.module.stem)
            if other != row.module.stem:
                raise RefusedInput(
                    f"{adapter.path}: modules {other!r} and {row.module.stem!r} both change {name} of the base; "
                    "wanted one"
                )


def _show(names: Sequence[str]) -> str:
    """The first few of `names`."""
    more = ", ..." if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "nothing"
