"""SGD, Adam and AdamW: one launch a step for all tensors of a kind; fp32 copies and moments over bf16 parameters.

groups = [{"parameters": downs}, {"parameters": ups, "rate": 16e-3}]           # LoRA+, arXiv:2402.12354
optimizer = AdamW(groups, rate=1e-3, decay=0.01, schedule=warmup(cosine(1000), 50))
loss.backward()
optimizer.step(scale=clip_by_norm(optimizer.parameters, 1.0))
optimizer.zero_grad()
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import safetensors.numpy

from lycoris.algorithms.files import write_safetensors
from lycoris.errors import RefusedInput
from lycoris.optim.schedules import Schedule, constant
from lycoris.optim.tables import Tables, flat
from lycoris.replay import only_recorded
from lycoris.tensor.creation import Generator, from_numpy
from lycoris.tensor.launch import F32, converted, filled, run, same_device, zeros
from lycoris.tensor.tensor import Layout, Tensor, changed, layout_of
from lycoris.tensor.uploaded import Uploaded
from plans.core import ElementKind, TensorRef
from plans.optimizer import (
    GRADIENT_COLUMN,
    Member,
    Numbers,
    Rule,
    UpdateArgs,
    UpdateDescriptor,
    UpdatePlan,
    block_table,
)


@dataclass(frozen=True)
class Options:
    """Numbers of a group of parameters.

    ``rate`` is the learning rate, multiplied by the schedule's factor; ``decay`` the weight decay. SGD reads
    ``momentum`` and ``nesterov``, Adam and AdamW ``betas`` and ``eps``.
    """

    rate: float = 1e-3
    decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 <= self.rate < float("inf") or self.decay < 0 or self.eps < 0:
            raise RefusedInput(f"optimizer: {self}, wanted rate, decay and eps of 0 or more; give others")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            raise RefusedInput(
                f"optimizer: {self}, wanted betas and momentum of 0 up to, not including, 1; give others"
            )

    def numbers(self, rule: Rule, factor: float, step: int) -> Numbers:
        """What the kernel reads at a step, from 1."""
        if rule is Rule.SGD:
            return Numbers(self.rate * factor, self.momentum, decay=self.decay, nesterov=float(self.nesterov))
        first, second = self.betas
        corrections = 1 / (1 - first**step), (1 - second**step) ** -0.5
        return Numbers(self.rate * factor, first, second, self.eps, self.decay, *corrections)


@dataclass
class _State:
    """What is kept of a parameter: moments and, for bf16 and fp16 that are not rounded stochastically, an fp32 copy."""

    parameter: Tensor
    group: int
    first: Tensor
    second: Tensor | None
    master: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """The state by name."""
        named = {"first": self.first, "second": self.second, "master": self.master}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def member(self) -> Member:
        """The tensors as the plan takes them."""
        second, master = (None if x is None else flat(x).mut() for x in (self.second, self.master))
        gradient = flat(self.parameter.grad).ref()
        return Member(flat(self.parameter).mut(), gradient, flat(self.first).mut(), second, master)


@dataclass
class _Launch:
    """States that one launch steps, their gradients' layouts, the plan, its tables, how many groups they are in.

    ``rows`` is the table but for gradients, ``blocks`` the other one, on the device.
    """

    states: list[_State]
    layouts: list[Layout]
    plan: UpdatePlan
    rows: np.ndarray
    blocks: TensorRef
    groups: int

    def gradient_addresses(self) -> list[int]:
        """Where the gradients lie. Raises RefusedInput for one of another shape or kind."""
        gradients = [state.parameter.grad for state in self.states]
        found = [g.storage.buffer.address + g.offset * F32.itemsize for g in gradients]
        if [g.layout for g in gradients] == self.layouts and not any([address & 15 for address in found]):
            return found
        for state in self.states:
            _make_ready(state.parameter)
        return [state.parameter.grad.address for state in self.states]


def _make_ready(parameter: Tensor) -> None:
    """Put the gradient in place where it lies otherwise than the launch takes it."""
    gradient = parameter.grad
    if gradient.shape != parameter.shape or gradient.kind is not F32:
        found = f"{gradient.kind.value} {gradient.shape}"
        raise RefusedInput(f"optimizer: a gradient of {found}, wanted f32 {parameter.shape}; let backward() make it")
    if not gradient.contiguous_ or not gradient.aligned:
        parameter.grad = converted(gradient, F32)


class _StepNumbers:
    """What changes from step to step, in device memory: each group's numbers; seed and step, for random rounding."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups, self._origin = Uploaded(optimizer.device), Uploaded(optimizer.device)

    @property
    def groups(self) -> Tensor:
        """[groups, 8]; see `plans.optimizer.Numbers`."""
        return self._groups.tensor

    @property
    def origin(self) -> Tensor:
        """[seed, step]."""
        return self._origin.tensor

    def count_step(self) -> None:
        """One more step of the optimiser, and its numbers."""
        self._optimizer.steps += 1
        self.upload()

    def upload(self) -> None:
        """The present step's numbers."""
        own = self._optimizer
        factor = own.schedule(max(own.steps, 1) - 1)
        self._groups.set(np.array([g.numbers(own.rule, factor, max(own.steps, 1)) for g in own.groups], np.float32))
        if own.stochastic or self.origin is None:
            self._origin.set(np.array([own.seed, own.steps], np.int64))


