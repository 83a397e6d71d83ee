"""What every adapter module is: factors under LyCORIS' names, a scale, and the delta and merge that they make.

    W' = W + strength * scale() * scalar * delta(factors)
    W' = W + strength * (m * V / (norm(V) + 2**-23) - W), V = W + scale() * scalar * delta     with dora_scale m

Factors lie as adapter files store them, whatever the layout of base and result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np

from lycoris.algorithms.terms import linear_term
from lycoris.buffers import DeviceArray
from lycoris.errors import LycorisError, RefusedInput
from lycoris.formats.keys import DORA, algorithm_of
from lycoris.formats.shapes import Shape, delta_shape, dora_axis, fits, rank_of, squeeze
from lycoris.ops.cast import cast
from lycoris.ops.weight import delta, evaluate
from lycoris.sources import FactorSpec, SourceBinding, weight_source
from lycoris.tensor import Tensor, from_array, zeros
from plans.core import Device, ElementKind
from plans.weight import Dense, Sink, WeightDescriptor, WeightLayout


class LycorisModule:
    """An adapter of one layer, in device memory.

    ``shape`` is the layer's weight [out, in, *kernel], whatever ``layout`` it is stored in (one axis for a norm's
    weight). ``factors`` are by canonical name; ``alpha`` is divided by the rank, or by its root with ``rs_lora``.
    ``scalar`` multiplies the delta and is trained with the factors. ``dora_scale`` holds norms of output rows
    (``wd_on_out``) or of input columns. ``bias`` is added to the layer's bias. ``on_input`` is IA3's: it scales
    input columns, not output rows.

    Raises RefusedInput where the factors do not make ``shape``.
    """

    algorithm: ClassVar[str]
    scalar_factors: ClassVar[tuple[str, ...]] = ()
    """Where a trained scalar goes on saving: the first of these that a module has. None: neither scalar nor alpha."""
    bias_name: ClassVar[str] = "diff_b"

    def __init__(
        self,
        shape: Shape,
        factors: Mapping[str, DeviceArray],
        *,
        alpha: float | None = None,
        rs_lora: bool = False,
        scalar: DeviceArray | None = None,
        dora_scale: DeviceArray | None = None,
        wd_on_out: bool = True,
        bias: DeviceArray | None = None,
        on_input: bool = False,
        layout: WeightLayout = WeightLayout.CHECKPOINT,
    ) -> None:
        self.shape, self.layout, self.on_input = tuple(shape), layout, on_input
        self.alpha, self.rs_lora, self.scalar = alpha, rs_lora, scalar
        self.dora_scale, self.wd_on_out, self.bias = dora_scale, wd_on_out, bias
        self.factors, self.rank = dict(factors), rank_of(self.algorithm, factors)
        self._tensors: dict[str, Tensor] | None = None
        if self.rank == 0 and dora_scale is not None:
            raise RefusedInput(
                f"{self.algorithm}: rank 0 with a dora_scale, wanted rank 1 or more; "
                "give it a rank, or leave dora_scale out"
            )
        if self.rank != 0:
            self.factors = {name: factors[name] for name in self._bind(self.shape).factor_names}

    @property
    def device(self) -> Device:
        """Where the factors lie."""
        return next(iter(self.factors.values())).device

    @property
    def kind(self) -> ElementKind:
        """The element kind of the factors' deltas: the first factor's."""
        return next(iter(self.factors.values())).kind

    @property
    def stored_shape(self) -> Shape:
        """``shape`` as ``layout`` stores it: [*kernel, in, out] for FLAME."""
        if self.layout is WeightLayout.FLAME and len(self.shape) > 1:
            return (*self.shape[2:], self.shape[1], self.shape[0])
        return self.shape

    def scale(self) -> float:
        """The quotient alpha / rank, or alpha / sqrt(rank) with rs_lora; 0.0 at rank 0; 1.0 where nothing is factored.

        A missing alpha, or one of 0, counts as the rank.
        """
        if self.rank is None:
            return 1.0
        if self.rank == 0:
            return 0.0
        return (self.alpha or self.rank) / (math.sqrt(self.rank) if self.rs_lora else self.rank)

    def parameters(self) -> dict[str, DeviceArray]:
        """What is trained, by name, in a fixed order.

        The factors in the order of the algorithm's formula (left, right, core of each product; w1 before w2), then
        scalar, dora_scale and the bias difference, as far as the module has them.
        """
        rest = {"scalar": self.scalar, DORA: self.dora_scale, self.bias_name: self.bias}
        return {**self.factors, **{name: tensor for name, tensor in rest.items() if tensor is not None}}

    def tensors(self) -> dict[str, Tensor]:
        """`parameters` as tensors with gradients, which share their memory: always the same objects."""
        found, known = self.parameters(), self._tensors or {}
        if known.keys() != found.keys() or any(known[n].storage.buffer is not a.buffer for n, a in found.items()):
            self._tensors = {name: from_array(array) for name, array in found.items()}
        return self._tensors

    def forward(self, x: Tensor) -> Tensor:
        """The term scale() * scalar * x @ delta.T of a linear layer: x [..., in] -> [..., out], with gradients.

        LoCon and LoKr build no delta. Raises RefusedInput for a DoRA, whose change depends on the base, for (IA)^3,
        norms and convolutions, and where x has another last axis than the layer.
        """
        if self.dora_scale is not None or len(squeeze(self.shape)) > 2:
            raise RefusedInput(
                f"{self.algorithm}: a term of a DoRA or of a convolution depends on its layer; use "
                "lycoris.nn.AdaptedLinear, or merge it into the weight"
            )
        if not x.shape or x.shape[-1] != math.prod(self.shape[1:]):
            raise RefusedInput(
                f"{self.algorithm}: x has shape {x.shape}, wanted [..., {math.prod(self.shape[1:])}] for a weight "
                f"{list(self.shape)}; give the layer's own input"
            )
        tensors = self.tensors()
        scale = self.scale() if self.scalar is None else tensors["scalar"] * self.scale()
        if self.rank == 0:
            return zeros((*x.shape[:-1], self.shape[0]), x.kind, x.device)
        return linear_term(self.algorithm, tensors, x, self.shape[:2], scale)

    def weight_term(self, shape: Shape) -> tuple[SourceBinding, list[DeviceArray], float]:
        """How a weight plan takes the module over a weight of ``shape``: its source, factors in order, their scale."""
        binding = self._bind(shape)
        return binding, self._ordered(binding), self._factor()

    def get_diff_weight(self) -> DeviceArray:
        """scale() * scalar * delta, in ``layout`` and the factors' kind, rounded once; without DoRA.

        Raises LycorisError for IA3, whose delta depends on the base.
        """
        if self.rank == 0:
            return DeviceArray.zeros(self.stored_shape, self.kind, self.device)
        binding = self._bind(self.shape)
        if self.algorithm == "ia3":
            raise LycorisError("ia3: multiplies the base, so it has no weight of its own; call merge_into(base)")
        descriptor = self._descriptor(binding, Sink.DELTA, self.kind)
        return evaluate(descriptor, [self._ordered(binding)], [self._factor()]).reshape(self.stored_shape)

    def merge_into(self, base: DeviceArray, multiplier: float = 1.0) -> DeviceArray:
        """The merged weight as a new tensor of the base's shape and kind, rounded once; the base stays as it is.

        ``base`` lies as ``layout`` says; bf16, fp16 or fp32. With DoRA ``multiplier`` scales the whole change: 0 is
        the base, 1 the full result. Raises RefusedInput where the factors do not make the base's shape.
        """
        shape = self._checkpoint_shape(base.shape)
        if self.rank == 0 and not fits(self.shape, shape):
            raise RefusedInput(
                f"{self.algorithm}: the base is {list(shape)}, wanted {list(self.shape)}; give its own layer"
            )
        binding = self._bind(shape) if self.rank != 0 else None
        if binding is None or multiplier == 0:
            return cast(base, base.kind)
        sink, strength, scale = Sink.MERGE, 1.0, multiplier * self._factor()
        if self.dora_scale is not None:
            sink = Sink.DORA_ROW if self.wd_on_out else Sink.DORA_COLUMN
            strength, scale = multiplier, self._factor()
        descriptor = self._descriptor(binding, sink, base.kind)
        viewed = base.reshape(descriptor.shape)
        merged = evaluate(descriptor, [self._ordered(binding)], [scale], viewed, self.dora_scale, strength)
        return merged.reshape(base.shape)

    def merge_bias_into(self, base: DeviceArray, multiplier: float = 1.0) -> DeviceArray:
        """The layer's bias plus multiplier times the bias difference, as a new tensor.

        Raises RefusedInput where the module has none, or of another length.
        """
        if self.bias is None:
            raise RefusedInput(
                f"{self.algorithm}: has no {self.bias_name}, so it changes no bias; merge its weight alone"
            )
        if self.bias.size != base.size:
            raise RefusedInput(
                f"{self.algorithm}: {self.bias_name} has {self.bias.size} elements, the bias {base.size}; "
                "give its own layer"
            )
        descriptor = WeightDescriptor(base.size, 1, (Dense(self.bias.kind),), out=base.kind, base=base.kind)
        factors = [[self.bias.reshape((base.size, 1))]]
        return evaluate(descriptor, factors, [multiplier], base.reshape(descriptor.shape)).reshape(base.shape)

    def state_dict(self) -> dict[str, DeviceArray]:
        """The module as LyCORIS names it in files: alpha, the factors, dora_scale, the bias difference.

        The scalar is folded into a factor. alpha is what readers divide by the rank to get ``scale()``, so with
        rs_lora it is alpha * sqrt(rank). LoKr with both halves full says an alpha that readers ignore.
        """
        state = dict(self.factors)
        if self.scalar is not None:
            name = next(name for name in self.scalar_factors if name in state)
            state[name] = _scaled(state[name], _number(self.scalar))
        if self.scalar_factors:
            alpha = self.alpha or 1.0 if self.rank is None else self.scale() * self.rank
            state = {"alpha": DeviceArray.from_numpy(np.array(alpha, np.float32), device=self.device), **state}
        if self.algorithm == "ia3":
            state["on_input"] = DeviceArray.from_numpy(np.array(self.on_input, np.int64), device=self.device)
        rest = {DORA: self.dora_scale, self.bias_name: self.bias}
        return {**state, **{name: tensor for name, tensor in rest.items() if tensor is not None}}

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, DeviceArray | np.ndarray],
        shape: Shape | None = None,
        *,
        device: Device | None = None,
        layout: WeightLayout = WeightLayout.CHECKPOINT,
        name: str = "adapter",
    ) -> Self:
        """The module that a state dictionary in LyCORIS' names describes; rank and shapes come from its tensors.

        ``shape`` is the layer's weight [out, in, *kernel]; without it the factors' own delta counts, which is flat
        for the convolutions that LoHa and factored LoKr store flat. Arrays go to ``device``. ``name`` says in
        messages whose state it is.

        Raises RefusedInput where a factor is missing or does not fit, naming it.
        """
        found = algorithm_of(state, name).name
        if found != cls.algorithm:
            raise RefusedInput(f"{name}: holds {found}, wanted {cls.algorithm}; load it with `lycoris.algorithms.load`")
        numbers = {key: _number(state[key]) for key in ("alpha", "on_input") if key in state}
        tensors = {key: _on_device(value, device) for key, value in state.items() if key not in numbers}
        on_input = bool(numbers.get("on_input", 0.0))
        delta = delta_shape(cls.algorithm, tensors, name)
        if cls.algorithm == "ia3":  # its vector does not say how long the weight's other axis is
            delta = (1, *delta) if on_input else (*delta, 1)
        shape = tuple(shape or delta)
        dora_scale = tensors.pop(DORA, None)
        return cls(
            shape,
            tensors,
            alpha=numbers.get("alpha"),
            scalar=tensors.pop("scalar", None),
            dora_scale=dora_scale,
            wd_on_out=dora_scale is None or dora_axis(dora_scale.shape, shape, name) == "row",
            bias=tensors.pop(cls.bias_name, None),
            on_input=on_input,
            layout=layout,
        )

    def _bind(self, shape: Shape) -> SourceBinding:
        """The factors over a base of ``shape`` in checkpoint layout."""
        specs = {name: FactorSpec(tensor.shape, tensor.kind) for name, tensor in self.factors.items()}
        binding = weight_source(self.algorithm, specs, shape, on_input=self.on_input, name=self.algorithm)
        flat = math.prod(binding.kernel) != math.prod(shape[2:]) or len(squeeze(shape)) < len(squeeze(self.shape))
        if self.layout is WeightLayout.FLAME and flat:
            raise RefusedInput(
                f"{self.algorithm}: the base is flat, {list(reversed(shape))}, so its filter axes may lie in either "
                "order; give it as [*kernel, in, out]"
            )
        return binding

    def _descriptor(self, binding: SourceBinding, sink: Sink, kind: ElementKind) -> WeightDescriptor:
        return WeightDescriptor(
            binding.out_features,
            binding.in_features,
            (binding.source,),
            out=kind,
            base=None if sink is Sink.DELTA else kind,
            kernel=binding.kernel,
            sink=sink,
            layout=self.layout,
            magnitude=self.dora_scale.kind if sink in (Sink.DORA_ROW, Sink.DORA_COLUMN) else None,
            settled=True,
        )

    def _ordered(self, binding: SourceBinding) -> list[DeviceArray]:
        return [self.factors[name] for name in binding.factor_names]

    def _factor(self) -> float:
        """What multiplies the delta at multiplier 1."""
        return self.scale() if self.scalar is None else self.scale() * _number(self.scalar)

    def _checkpoint_shape(self, stored: Shape) -> Shape:
        if self.layout is WeightLayout.FLAME and len(stored) > 1:
            return (stored[-1], stored[-2], *stored[:-2])
        return stored


def _on_device(value: DeviceArray | np.ndarray, device: Device | None) -> DeviceArray:
    return value if isinstance(value, DeviceArray) else DeviceArray.from_numpy(value, device=device)


def _number(value: DeviceArray | np.ndarray) -> float:
    """The one element of a tensor."""
    array = value.numpy() if isinstance(value, DeviceArray) else np.asarray(value)
    return float(array.reshape(-1)[0])


def _scaled(tensor: DeviceArray, scale: float) -> DeviceArray:
    """round(scale * tensor), in its kind."""
    flat = tensor.reshape((tensor.size, 1))
    return delta(Dense(tensor.kind), (flat,), flat.shape, scale).reshape(tensor.shape)
