"""Tensors: creation, views that share memory, operators, exchange with other libraries, refusals."""

from __future__ import annotations

import gc

import ml_dtypes
import numpy as np
import pytest

from lycoris import tensor
from lycoris.buffers import DeviceArray
from lycoris.errors import RefusedInput
from lycoris.tensor import Tensor, exchange
from plans.core import ElementKind

BF16, F16, F32, I32, I64 = ElementKind.BF16, ElementKind.F16, ElementKind.F32, ElementKind.I32, ElementKind.I64


def of(*shape, kind=F32):
    """0, 1, 2, ... under a shape."""
    return tensor.arange(int(np.prod(shape)), kind=kind).reshape(*shape)


def test_creation():
    assert tensor.zeros((2, 3)).numpy().tolist() == [[0, 0, 0], [0, 0, 0]]
    assert tensor.ones((2,), BF16).numpy().dtype == ml_dtypes.bfloat16
    assert tensor.full((2,), -1.5, F16).numpy().tolist() == [-1.5, -1.5]
    assert tensor.full((2,), 7, I64).numpy().tolist() == [7, 7]
    assert tensor.arange(1, 2, 0.25).numpy().tolist() == [1, 1.25, 1.5, 1.75]
    assert tensor.arange(3, kind=I32).numpy().dtype == np.int32
    assert tensor.empty((0, 4)).numpy().shape == (0, 4)
    assert tensor.full((), 2.5).item() == 2.5
    assert float(tensor.full((1, 1), 2.5)) == 2.5
    assert len(tensor.zeros((3, 2))) == 3
    assert bool(tensor.ones(()))
    with pytest.raises(RefusedInput, match=r"shape \(-1,\), wanted no negative extent"):
        tensor.zeros((-1,))


def test_random_numbers_repeat_by_seed_and_by_generator():
    first, again, other = (tensor.randn((5, 3), seed=s).numpy() for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    tensor.manual_seed(3)
    drawn = [tensor.rand((4,), 2.0, 3.0).numpy() for _ in range(2)]
    assert (drawn[0] != drawn[1]).any()
    assert all(((d >= 2) & (d < 3)).all() for d in drawn)
    generator = tensor.Generator(3)
    np.testing.assert_array_equal(tensor.rand((4,), 2.0, 3.0, generator=generator).numpy(), drawn[0])
    assert generator.number == 1
    assert tensor.default_generator().number == 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.int64])
def test_numpy_there_and_back(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    found = tensor.from_numpy(array).numpy()
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(np.float64), array.astype(np.float64))
    np.testing.assert_array_equal(tensor.from_numpy(array.T).numpy().astype(np.float64), array.T.astype(np.float64))


def test_numpy_arrays_of_other_types():
    with pytest.raises(RefusedInput, match="an array of float64; say the kind"):
        tensor.from_numpy(np.zeros(2))
    with pytest.raises(RefusedInput, match="an array of uint8 has no place on the device"):
        tensor.from_numpy(np.zeros(2, np.uint8))
    assert tensor.from_numpy(np.array([1 / 3]), kind=BF16).numpy() == ml_dtypes.bfloat16(1 / 3)


def test_views_share_memory():
    x = of(3, 4)
    views = [x[1], x[:, 1::2], x.t(), x.reshape(2, 6), x.unsqueeze(0), x.expand(2, 3, 4), x.split(2)[0], x.detach()]
    assert {view.storage for view in views} == {x.storage}
    x[1].fill_(-1)
    x[:, 0].mul_(10)
    np.testing.assert_array_equal(x.numpy(), [[0, 1, 2, 3], [-10, -1, -1, -1], [80, 9, 10, 11]])
    assert x.t().is_contiguous is False
    assert x.t().contiguous().storage is not x.storage
    assert x.contiguous() is x


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        slice(1, 3),
        slice(None, None, 2),
        slice(5, 2),
        (..., 1),
        (slice(None), None, 2),
        (None, ..., None),
        (1, 2, 3),
        ...,
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [F32, BF16, I64], ids=lambda k: k.value)
def test_indexing_is_numpy_s(index, kind):
    x = of(3, 4, 5, kind=kind)
    np.testing.assert_array_equal(x[index].numpy().astype(np.float64), x.numpy().astype(np.float64)[index])


