"""A layer's weight and the adapters on it: added, removed, switched and reweighted at run time.

Two ways to the same layer, with different promises:

- "merged": x W'^T with W' = round(W + sum_i s_i dW_i), kept until a strength or a factor changes. The sum keeps its
  plan's guarantee and is rounded once to W's kind: of a change below W's last bit nothing is left. `merge` makes the
  same W'. (Merges of files and of modules are settled besides: see `plans.weight`.)
- "separate": x W^T + sum_i s_i x dW_i^T, summed in fp32 before the one rounding: changes of any size take part.

The default is "separate" while training and "merged" otherwise.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

from lycoris.algorithms import LycorisModule
from lycoris.algorithms.terms import diff_weight
from lycoris.buffers import DeviceArray
from lycoris.errors import RefusedInput
from lycoris.formats.keys import UP
from lycoris.formats.shapes import Shape, fits
from lycoris.ops.weight import evaluate
from lycoris.replay import only_recorded
from lycoris.tensor import Tensor, autograd, dropout, from_array, rand
from lycoris.tensor.creation import chance
from lycoris.tensor.pointwise import apply, sum_of
from lycoris.tensor.tensor import Storage
from plans.core import ElementKind
from plans.expression import leaf
from plans.weight import Dense, Sink, WeightDescriptor, WeightLayout

MODES = ("merged", "separate")
_versions = itertools.count()


@dataclass
class Adapter:
    """An adapter on a layer: its module, its strength, and whether it takes part.

    ``dropout`` zeroes elements of its term, ``rank_dropout`` ranks of a LoCon and rows of others' deltas,
    ``module_dropout`` the whole adapter, each with that probability and while training only, as LyCORIS does
    (github.com/KohakuBlueleaf/LyCORIS, modules). Others than elements keep their size.
    """

    module: LycorisModule
    strength: float = 1.0
    enabled: bool = True
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """What multiplies the module's delta: its own scale times the strength; a trained scalar comes on top."""
        return self.module.scale() * self.strength

    @property
    def active(self) -> bool:
        """Whether it changes the layer's output."""
        return self.enabled and self.strength != 0 and self.module.rank != 0


@dataclass(frozen=True, slots=True)
class _Kept:
    """A value, the storages that it was made of, and their versions then."""

    of: list[Storage]
    versions: list[int]
    value: Any


