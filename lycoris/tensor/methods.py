"""What a tensor can do, by name: the operations as methods and operators of `Tensor`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lycoris.tensor import autograd, creation, exchange, indexing, pointwise, products, reductions, rows, views
from lycoris.tensor.tensor import Tensor

METHODS: dict[str, Callable] = {
    "backward": autograd.backward_of, "register_hook": autograd.register_hook,
    "to": pointwise.to, "clone": pointwise.clone, "contiguous": pointwise.contiguous,
    "full_like": pointwise.full_like, "clamp": pointwise.clamp, "leaky_relu": pointwise.leaky_relu,
    "where": lambda x, condition, other: pointwise.where(condition, x, other),
    "sum": reductions.sum, "mean": reductions.mean, "max": reductions.max, "min": reductions.min, "var": reductions.var,
    "sum_all": reductions.sum, "mean_all": reductions.mean, "max_all": reductions.max, "min_all": reductions.min,
    "reshape": views.reshape, "view": views.view, "permute": views.permute, "transpose": views.transpose, "t": views.t,
    "expand": views.expand, "unsqueeze": views.unsqueeze, "squeeze": views.squeeze, "narrow": views.narrow,
    "split": views.split, "pad": views.pad, "flip": views.flip, "triu": views.triu, "__getitem__": views.getitem,
    "index_select": indexing.index_select, "gather": indexing.gather,
    "softmax": rows.softmax, "log_softmax": rows.log_softmax, "dropout": creation.dropout,
    "matmul": products.matmul, "bmm": products.bmm, "__matmul__": products.matmul,
    "__dlpack__": exchange.dlpack, "__dlpack_device__": exchange.dlpack_device,
}  # fmt: skip

_OPERATORS = {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow",
    "gt": "gt", "ge": "ge", "lt": "lt", "le": "le",
}  # fmt: skip
_REFLECTED = ("add", "sub", "mul", "truediv", "pow")
_IN_PLACE = ("add", "sub", "mul", "div", "maximum", "minimum", "clamp", "copy")


def _of(table: Callable, name: str) -> Callable:
    method = functools.partialmethod(_call, table, name)
    return method


def _call(x: Tensor, table: Callable, name: str, *operands: Any) -> Tensor:
    return table(name, x, *operands)


def _reflected(x: Tensor, table: Callable, name: str, other: Any) -> Tensor:
    return table(name, other, x)


def install() -> None:
    """Make the tables' rows methods of `Tensor`."""
    for name, function in METHODS.items():
        setattr(Tensor, name, function)
    for name in pointwise.UNARY:
        setattr(Tensor, name, _of(pointwise.unary, name))
    for name in pointwise.BINARY:
        setattr(Tensor, name, _of(pointwise.binary, name))
        setattr(Tensor, f"{name}_scalar", _of(pointwise.binary, name))
    for operator, name in _OPERATORS.items():
        setattr(Tensor, f"__{operator}__", _of(pointwise.binary, name))
    for operator in _REFLECTED:
        setattr(Tensor, f"__r{operator}__", functools.partialmethod(_reflected, pointwise.binary, _OPERATORS[operator]))
    for name in _IN_PLACE:
        setattr(Tensor, f"{name}_", _of(pointwise.in_place, name))
    Tensor.add = pointwise.sum_of
    Tensor.zero_ = lambda x: pointwise.in_place("copy", x, 0.0)
    Tensor.fill_ = lambda x, value: pointwise.in_place("copy", x, value)
    Tensor.__neg__ = _of(pointwise.unary, "neg")
    Tensor.__abs__ = _of(pointwise.unary, "abs")
    Tensor.__cuda_array_interface__ = property(exchange.cuda_array_interface)