@pytest.mark.parametrize("shape", [(16, 33), (40, 21), (2, 17, 35), (15, 40)], ids=str)
@pytest.mark.parametrize("kind", [F32, BF16, F16], ids=lambda k: k.value)
def test_large_transposes(rng, shape, kind):
    x = tensor.from_numpy(rng.standard_normal(shape), kind=kind)
    turned = x.transpose()
    found = turned.contiguous()
    assert found.is_contiguous
    np.testing.assert_array_equal(found.numpy().astype(np.float64), x.numpy().astype(np.float64).swapaxes(-1, -2))
    part = x[..., 1:, :].transpose().contiguous()  # matrices with a gap between them, or not at the start
    np.testing.assert_array_equal(
        part.numpy().astype(np.float64), x.numpy().astype(np.float64)[..., 1:, :].swapaxes(-1, -2)
    )


def test_integers_are_moved():
    x = of(2, 3, kind=I32)
    array = x.numpy()
    np.testing.assert_array_equal(tensor.cat([x, x[:, :1]], 1).numpy(), np.concatenate([array, array[:, :1]], 1))
    np.testing.assert_array_equal(x.t().contiguous().numpy(), array.T)
    np.testing.assert_array_equal(x.flip().numpy(), array[::-1, ::-1])
    np.testing.assert_array_equal(
        x.pad([(0, 1), (1, 0)], -5).numpy(), np.pad(array, ((0, 1), (1, 0)), constant_values=-5)
    )
    np.testing.assert_array_equal(x.clone().numpy(), array)


def test_operators_and_numbers():
    x, y = of(4), tensor.full((4,), 2.0)
    found = [x + y, 1 + x, x - 1, 1 - x, x * y, 3 * x, x / y, 1 / y, x**2, x**y, 2**x, -x, abs(-x)]
    a, b = x.numpy(), y.numpy()
    exact = [a + b, 1 + a, a - 1, 1 - a, a * b, 3 * a, a / b, 1 / b, a**2, a**b, 2**a, -a, a]
    for ours, theirs in zip(found, exact, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6)
    comparisons = [x > y, x >= 2, x < y, x <= 2, x.eq(y), x.ne(2)]
    for ours, theirs in zip(comparisons, [a > b, a >= 2, a < b, a <= 2, a == b, a != 2], strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)
    assert x.sub_scalar(1).numpy().tolist() == [-1, 0, 1, 2]
    assert x.mul_scalar(2).numpy().tolist() == [0, 2, 4, 6]
    assert [x.sum_all().item(), x.min_all().item(), x.max_all().item(), x.mean_all().item()] == [6, 0, 3, 1.5]
    halves = tensor.from_numpy(np.array([-1.5, -0.5, 0.5, 2.5]), kind=F32)
    assert [f.numpy().tolist() for f in (halves.floor(), halves.ceil(), halves.round(), halves.sign())] == [
        [-2, -1, 0, 2], [-1, 0, 1, 3], [-2, 0, 0, 2], [-1, -1, 1, 1],
    ]  # fmt: skip


def test_in_place():
    x = of(2, 3)
    same = x.storage
    x.add_(1).mul_(2).sub_(tensor.ones((3,))).div_(2).clamp_(1, 4).maximum_(1.5)
    assert x.storage is same
    np.testing.assert_array_equal(x.numpy(), [[1.5, 1.5, 2.5], [3.5, 4, 4]])
    x.copy_(tensor.full((1, 3), 9.0)).t()[0].zero_()
    np.testing.assert_array_equal(x.numpy(), [[0, 9, 9], [0, 9, 9]])
    with pytest.raises(
        RefusedInput, match=r"add_: an operand of shape \(4, 3\) does not broadcast to \(2, 3\)|do not broadcast"
    ):
        x.add_(tensor.ones((4, 3)))


def test_kinds_of_results():
    narrow, wide = tensor.ones((2,), BF16), tensor.ones((2,))
    assert (narrow + 1).kind is BF16
    assert (narrow * wide).kind is F32
    assert narrow.sum(kind=F32).kind is F32
    assert narrow.to(BF16) is narrow
    assert (narrow @ tensor.ones((2,), BF16)).kind is BF16
    with pytest.raises(RefusedInput, match="add: a tensor of i32, wanted bf16, f16 or f32"):
        of(2, kind=I32) + of(2, kind=I32)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (1,), (7, 1), (1, 1, 1)])
