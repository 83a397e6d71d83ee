"""Recorded work is the eager work, bit for bit, at every replay: dropout, clipping, optimisers, accumulation."""

from __future__ import annotations

import numpy as np
import pytest

from lycoris import nn, optim, tensor
from lycoris.algorithms import FullModule, LoConModule, load, save
from lycoris.errors import RefusedInput
from lycoris.graph import capture
from lycoris.nn import conv
from lycoris.tensor import Generator
from plans.core import DeviceError, ElementKind
from plans.core.capture import current, keeping

BF16, F32 = ElementKind.BF16, ElementKind.F32
REPLAYS = 3


class Training:
    """An adapted layer with all of its dropouts but the module's, dropout before it, clipping, an optimiser."""

    def __init__(self, make_optimizer, accumulate=1, modules=None):
        self.generator = Generator(11)
        self.layer = nn.AdaptedLinear(tensor.randn((5, 8), kind=BF16, seed=1))
        self.modules = modules or self.untrained()
        self.layer.add("a", self.modules["a"], dropout=0.3)
        self.layer.add("b", self.modules["b"], rank_dropout=0.4)
        self.layer.train()
        self.parameters = [p.requires_grad_() for _, p in self.layer.parameters()]
        self.dropout = nn.Dropout(0.5, generator=self.generator)
        self.x, self.wanted = tensor.randn((6, 8), kind=BF16, seed=5), tensor.randn((6, 5), seed=6)
        self.optimizer, self.accumulate = make_optimizer(self.parameters), accumulate

    @staticmethod
    def untrained():
        """Modules without zeros, which would hide gradients."""
        modules = {"a": LoConModule.new_linear(8, 5, 3, seed=2), "b": LoConModule.new_linear(8, 5, 2, seed=3)}
        for number, module in enumerate(modules.values()):
            for name, factor in module.tensors().items():
                factor.copy_(tensor.randn(factor.shape, seed=20 + 2 * number + len(name)).to(BF16))
        return modules

    def __call__(self):
        with tensor.enable_grad():
            self.optimizer.zero_grad()
            for _ in range(self.accumulate):
                loss = tensor.mse_loss(self.layer(self.dropout(self.x)).to(F32), self.wanted)
                loss.backward()
            scale = optim.clip_by_norm(self.parameters, 0.5)
            self.optimizer.step(scale)
            return loss.detach()

    def state(self):
        """Everything that a step changes."""
        state = {name: array.tobytes() for name, array in self.optimizer.state_dict().items()}
        numbers = self.optimizer.steps, self.generator.number, tensor.default_generator().number
        return [p.numpy().tobytes() for p in self.parameters], state, numbers


OPTIMIZERS = {
    "adamw": lambda p: optim.AdamW(p, 0.05, decay=0.1, schedule=optim.warmup(optim.cosine(5), 2)),
    "sgd, stochastic": lambda p: optim.SGD(p, 0.05, momentum=0.9, stochastic=True, seed=7),
}


@pytest.fixture
def default_generator():
    return lambda: tensor.manual_seed(100)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_whole_step(default_generator, make, accumulate):
    default_generator()
    eager = Training(make, accumulate)
    losses, states = [], []
    for _ in range(1 + REPLAYS):
        losses.append(eager().item())
        states.append(eager.state())
    assert len(set(losses)) == len(losses)

    default_generator()
    recorded = Training(make, accumulate)
    graph = capture(recorded)
    assert recorded.state() == states[0]  # one step for real; recording it changes nothing
    for number in range(1, 1 + REPLAYS):
        graph.replay()
        assert graph.result.item() == losses[number]
        assert recorded.state() == states[number]