class Adapted:
    """What adapted layers share; subclasses compute ``forward``.

    ``weight`` [out, in, *kernel] and ``bias`` [out] are tensors on one device. ``mode`` is "merged", "separate", or
    None for the default.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, mode: str | None = None) -> None:
        if (
            weight.ndim < 2
            or not weight.is_contiguous
            or weight.kind not in (ElementKind.BF16, ElementKind.F16, ElementKind.F32)
        ):
            raise RefusedInput(
                f"adapted layer: weight {weight.shape} of {weight.kind.value}, wanted a contiguous [out, in, *kernel] "
                "of bf16, f16 or f32; call contiguous() or to() first"
            )
        if bias is not None and (bias.shape != weight.shape[:1] or bias.device is not weight.device):
            raise RefusedInput(
                f"adapted layer: bias {bias.shape} on {bias.device.name}, wanted {weight.shape[:1]} on "
                f"{weight.device.name}; give the layer's own"
            )
        self.weight, self.bias, self.training = weight, bias, False
        self.mode = mode
        self._adapters: dict[str, Adapter] = {}
        self._changes = next(_versions)
        self._base: tuple[Tensor, Tensor | None] | None = None
        self._active: list[Adapter] | None = None
        self._cache: dict[str, _Kept] = {}

    @property
    def mode(self) -> str | None:
        """The chosen way; None is the default, which depends on ``training``."""
        return self._mode

    @mode.setter
    def mode(self, mode: str | None) -> None:
        if mode is not None and mode not in MODES:
            raise RefusedInput(f"adapted layer: mode {mode!r}, wanted one of {', '.join(MODES)}, or None; choose one")
        self._mode = mode

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters by name, in the order in which they were added; change them by this layer's methods."""
        return MappingProxyType(self._adapters)

    def add(self, name: str, module: LycorisModule, strength: float = 1.0, **dropouts: float) -> None:
        """Put an adapter on the layer; ``dropouts`` as in `Adapter`.

        Raises RefusedInput for a name that is taken, an adapter of another layer, device or layout, a second adapter
        beside a DoRA, a norm's, and a probability outside [0, 1).
        """
        self._refuse_merged("add")
        if name in self._adapters:
            raise RefusedInput(f"add: an adapter {name!r} is there already; remove it first, or give another name")
        self._check(name, module)
        for which, value in dropouts.items():
            if which not in ("dropout", "rank_dropout", "module_dropout") or not 0 <= value < 1:
                raise RefusedInput(
                    f"add: {which} {value}, wanted dropout, rank_dropout or module_dropout in [0, 1); correct it"
                )
        self._adapters[name] = Adapter(module, float(strength), tensors=module.tensors(), **dropouts)
        self._changed()

    def _check(self, name: str, module: LycorisModule) -> None:
        if module.algorithm == "norm" or module.layout is not WeightLayout.CHECKPOINT:
            raise RefusedInput(
                f"add: adapter {name!r} is of {module.algorithm} in layout {module.layout.value}, wanted one of a "
                "linear or convolution weight in checkpoint layout; load it anew as one"
            )
        if not fits(module.shape, self.weight.shape):
            raise RefusedInput(
                f"add: adapter {name!r} is for a weight {list(module.shape)}, the layer's is "
                f"{list(self.weight.shape)}; give the adapter of this layer"
            )
        if module.device is not self.weight.device:
            raise RefusedInput(
                f"add: adapter {name!r} is on {module.device.name}, the layer on {self.weight.device.name}; load it "
                "there"
            )
        others = [adapter.module for adapter in self._adapters.values()]
        if others and any(m.dora_scale is not None for m in (module, *others)):
            raise RefusedInput(
                f"add: adapter {name!r} beside {', '.join(map(repr, self._adapters))}: a DoRA takes the whole weight, "
                "so it is the only adapter of a layer; merge one of them first"
            )

    def remove(self, name: str) -> LycorisModule:
        """Take an adapter off the layer; gives its module."""
        self._refuse_merged("remove")
        found = self._adapters.pop(self._known(name)).module
        self._changed()
        return found

    def set_strength(self, name: str, strength: float) -> None:
        """Another strength; 0 leaves the adapter out."""
        self._refuse_merged("set_strength")
        self._adapters[self._known(name)].strength = float(strength)
        self._changed()

    def enable(self, name: str, enabled: bool = True) -> None:
        """Switch an adapter on or off."""
        self._refuse_merged("enable")
        self._adapters[self._known(name)].enabled = bool(enabled)
        self._changed()

    def _known(self, name: str) -> str:
        if name not in self._adapters:
            known = ", ".join(map(repr, self._adapters)) or "none"
            raise RefusedInput(f"no adapter {name!r} on this layer; it has {known}")
        return name

    def _refuse_merged(self, operation: str) -> None:
        if self._base is not None:
            raise RefusedInput(f"{operation}: the adapters are merged into the weight; call unmerge() first")

    def train(self, training: bool = True) -> Self:
        """Whether the layer is being trained: dropouts take part, and the default mode is "separate". Gives itself."""
        self.training = bool(training)
        return self

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(adapter.factor, tensor) for everything that is trained; the base is not."""
        for name, adapter in self._adapters.items():
            for factor, tensor in adapter.tensors.items():
                yield f"{name}.{factor}", tensor

    def merge(self) -> None:
        """Make the merged weight and bias the layer's own; `unmerge` restores them bit for bit."""
        self._refuse_merged("merge")
        merged = self.merged_weight(), self.merged_bias()
        self._base = self.weight, self.bias
        self.weight, self.bias = merged
        self._changed()

    def unmerge(self) -> None:
        """The weight and bias as they were before `merge`."""
        if self._base is None:
            raise RefusedInput("unmerge: the adapters are not merged; call merge() first")
        (self.weight, self.bias), self._base = self._base, None
        self._changed()

    def active(self) -> list[Adapter]:
        """The adapters that change the output."""
        if self._active is None:
            self._active = [] if self._base is not None else [a for a in self._adapters.values() if a.active]
        return self._active

    def merged_weight(self) -> Tensor:
        """W + the active adapters' scaled deltas, or DoRA's result, rounded once; the base where there are none."""
        return self._kept("weight", self._merge_weight)

    def merged_bias(self) -> Tensor | None:
        """The bias with the active adapters' differences, rounded once; None where there is neither."""
        differences = [a.tensors[a.module.bias_name] for a in self.active() if a.module.bias is not None]
        return self._kept("bias", self._merge_bias, differences)

    def staying(self, found: list[Adapter]) -> list[Adapter]:
        """Those that ``module_dropout`` leaves in this call, drawn from the default generator without the device.

        Raises RefusedInput in recorded work, which cannot leave out an adapter in one replay and not in the next.
        """
        dropping = [adapter for adapter in found if self.training and adapter.module_dropout]
        if not dropping:
            return found
        if only_recorded() is not None:
            raise RefusedInput("module_dropout: drawn on the host, so not in recorded work; use dropout, or no graph")
        gone = [adapter for adapter in dropping if chance() < adapter.module_dropout]
        return [adapter for adapter in found if not any(adapter is other for other in gone)]

    def live_factors(self, adapter: Adapter) -> dict[str, Tensor]:
        """The factors as this call takes them: of a LoCon with ranks dropped, which are columns of up."""
        p, factors = adapter.rank_dropout, adapter.tensors
        if not (self.training and p and adapter.module.algorithm == "locon"):
            return factors
        up = factors[UP]
        return factors | {UP: _masked(up, (1, up.shape[1], *(1 for _ in up.shape[2:])), p)}

    def without_dropped(self, term: Tensor, adapter: Adapter) -> Tensor:
        """A term [..., out] in which dropouts of elements and, but of a LoCon, of rows have zeroed their part."""
        if not self.training:
            return term
        if adapter.rank_dropout and adapter.module.algorithm != "locon":
            term = _masked(term, term.shape[-1:], adapter.rank_dropout)
        return dropout(term, adapter.dropout) if adapter.dropout else term

    def live_bias(self, found: list[Adapter]) -> Tensor | None:
        """The bias with differences of these adapters, rounded once, with gradients for those that are trained."""
        if all([a.module.bias is None for a in self._adapters.values()]):
            return None if self.bias is None else self.bias.detach()
        moved = [(a.tensors[a.module.bias_name], a.strength) for a in found if a.module.bias is not None]
        if len(found) == len(self.active()) and not autograd.wanted([difference for difference, _ in moved]):
            moved, base = [], self.merged_bias()
        else:
            base = self.bias
        scaled, f32 = leaf(0) * leaf(1), ElementKind.F32
        parts = [apply(scaled, (difference,), (strength,), f32) for difference, strength in moved]
        parts += [] if base is None else [base.detach()]
        if len(parts) < 2 and not moved:
            return parts[0] if parts else None
        total = functools.reduce(lambda a, b: sum_of(a, b, f32), parts)
        return total.to(self.weight.kind if self.bias is None else self.bias.kind)

    def decomposed(self, adapter: Adapter) -> Tensor:
        """DoRA's W + s (m V / (norm(V) + 2**-23) - W), V = W + scale dW, in fp32 with gradients; arXiv:2402.09353."""
        module, factors = adapter.module, adapter.tensors
        base = self.weight.detach().to(ElementKind.F32)
        scale = module.scale() if module.scalar is None else factors["scalar"] * module.scale()
        moved = base + diff_weight(module.algorithm, factors, self.weight.shape).to(ElementKind.F32) * scale
        axes = tuple(axis for axis in range(moved.ndim) if axis != (0 if module.wd_on_out else 1))
        norm = moved.square().sum(axes, keepdim=True).sqrt() + 2.0**-23
        magnitude = factors["dora_scale"].to(ElementKind.F32).reshape(*norm.shape)
        result = moved * (magnitude / norm)
        return result if adapter.strength == 1 else base + (result - base) * adapter.strength

    def _kept(self, what: str, make: Callable[[], Any], of: Iterable[Tensor] | None = None) -> Any:
        """A value that depends on base, adapters, strengths and tensors (all factors if none are given), made once.

        It is made again when one of them changes. What recorded work makes is its own, since only replays compute it.
        """
        found = self._cache.get(what)
        if found is not None and found.versions == [storage.version for storage in found.of]:
            return found.value
        work = only_recorded()
        cache = self._cache if work is None else work.made.setdefault(("kept", id(self), self._changes), {})
        found = cache.get(what)
        if found is None or found.versions != [storage.version for storage in found.of]:
            if of is None:
                of = [tensor for adapter in self._adapters.values() for tensor in adapter.tensors.values()]
            storages = [x.storage for x in (self.weight, self.bias, *of) if x is not None]
            # Versions before it is made: what changes meanwhile is not in it.
            found = cache[what] = _Kept(storages, [storage.version for storage in storages], make())
        return found.value

    def _changed(self) -> None:
        self._changes, self._active = next(_versions), None
        self._cache.clear()

    def _merge_weight(self) -> Tensor:
        found = self.active()
        if not found:
            return self.weight
        base = self.weight.array()
        if found[0].module.dora_scale is not None:
            return from_array(found[0].module.merge_into(base, found[0].strength))
        terms = [adapter.module.weight_term(self.weight.shape) for adapter in found]
        first = terms[0][0]
        descriptor = WeightDescriptor(
            first.out_features,
            first.in_features,
            tuple(binding.source for binding, _, _ in terms),
            out=base.kind,
            base=base.kind,
            kernel=first.kernel,
            sink=Sink.MERGE,
        )
        scales = [adapter.strength * scale for adapter, (_, _, scale) in zip(found, terms, strict=True)]
        merged = evaluate(descriptor, [factors for _, factors, _ in terms], scales, base.reshape(descriptor.shape))
        return from_array(merged.reshape(base.shape))

    def _merge_bias(self) -> Tensor | None:
        found = [adapter for adapter in self.active() if adapter.module.bias is not None]
        if not found:
            return self.bias
        kind = self.weight.kind if self.bias is None else self.bias.kind
        size = self.weight.shape[0]
        base = DeviceArray.zeros((size,), kind, self.weight.device) if self.bias is None else self.bias.array()
        sources = tuple(Dense(adapter.module.bias.kind) for adapter in found)
        descriptor = WeightDescriptor(size, 1, sources, out=kind, base=kind)
        factors = [[adapter.module.bias.reshape((size, 1))] for adapter in found]
        scales = [adapter.strength for adapter in found]
        return from_array(evaluate(descriptor, factors, scales, base.reshape(descriptor.shape)).reshape((size,)))


def _masked(x: Tensor, shape: Shape, p: float) -> Tensor:
    """The product with a mask of ``shape``, 0 with probability p, else 1, by the default generator."""
    kept = rand(shape, device=x.device) >= p
    return apply(leaf(0) * leaf(1), (x, kept), kind=x.kind)
