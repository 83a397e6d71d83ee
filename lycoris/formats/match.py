"""Which tensors of a base an adapter's modules change.

Underscored names cannot be split into paths again, so the map is made from the base's own names. A base may hold one
component with bare names, or several, each behind its prefix. A module may change some rows of a fused weight, or the
rows of several weights that its family of checkpoints stores as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lycoris.errors import RefusedInput
from lycoris.formats.adapter import AdapterFile, AdapterModule
from lycoris.formats.aliases import Spot
from lycoris.formats.base_index import BaseIndex, Place, bias_of, bias_place, show, weight_place
from lycoris.formats.keys import DORA
from lycoris.formats.shapes import HasShape, Shape, fits


@dataclass(frozen=True, slots=True)
class MatchedModule:
    """A module and what it changes of the base: a weight, and a bias where the module has a bias difference."""

    module: AdapterModule
    weight: Place
    bias: Place | None


@dataclass(frozen=True, slots=True)
class Matching:
    """An adapter laid over a base.

    Attributes:
        matched: In the adapter's order; no two change the same rows of a tensor.
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
    index = BaseIndex.build(tensors)
    spots = [
        (module, index.find(module.path, module.component, f"{adapter.path}: module {module.stem!r}"))
        for module in adapter.modules
    ]
    found = _settle_rivals(spots, tensors)
    hits = [(module, spot) for module, spot in found if spot is not None]
    if not hits:
        raise RefusedInput(
            f"{adapter.path}: none of its {len(found)} modules matches the base: the adapter names "
            f"{show([module.stem for module in adapter.modules])}, the base {show(list(tensors))}; "
            "give the base that it was made for"
        )
    unmatched, absent = _missing(found, index)
    if unmatched and not allow_unmatched:
        missing = sum(map(len, unmatched.values()))
        parts = [f"{component or 'no component'}: {show(stems)}" for component, stems in unmatched.items()]
        raise RefusedInput(
            f"{adapter.path}: {missing} of its {len(found)} modules match nothing in the base ({'; '.join(parts)}); "
            "give the base that it was made for, or merge the rest with --allow-unmatched"
        )
    matched = tuple(_check(adapter, module, spot, tensors) for module, spot in hits)
    _refuse_collisions(adapter, matched)
    return Matching(matched, unmatched, absent)


def _settle_rivals(
    found: Sequence[tuple[AdapterModule, Spot | None]], tensors: Mapping[str, HasShape]
) -> list[tuple[AdapterModule, Spot | None]]:
    """Give layers that modules of several components claim to the components whose shapes fit.

    SDXL's two text encoders have the same layer names: over one of them, bare, the other's modules match as well.
    """
    claims: dict[Spot, set[str | None]] = {}
    for module, spot in found:
        if spot is not None:
            claims.setdefault(spot, set()).add(module.component)
    rivals = set().union(*(components for components in claims.values() if len(components) > 1))
    misfits = set()
    for module, spot in found:
        if spot is not None and module.component in rivals:
            shape = weight_place(spot, tensors).shape
            if _misfit(_oriented(module, spot, shape), shape):
                misfits.add(module.component)
    if misfits == rivals:
        return list(found)
    return [(module, None if module.component in misfits else spot) for module, spot in found]


def _missing(
    found: Sequence[tuple[AdapterModule, Spot | None]], index: BaseIndex
) -> tuple[dict[str | None, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Modules that match nothing, by component: (those that should have matched, those whose component is absent)."""
    unmatched: dict[str | None, tuple[str, ...]] = {}
    absent: dict[str, tuple[str, ...]] = {}
    for component in dict.fromkeys(module.component for module, _ in found):
        own = [(module, spot) for module, spot in found if module.component == component]
        stems = tuple(module.stem for module, spot in own if spot is None)
        if component is not None and len(stems) == len(own) and not index.has(component):
            absent[component] = stems
        elif stems:
            unmatched[component] = stems
    return unmatched, absent


def _check(adapter: AdapterFile, module: AdapterModule, spot: Spot, tensors: Mapping[str, HasShape]) -> MatchedModule:
    """What of the base a module changes, once all its factors have proved to be of the right shapes."""
    where = f"{adapter.path}: module {module.stem!r}"
    place = weight_place(spot, tensors)
    module = _oriented(module, spot, place.shape)
    if fault := _misfit(module, place.shape):
        raise RefusedInput(
            f"{where}: {fault}, {place.name} of the base has shape {list(place.shape)}; "
            "give the base that it was made for"
        )
    if module.bias is None:
        return MatchedModule(module, place, None)
    names = " and ".join(dict.fromkeys(bias_of(share.layer) for share in spot.shares))
    bias = bias_place(spot, tensors)
    if bias is None:
        raise RefusedInput(
            f"{where}: key {module.bias.name!r} changes {names}, which the base does not have; "
            "give the base that it was made for"
        )
    if bias.shape != (module.bias.count,):
        raise RefusedInput(
            f"{where}: key {module.bias.name!r} has shape {list(module.bias.shape)}, {bias.name} of the base "
            f"has shape {list(bias.shape)}; give the base that it was made for"
        )
    return MatchedModule(module, place, bias)


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


def _oriented(module: AdapterModule, spot: Spot, shape: Shape) -> AdapterModule:
    """The module as it lies over a weight of `shape`.

    fan_in_fan_out holds for a model's Conv1D layers only: a linear layer beside them shows by its shape.
    """
    if spot.transposed:
        return replace(module, transposed=not module.transposed)
    found = module.delta_shape
    if module.transposed and shape == found != shape[::-1]:
        return replace(module, transposed=False)
    return module


def _refuse_collisions(adapter: AdapterFile, matched: Sequence[MatchedModule]) -> None:
    claimed: dict[str, list[tuple[int, int, str]]] = {}
    for row in matched:
        for place in filter(None, (row.weight, row.bias)):
            for run in place.runs:
                claimed.setdefault(run.tensor, []).append((run.first, run.first + run.count, row.module.stem))
    for name, runs in claimed.items():
        for (_, end, one), (first, _, other) in pairwise(sorted(runs)):
            if first < end:
                raise RefusedInput(
                    f"{adapter.path}: modules {one!r} and {other!r} both change {name} of the base, wanted one; "
                    "remove the other from the file"
                )