class Optimizer:
    """Steps of parameters along their gradients.

    ``parameters`` are leaves, or groups: mappings with ``parameters`` and those of `Options` that differ. ``options``
    are the other groups' `Options`. ``stochastic`` rounds bf16 parameters up or down at random (by ``seed``) and keeps
    no fp32 copy of them. Raises RefusedInput for a tensor that is no leaf with a gradient, not contiguous, or given
    twice.
    """

    rule: ClassVar[Rule]

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[Mapping[str, Any]],
        rate: float | None = None,
        *,
        schedule: Schedule | None = None,
        stochastic: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.schedule, self.stochastic, self.seed, self.steps = schedule or constant(), stochastic, seed, 0
        given = list(parameters)
        groups = given if given and isinstance(given[0], Mapping) else [{"parameters": given}]
        common = options if rate is None else options | {"rate": rate}
        self.groups: list[Options] = []
        self._states: list[_State] = []
        for number, group in enumerate(groups):
            own = {name: value for name, value in group.items() if name != "parameters"}
            self.groups.append(_options(common | own))
            self._states += [self._state(parameter, number) for parameter in group["parameters"]]
        if not self._states:
            raise RefusedInput("optimizer: no parameters given, wanted one or more; pass what is trained")
        if len({id(state.parameter) for state in self._states}) != len(self._states):
            raise RefusedInput("optimizer: a parameter is given twice; put it into one group")
        self.device = same_device("optimizer", self.parameters)
        self._one = filled((), 1.0, F32, self.device)
        self._tables = Tables(self.device)
        self._numbers = _StepNumbers(self)
        self._prepared: dict[tuple[bool, ...], list[_Launch]] = {}

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters, in the order in which they were given."""
        return [state.parameter for state in self._states]

    def _state(self, parameter: Tensor, group: int) -> _State:
        if not parameter.requires_grad or not parameter.is_leaf:
            raise RefusedInput("optimizer: a tensor that is no leaf with requires_grad; pass the parameters themselves")
        if not parameter.is_contiguous or not parameter.aligned:
            raise RefusedInput(
                f"optimizer: a parameter of strides {parameter.strides}, wanted it contiguous, aligned; "
                "make it by clone()"
            )
        shape, device = parameter.shape, parameter.device
        second = zeros(shape, F32, device) if self.rule.moments == 2 else None
        narrow = parameter.kind is not F32 and not (self.stochastic and parameter.kind is ElementKind.BF16)
        master = converted(parameter, F32) if narrow else None
        return _State(parameter, group, zeros(shape, F32, device), second, master)

    def zero_grad(self, keep_memory: bool = False) -> None:
        """Forget all gradients; with ``keep_memory`` they become zeros where they are."""
        for parameter in self.parameters:
            if parameter.grad is not None and keep_memory:
                parameter.grad.zero_()
            else:
                parameter.grad = None

    def step(self, scale: Tensor | None = None) -> None:
        """One step of every parameter that has a gradient, and one of the schedule.

        ``scale``, a number on the device, multiplies gradients (`lycoris.optim.clip_by_norm` makes one); where it is
        not finite, parameters and moments stay as they are, though the step counts. Gradients that
        `lycoris.graph.capture` recorded stay where they are, so a step after each replay reads the newest. A step may
        itself be recorded: each replay is one more of the schedule. Raises RefusedInput for a gradient of another shape
        or kind.
        """
        launches = self._launches(tuple([state.parameter.grad is not None for state in self._states]))
        addresses = [launch.gradient_addresses() for launch in launches]
        numbers = self._step_numbers()
        for launch, found in zip(launches, addresses, strict=True):
            self._launch(launch, found, numbers, self._one if scale is None else flat_number(scale))

    def _step_numbers(self) -> _StepNumbers:
        """The numbers of one more step, on the device; recorded work has its own, which each replay writes anew."""
        work = only_recorded()
        if work is None:
            self._numbers.count_step()
            return self._numbers
        numbers = _StepNumbers(self)
        numbers.upload()
        work.updates.append(numbers.count_step)
        return numbers

    def _launch(self, launch: _Launch, gradients: list[int], numbers: _StepNumbers, scale: Tensor) -> None:
        launch.rows[:, GRADIENT_COLUMN] = gradients
        table = self._tables.set(id(launch), launch.rows)
        # The tensors themselves are reached by the table; they are there for the simulator's checks.
        members = [state.member() for state in launch.states] if self.device.is_simulator else []
        own = numbers.groups.narrow(0, 0, launch.groups).ref(), scale.ref(), numbers.origin.ref()
        run(launch.plan, UpdateArgs(members, table.ref(), launch.blocks, *own))
        changed(*[state.parameter for state in launch.states])

    def _launches(self, having: tuple[bool, ...]) -> list[_Launch]:
        """One for all parameters of a kind that have a gradient, with and without an fp32 copy."""
        found = self._prepared.get(having)
        if found is None:
            kinds: dict[tuple[ElementKind, bool], list[_State]] = {}
            for state, has in zip(self._states, having, strict=True):
                if has:
                    kinds.setdefault((state.parameter.kind, state.master is not None), []).append(state)
            found = self._prepared[having] = [self._prepare(*key, states) for key, states in kinds.items()]
        return found

    def _prepare(self, kind: ElementKind, master: bool, states: list[_State]) -> _Launch:
        stochastic = self.stochastic and kind is ElementKind.BF16
        counts, groups = (tuple(values) for values in zip(*((s.parameter.size, s.group) for s in states), strict=True))
        descriptor = UpdateDescriptor(self.rule, kind, master, stochastic, counts, groups)
        plan = UpdatePlan.select(None, descriptor, device=self.device)
        layouts = [layout_of(state.parameter.shape, F32) for state in states]
        rows = descriptor.table([state.member() for state in states])
        blocks = Uploaded(self.device).set(block_table(counts)).ref()
        return _Launch(states, layouts, plan, rows, blocks, max(groups) + 1)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Step, moments and fp32 copies as arrays: ``steps`` and ``<number of the parameter>.<name>``."""
        arrays = {
            f"{number}.{name}": tensor.numpy()
            for number, state in enumerate(self._states)
            for name, tensor in state.tensors().items()
        }
        return {"steps": np.array(self.steps, np.int64), **arrays}

    def load_state_dict(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on where `state_dict` was taken. Raises RefusedInput where it does not fit, and changes nothing."""
        wanted = {f"{n}.{name}": t for n, state in enumerate(self._states) for name, t in state.tensors().items()}
        given = {name: array for name, array in arrays.items() if name != "steps"}
        for name in sorted(wanted.keys() ^ given.keys()):
            where = "is missing" if name in wanted else "belongs to no parameter"
            raise RefusedInput(f"optimizer state: {name} {where}; load it into the optimizer that it was saved from")
        if "steps" not in arrays:
            raise RefusedInput("optimizer state: steps is missing; load what state_dict gave")
        for name, tensor in wanted.items():
            if given[name].shape != tensor.shape or given[name].dtype != np.float32:
                found = f"{given[name].dtype} {given[name].shape}"
                raise RefusedInput(
                    f"optimizer state: {name} is {found}, wanted float32 {tensor.shape}; "
                    "load it into the optimizer that it was saved from"
                )
        for name, tensor in wanted.items():
            tensor.copy_(from_numpy(given[name], self.device))
        self.steps = int(arrays["steps"])


def _options(given: Mapping[str, Any]) -> Options:
    known = {field.name for field in fields(Options)}
    for name in given:
        if name not in known:
            raise RefusedInput(
                f"optimizer: no option {name!r}, wanted one of {', '.join(sorted(known))}; correct the name"
            )
    return Options(**given)


def flat_number(x: Tensor) -> Tensor:
    """A tensor of one element without axes."""
    if x.size != 1 or x.kind is not F32:
        raise RefusedInput(
            f"optimizer: a scale of {x.kind.value} {x.shape}, wanted one f32 number; give what clip_by_norm gives"
        )
    return x if not x.shape else x.detach().reshape(())


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, Nesterov's if wanted."""

    rule = Rule.SGD


class Adam(Optimizer):
    """Adam, arXiv:1412.6980; weight decay is added to the gradient."""

    rule = Rule.ADAM


class AdamW(Optimizer):
    """AdamW, arXiv:1711.05101; weight decay is part of the step."""

    rule = Rule.ADAMW


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
"""Name -> optimiser, for configurations."""


_STREAM = "generator."


def save_state(
    path: str | os.PathLike[str], optimizer: Optimizer, generators: Mapping[str, Generator] | None = None
) -> None:
    """Write an optimiser's state, and where generators of random numbers are, to a safetensors file.

    The file appears whole or not at all, and replaces one that is there.
    """
    streams = {
        _STREAM + name: np.array([generator.seed, generator.number], np.int64)
        for name, generator in (generators or {}).items()
    }
    metadata = {"optimizer": type(optimizer).__name__}
    write_safetensors(path, optimizer.state_dict() | streams, metadata, overwrite=True)


def load_state(
    path: str | os.PathLike[str], optimizer: Optimizer, generators: Mapping[str, Generator] | None = None
) -> None:
    """Read what `save_state` wrote; training then continues bit for bit.

    Raises RefusedInput, and changes nothing, where the file is not of these parameters and generators.
    """
    arrays = safetensors.numpy.load_file(path)
    streams = {name: arrays.pop(name) for name in list(arrays) if name.startswith(_STREAM)}
    wanted = {_STREAM + name: generator for name, generator in (generators or {}).items()}
    for name in sorted(streams.keys() ^ wanted.keys()):
        where = "is missing" if name in wanted else "is of no generator given"
        raise RefusedInput(f"{path}: {name} {where}; name the generators as they were saved")
    optimizer.load_state_dict(arrays)
    for name, generator in wanted.items():
        generator.seed, generator.number = (int(number) for number in streams[name])
