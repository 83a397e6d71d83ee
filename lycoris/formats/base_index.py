"""A base's layers by every name that adapters may have for them, and the rows of tensors that they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lycoris.errors import RefusedInput
from lycoris.formats.aliases import Spot, aliases_of, weight_of
from lycoris.formats.names import COMPONENTS, diffusers_spelling, split_base_name, underscored
from lycoris.formats.shapes import HasShape, Shape

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [first, first + count) of a tensor; a scalar has one row."""

    tensor: str
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module's output rows lie in a base: a run of rows after the other.

    Attributes:
        runs: The rows, in the order of the module's outputs.
        shape: What they are together.
    """

    runs: tuple[Rows, ...]
    shape: Shape

    @property
    def name(self) -> str:
        """The tensors' names, for messages."""
        return " and ".join(dict.fromkeys(run.tensor for run in self.runs))

    @classmethod
    def whole(cls, name: str, tensors: Mapping[str, HasShape]) -> Place:
        """All of a tensor."""
        shape = tuple(tensors[name].shape)
        return cls((Rows(name, 0, shape[0] if shape else 1),), shape)


def bias_of(layer: str) -> str:
    """A layer's bias; torch's attention layers have an `in_proj_bias` beside their `in_proj_weight`."""
    return layer.removesuffix("_weight") + "_bias" if layer.endswith("_weight") else f"{layer}.bias"


def weight_place(spot: Spot, tensors: Mapping[str, HasShape]) -> Place:
    """The rows of weights that `spot` stands for."""
    if spot == Spot.of(spot.shares[0].layer):
        return Place.whole(weight_of(spot.shares[0].layer, tensors), tensors)
    found = _place(spot, [weight_of(share.layer, tensors) for share in spot.shares], tensors)
    assert found is not None, f"{spot} does not divide its weights' rows"
    return found


def bias_place(spot: Spot, tensors: Mapping[str, HasShape]) -> Place | None:
    """The elements of biases that `spot` stands for; None where the base lacks one, or not by such shares."""
    names = [bias_of(share.layer) for share in spot.shares]
    return _place(spot, names, tensors) if all(name in tensors for name in names) else None


def _place(spot: Spot, names: Sequence[str], tensors: Mapping[str, HasShape]) -> Place | None:
    runs = []
    for share, name in zip(spot.shares, names, strict=True):
        shape = tuple(tensors[name].shape)
        rows = shape[0] if shape else 1
        if rows % share.of:
            return None
        runs.append(Rows(name, rows // share.of * share.begin, rows // share.of * (share.end - share.begin)))
    rest = tuple(tensors[names[0]].shape)[1:]
    return Place(tuple(runs), (sum(run.count for run in runs), *rest))


@dataclass(slots=True)
class Region:
    """The layers behind one prefix of a base: by path, and by underscored path in every spelling."""

    by_path: dict[str, str] = field(default_factory=dict)
    by_spelling: dict[str, list[Spot]] = field(default_factory=dict)

    def add(self, path: str, layer: str) -> None:
        """Add a layer by its own path, and by diffusers' where that is another."""
        self.by_path[path] = layer
        spelling = underscored(path)
        for name in {spelling, diffusers_spelling(spelling)}:
            self.by_spelling.setdefault(name, []).append(Spot.of(layer))

    def add_aliases(self, tensors: Mapping[str, HasShape]) -> None:
        """Add the names that other families of checkpoints have for the layers, or for rows of them."""
        for path, spot in list(aliases_of(self.by_path, tensors)):
            if self.by_path.get(path) == spot.layers:  # the same name for the transpose: adapters mean the alias
                self.by_spelling[underscored(path)] = [spot]
            elif path not in self.by_path:
                self.by_spelling.setdefault(underscored(path), []).append(spot)

    def find(self, path: str) -> list[Spot]:
        """What a module's path can mean; dots in it may be written as underscores."""
        # A path without a dot may be underscored, and then stand for others: `conv_in` for `conv.in`.
        if "." in path and path in self.by_path:
            return [Spot.of(self.by_path[path])]
        spelling = underscored(path)
        return self.by_spelling.get(spelling) or self.by_spelling.get(diffusers_spelling(spelling), [])


@dataclass(frozen=True, slots=True)
class BaseIndex:
    """A base's layers: all by full name, and by region."""

    everything: Region
    regions: dict[str, Region]

    @classmethod
    def build(cls, tensors: Mapping[str, HasShape]) -> BaseIndex:
        """Index the layers that `tensors` make."""
        everything, regions = Region(), dict[str, Region]()
        for layer in _layers(tensors):
            prefix, path = split_base_name(layer)
            everything.add(layer, layer)
            regions.setdefault(prefix, Region()).add(path, layer)
        for region in regions.values():
            region.add_aliases(tensors)
        return cls(everything, regions)

    def has(self, component: str | None) -> bool:
        """Whether the base has the component; modules without one belong to whatever the base is."""
        return component is None or any(prefix in self.regions for prefix in COMPONENTS[component])

    def find(self, path: str, component: str | None, where: str) -> Spot | None:
        """What a module changes, or None.

        Args:
            path: The module's, without its format's prefix.
            component: Part of a pipeline that it belongs to, or None.
            where: File and module, for messages.

        Raises:
            RefusedInput: it can be several layers.
        """
        bare = self.regions.get("")
        if component is None:
            groups = [[self.everything], list(self.regions.values())]
        else:
            own = [self.regions[prefix] for prefix in COMPONENTS[component] if prefix in self.regions]
            groups = [own, [bare] if bare else []]
        for group in groups:
            found = list(dict.fromkeys(spot for region in group for spot in region.find(path)))
            if len(found) > 1:
                names = show(sorted(spot.layers for spot in found))
                raise RefusedInput(f"{where} can be {names} of the base; give a base with one of them")
            if found:
                return found[0]
        return None


def _layers(tensors: Mapping[str, HasShape]) -> Iterator[str]:
    """A base's layers. A parameter without a layer of its own goes by its full name; biases come with their weights."""
    for name in tensors:
        layer = name.removesuffix(".weight")
        is_bias = name.endswith(".bias") or (name.endswith("_bias") and f"{name[:-5]}_weight" in tensors)
        if not is_bias and (layer != name or f"{name}.weight" not in tensors):
            yield layer


def show(names: Sequence[str]) -> str:
    """The first few of `names`."""
    more = ", ..." if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "nothing"