def test_eager_and_recorded_steps_take_turns(default_generator):
    default_generator()
    eager = Training(OPTIMIZERS["adamw"])
    for _ in range(4):
        eager()
    default_generator()
    turns = Training(OPTIMIZERS["adamw"])
    graph = capture(turns)
    turns()
    graph.replay()
    turns()
    assert turns.state() == eager.state()


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
def test_a_resumed_run_is_the_whole_one(default_generator, tmp_path, recorded):
    default_generator()
    whole = Training(OPTIMIZERS["adamw"])
    for _ in range(4):
        whole()
    default_generator()
    half = Training(OPTIMIZERS["adamw"])
    step = capture(half).replay if recorded else half
    for _ in range(1 if recorded else 2):
        step()
    generators = {"dropout": half.generator, "default": tensor.default_generator()}
    save(tmp_path / "adapter.safetensors", {f"lycoris_{name}": module for name, module in half.modules.items()})
    optim.save_state(tmp_path / "state.safetensors", half.optimizer, generators)
    tensor.manual_seed(999)

    loaded = load(tmp_path / "adapter.safetensors")
    resumed = Training(OPTIMIZERS["adamw"], modules={name: loaded[f"lycoris_{name}"] for name in half.modules})
    generators["dropout"] = resumed.generator
    optim.load_state(tmp_path / "state.safetensors", resumed.optimizer, generators)
    assert resumed.state() == half.state()
    step = capture(resumed).replay if recorded else resumed
    for _ in range(1 if recorded else 2):
        step()
    assert resumed.state() == whole.state()


def test_each_replay_draws_other_numbers():
    generator, x = Generator(3), tensor.ones((64,))

    def work():
        return tensor.randn((7,), generator=generator), tensor.dropout(x, 0.5, generator=generator)

    graph, found = capture(work), []
    for _ in range(2):
        graph.replay()
        found.append([part.numpy() for part in graph.result])
    again = Generator(3)
    for _ in range(3):
        wanted = tensor.randn((7,), generator=again).numpy(), tensor.dropout(x, 0.5, generator=again).numpy()
    np.testing.assert_array_equal(found[1][0], wanted[0])
    np.testing.assert_array_equal(found[1][1], wanted[1])
    assert found[0][0].tobytes() != found[1][0].tobytes()
    assert found[0][1].tobytes() != found[1][1].tobytes()
    assert generator.number == again.number == 6
    generator.seed, generator.number = 4, 1
    graph.replay()
    again = Generator(4)
    again.take()
    np.testing.assert_array_equal(graph.result[0].numpy(), tensor.randn((7,), generator=again).numpy())


def test_numbers_of_a_seed_are_the_same_at_each_replay():
    graph = capture(lambda: tensor.rand((9,), seed=5))
    for _ in range(2):
        graph.replay()
        np.testing.assert_array_equal(graph.result.numpy(), tensor.rand((9,), seed=5).numpy())


def test_gradients_accumulate_over_replays():
    x, w = tensor.randn((4, 3), seed=1), tensor.randn((2, 3), seed=2, requires_grad=True)

    def work():
        with tensor.enable_grad():
            tensor.linear(x, w).sum().backward()

    work()
    first = w.grad.numpy()
    w.grad = None
    graph = capture(work)  # called once for real
    for count in (2, 3):
        graph.replay()
        np.testing.assert_array_equal(w.grad.numpy(), np.float32(count) * first)


def test_a_merged_layer_sees_recorded_steps():
    training = Training(OPTIMIZERS["adamw"])
    graph = capture(training)
    layer = training.layer.train(False)
    before = layer(training.x).numpy()
    layer.train()
    graph.replay()
    assert layer.train(False)(training.x).numpy().tobytes() != before.tobytes()


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_what_recorded_work_merges_is_its_own(layer):
    """Eager calls between recording and replays neither use nor change it."""
    shape, x = ((4, 8), (5, 8)) if layer == "linear" else ((4, 8, 3, 3), (1, 4, 4, 8))
    x = tensor.randn(x, kind=BF16, seed=2)

    def make():
        made = (nn.AdaptedLinear if layer == "linear" else nn.AdaptedConv)(tensor.randn(shape, kind=BF16, seed=1))
        made.add("a", FullModule.new(shape, bias=True, dtype=BF16))
        return made, dict(made.parameters())["a.diff"]

    (made, factor), (other, ones) = make(), make()

    def work():
        factor.add_(tensor.ones(shape, BF16))
        return made(x)

    graph, wanted = capture(work), made(x).numpy()  # called once for real
    ones.add_(tensor.ones(shape, BF16))
    np.testing.assert_array_equal(wanted, other(x).numpy())
    for _ in range(2):
        graph.replay()
        assert graph.result.numpy().tobytes() != wanted.tobytes()
        wanted = made(x).numpy()
        np.testing.assert_array_equal(graph.result.numpy(), wanted)
    assert factor.numpy().astype(float).max() == factor.numpy().astype(float).min() == 3


