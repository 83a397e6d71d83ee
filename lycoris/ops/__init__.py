"""The adapters' tensor operations, each one plan: Hadamard, Kronecker and Tucker products, casts."""

from lycoris.ops.cast import cast
from lycoris.ops.hadamard import make_hadamard_weight, make_hadamard_weight_tucker
from lycoris.ops.kronecker import factorization, make_kronecker, make_kronecker_conv_kernel
from lycoris.ops.tucker import rebuild_conv_tucker, rebuild_tucker
from lycoris.ops.weight import evaluate

__all__ = [
    "cast",
    "evaluate",
    "factorization",
    "make_hadamard_weight",
    "make_hadamard_weight_tucker",
    "make_kronecker",
    "make_kronecker_conv_kernel",
    "rebuild_conv_tucker",
    "rebuild_tucker",
]
