"""Tensors on the GPU with reverse-mode gradients, over the library's plans; small enough to read in an evening.

    from lycoris import tensor

    x = tensor.randn((64, 256), seed=1)
    w = tensor.randn((256, 256), std=0.06, seed=2, requires_grad=True)
    loss = tensor.mse_loss(tensor.linear(x, w).gelu(), x)
    loss.backward()                            # w.grad, fp32

| module | what |
|---|---|
| `tensor` | memory, shape, strides, kind |
| `launch` | plans on tensors, without gradients |
| `autograd`, `recompute` | the graph, `backward`, `grad`, `no_grad`; `checkpoint` |
| `pointwise`, `reductions`, `views`, `indexing`, `rows` | operations, each with its gradient |
| `products`, `attention`, `low_rank`, `adapted`, `decomposed`, `mixing`, `convolution`, `losses` | likewise |
| `creation`, `exchange` | constants, random numbers; NumPy, DLPack, CUDA array interface |
| `methods` | which of them are methods and operators |

Kinds are bf16, fp16 and fp32; a result has its operands' kind, or f32 where they differ. Nothing converts or copies to
the host by itself.
"""

from lycoris.tensor import methods as _methods
from lycoris.tensor.adapted import hadamard_linear
from lycoris.tensor.attention import scaled_dot_product_attention, self_attention
from lycoris.tensor.autograd import backward, enable_grad, grad, is_grad_enabled, no_grad
from lycoris.tensor.creation import (
    Generator,
    arange,
    default_generator,
    dropout,
    from_array,
    from_numpy,
    full,
    manual_seed,
    ones,
    rand,
    randn,
    zeros,
)
from lycoris.tensor.decomposed import decomposed_linear
from lycoris.tensor.exchange import from_cuda_array, from_dlpack
from lycoris.tensor.indexing import embedding, gather, index_select
from lycoris.tensor.kronecker import kronecker_linear
from lycoris.tensor.launch import empty
from lycoris.tensor.losses import (
    bce_with_logits_loss,
    cross_entropy_loss,
    huber_loss,
    l1_loss,
    linear_cross_entropy,
    mse_loss,
)
from lycoris.tensor.low_rank import low_rank_linear
from lycoris.tensor.pointwise import clamp, fma, fuse, leaky_relu, where
from lycoris.tensor.products import bmm, linear, matmul
from lycoris.tensor.recompute import checkpoint
from lycoris.tensor.rows import cross_entropy, group_norm, layer_norm, log_softmax, rms_norm, softmax
from lycoris.tensor.tensor import Tensor
from lycoris.tensor.views import cat, expand, flip, pad, permute, reshape, split, stack, transpose, triu

_methods.install()

__all__ = [
    "Generator",
    "Tensor",
    "arange",
    "backward",
    "bce_with_logits_loss",
    "bmm",
    "cat",
    "checkpoint",
    "clamp",
    "cross_entropy",
    "cross_entropy_loss",
    "decomposed_linear",
    "default_generator",
    "dropout",
    "embedding",
    "empty",
    "enable_grad",
    "expand",
    "flip",
    "fma",
    "from_array",
    "from_cuda_array",
    "from_dlpack",
    "from_numpy",
    "full",
    "fuse",
    "gather",
    "grad",
    "group_norm",
    "hadamard_linear",
    "huber_loss",
    "index_select",
    "is_grad_enabled",
    "kronecker_linear",
    "l1_loss",
    "layer_norm",
    "leaky_relu",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "low_rank_linear",
    "manual_seed",
    "matmul",
    "mse_loss",
    "no_grad",
    "ones",
    "pad",
    "permute",
    "rand",
    "randn",
    "reshape",
    "rms_norm",
    "scaled_dot_product_attention",
    "self_attention",
    "softmax",
    "split",
    "stack",
    "transpose",
    "triu",
    "where",
    "zeros",
]