def test_the_base_is_turned_once(monkeypatch):
    """A convolution's base is stored for the kernels once, however often its adapters change."""
    made = nn.AdaptedConv(tensor.randn((4, 8, 3, 3), kind=BF16, seed=1), padding=1)
    made.add("a", LoConModule.new_conv2d(8, 4, 3, 2, seed=2))
    parameters = [p.requires_grad_() for _, p in made.train().parameters()]
    optimizer, x, turned = optim.SGD(parameters, 0.1), tensor.randn((1, 4, 4, 8), kind=BF16, seed=3), []
    channels_last = conv.channels_last
    monkeypatch.setattr(conv, "channels_last", lambda w: turned.append(w.shape) or channels_last(w))
    for _ in range(3):
        made(x).sum().backward()
        optimizer.step()
    assert turned == [(4, 8, 3, 3)]


def test_a_graph_keeps_its_tables():
    """Eager calls with other tensors in between do not change what a graph reads."""
    p, other = (tensor.ones((n,), requires_grad=True) for n in (3, 3))
    p.grad, other.grad = tensor.full((3,), 2.0), tensor.full((3,), 5.0)
    graph = capture(lambda: optim.clip_by_norm([p], 1.0))
    optim.clip_by_norm([other], 1.0)
    graph.replay()
    assert graph.result.item() == pytest.approx(1 / np.sqrt(12), rel=1e-5)


@pytest.mark.parametrize(
    ("work", "action"),
    [
        (lambda x: x.sum().item(), "copying 4 bytes from it failed"),
        (lambda x: x + tensor.from_numpy(np.ones(3, np.float32)), "copying 12 bytes to it failed"),
    ],
    ids=["to the host", "from the host"],
)
def test_copies_are_refused(work, action):
    x = tensor.ones((3,))
    with pytest.raises(DeviceError, match=f"{action} .a graph is being captured.*before the capture or after a replay"):
        capture(lambda: work(x))
    assert tensor.ones((3,)).sum().item() == 3  # what comes after is not recorded


def test_noise_of_one_step_is_refused():
    p = tensor.ones((3,), requires_grad=True)
    p.grad = tensor.ones((3,))
    with pytest.raises(RefusedInput, match="add_noise: step 4 would be that of each replay; call it between replays"):
        capture(lambda: optim.add_noise([p], 0.1, seed=1, step=4))


def test_dropped_results_share_memory(device):
    x = tensor.randn((64, 48), seed=3)

    def work():
        first = held = x * 2
        for _ in range(12):
            held = held.tanh() + x
        return held - first

    wanted = work().numpy()
    graph = capture(work)
    for _ in range(REPLAYS):
        graph.replay()
        np.testing.assert_array_equal(graph.result.numpy(), wanted)
    # `first`, and at most three beside it at a time; the simulator has no memory of graphs.
    assert device.is_simulator or len(graph._captured.kept.memory) <= 5


def test_memory_that_is_given_back_is_taken_once():
    captured, memory = object(), object()
    with keeping(None, captured) as own:
        assert current.kept is own
        own.give_back(16, memory)
        assert own.again(8) is None
        assert own.again(16) is memory
        assert own.again(16) is None
    assert current.kept is None