def test_edge_shapes(shape):
    x = tensor.ones(shape, requires_grad=True)
    y = (x * 2).gelu().softmax()
    y.sum().backward()
    assert x.grad.shape == shape
    assert tensor.cat([x, x]).shape == (2 * shape[0], *shape[1:])
    assert x.sum(0).shape == shape[1:]
    assert (x.reshape(1, -1) if x.size else x).storage is x.storage


def test_matrices_of_no_extent():
    assert (tensor.ones((0, 3)) @ tensor.ones((3, 2))).shape == (0, 2)
    assert (tensor.ones((2, 0)) @ tensor.ones((0, 2))).numpy().tolist() == [[0, 0], [0, 0]]
    assert tensor.ones((2, 3, 0)).bmm(tensor.ones((2, 0, 1))).numpy().tolist() == [[[0]] * 3] * 2


def test_fuse_is_one_kernel_with_options():
    scaled = tensor.fuse(lambda x, y, *, by: (x - y) * by)
    x, y = of(3), tensor.ones((3,))
    assert scaled(x, y, by=4.0).numpy().tolist() == [-4, 0, 4]


def test_device_arrays_share_memory():
    array = DeviceArray.from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3))
    x = tensor.from_array(array)
    x.add_(1)
    np.testing.assert_array_equal(array.numpy(), [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(x.array().numpy(), array.numpy())
    np.testing.assert_array_equal(x.t().array().numpy(), array.numpy().T)


class Lender:
    """An object with DLPack's two methods over another's memory; counts how often its capsule was asked for."""

    def __init__(self, owner):
        self.owner = owner

    def __dlpack__(self, **options):
        return self.owner.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.owner.__dlpack_device__()


def test_dlpack_shares_memory_with_another_tensor():
    x = of(3, 4, kind=BF16)
    y = tensor.from_dlpack(Lender(x.t()))
    assert (y.shape, y.kind, y.strides) == ((4, 3), BF16, (1, 4))
    with tensor.no_grad():
        y[0].fill_(-2)
    assert (x.numpy()[:, 0] == -2).all()
    before = len(exchange._exported)
    del y
    gc.collect()
    assert len(exchange._exported) == before - 1


def test_dlpack_copies_and_devices():
    x = of(3)
    y = tensor.from_dlpack(Lender(x))
    copied = x.__dlpack__(copy=True, dl_device=x.__dlpack_device__(), max_version=(1, 0))
    assert "dltensor" in repr(copied)
    y.fill_(7)
    assert x.numpy().tolist() == [7, 7, 7]
    with pytest.raises(BufferError, match="was asked for; copy it first"):
        x.__dlpack__(dl_device=(77, 0))


def test_a_capsule_that_nobody_takes_is_given_back():
    x = of(2)
    before = len(exchange._exported)
    capsule = x.__dlpack__()
    assert len(exchange._exported) == before + 1
    del capsule
    gc.collect()
    assert len(exchange._exported) == before


def test_dlpack_with_numpy(device):
    if not device.is_simulator:
        with pytest.raises(RefusedInput, match="memory on DLPack's device"):
            tensor.from_dlpack(np.zeros(2, np.float32))
        return
    x = of(2, 3)
    array = np.from_dlpack(x)
    x.mul_(2)
    np.testing.assert_array_equal(array, [[0, 2, 4], [6, 8, 10]])
    shared = np.arange(6, dtype=np.int32).reshape(2, 3)[:, ::2]
    y = tensor.from_dlpack(shared)
    shared[0, 0] = 77
    assert y.numpy().tolist() == [[77, 2], [3, 5]]
    with pytest.raises(RefusedInput, match="wanted none of them negative"):
        tensor.from_dlpack(shared[::-1])
    with pytest.raises(RefusedInput, match="elements of type code"):
        tensor.from_dlpack(np.zeros(2, np.uint8))


def test_cuda_array_interface(device):
    x = of(2, 3)
    if device.is_simulator:
        assert not hasattr(x, "__cuda_array_interface__")
        return
    y = tensor.from_cuda_array(x.t())
    y.add_(1)
    np.testing.assert_array_equal(x.numpy(), [[1, 2, 3], [4, 5, 6]])
    assert not hasattr(x.to(BF16), "__cuda_array_interface__")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda x: x + of(4), r"add: shapes \(2, 3\) and \(4,\) do not broadcast"),
        (lambda x: x.reshape(4, 2), r"holds 6 elements, \(4, 2\) was asked for"),
        (lambda x: x.t().view(6), "are not contiguous; use reshape"),
        (lambda x: x.permute(0, 0), r"axes \(0, 0\)"),
        (lambda x: x.expand(3, 3), r"expand: shapes \(2, 3\) and \(3, 3\) do not broadcast"),
        (lambda x: x.squeeze(0), "has extent 2, wanted 1"),
        (lambda x: x.unsqueeze(4), "axis 4 of 3, wanted -3 to 2"),
        (lambda x: x.narrow(1, 2, 2), "2 from 2 in steps of 1 of an axis of 3"),
        (lambda x: x[0, 0, 0], "index: 3 axes of 2"),
        (lambda x: x[2], "index: 2 of an axis of 2"),
        (lambda x: x[::-1], "a step of -1, wanted 1 or more; use flip"),
        (lambda x: x["a"], "a str, wanted int, slice, None or"),
        (lambda x: x.split([1, 3], 1), r"parts of \[1, 3\], an axis of 3"),
        (lambda x: x.split(0), "parts of 0, wanted 1 or more"),
        (lambda x: tensor.cat([]), "no tensors, wanted one or more"),
        (lambda x: tensor.cat([x, x.to(BF16)]), r"bf16 \(2, 3\) along axis 0 of f32 \(2, 3\)"),
        (lambda x: x.pad([(1, 1)]), "1 pairs of widths, wanted one for each of 2 axes"),
        (lambda x: x.pad([(-3, 0), (0, 0)]), "leave"),
        (lambda x: of(3).triu(), "wanted two axes or more"),
        (lambda x: x.sum(2), r"axes \(2,\) of 2, wanted -2 to 1"),
        (lambda x: x.sum((0, -2)), "each once"),
        (lambda x: tensor.zeros((2, 0)).max(1), "has no element along axes"),
        (lambda x: x @ x, r"matmul: \(2, 3\) @ \(2, 3\)"),
        (lambda x: x @ tensor.ones(()), "wanted an axis or more each"),
        (lambda x: x.bmm(x), "wanted \\[batch, m, k\\]"),
        (lambda x: tensor.linear(x, of(4, 2)), r"x \(2, 3\) and weight \(4, 2\), wanted"),
        (lambda x: tensor.linear(x, of(4, 3), of(3)), r"bias \(3,\), wanted \(4,\)"),
        (lambda x: tensor.low_rank_linear(x, of(4, 3), of(2, 4), of(4, 2)), r"down \(2, 4\) and up \(4, 2\), wanted"),
        (lambda x: tensor.layer_norm(x, of(3)), "weight and bias go together"),
        (lambda x: tensor.layer_norm(x, of(2), of(2)), r"layer norm: w has shape \(2,\), wanted \(3,\)"),
        (lambda x: tensor.group_norm(x, 2), r"2 groups of shape \(2, 3\)"),
        (lambda x: x.dropout(1.0), "p is 1.0, wanted 0 up to"),
        (lambda x: tensor.cross_entropy(x, of(3, kind=I32)), r"target of shape \(3,\), wanted \(2,\)"),
        (lambda x: tensor.mse_loss(x, of(3)), "wanted floats of one shape"),
        (lambda x: tensor.mse_loss(tensor.zeros((0,)), tensor.zeros((0,))), "no element, so there is no mean"),
        (lambda x: tensor.linear_cross_entropy(x, of(4, 3), of(3, kind=I32)), "linear_cross_entropy: target"),
        (lambda x: x.index_select(0, of(2)), "an index of f32, wanted i32 or i64"),
        (lambda x: x.gather(1, of(3, 2, kind=I32)), r"an index of shape \(3, 2\) along axis 1"),
        (lambda x: tensor.embedding(of(2, kind=I32), of(3)), "wanted a matrix"),
        (lambda x: x.item(), "has 6 elements, wanted one"),
        (lambda x: len(tensor.ones(())), "without axes has no length"),
        (lambda x: tensor.ones(()).softmax(), r"axes \(-1,\) of 0"),
    ],
)  # fmt: skip
def test_what_is_refused_says_what_was_found(act, message):
    with pytest.raises(RefusedInput, match=message):
        act(of(2, 3))


def test_a_tensor_says_what_it_is(device):
    assert repr(tensor.zeros((2,), BF16)) == f"Tensor(shape=(2,), kind=bf16, device={device.name!r})"
    assert "requires_grad=True" in repr(tensor.zeros((2,), requires_grad=True))
    assert isinstance(tensor.zeros((2,)) + 1, Tensor)
