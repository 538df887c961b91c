"""The operators ``mmvssm::swiglu`` and ``mmvssm::swiglu_backward``: schema, fake, autograd, FLOPs."""

import torch
from torch import Tensor

from .. import dispatch
from ..flops import flop_formula
from ..registration import custom_op
from . import torch_swiglu


@custom_op("swiglu")
def swiglu_op(x: Tensor, backend: str) -> Tensor:
    """(..., 2 H) to (..., H), contiguous; the argument is checked by the caller."""

    def triton_call():
        from .triton_fwd import swiglu_forward

        return swiglu_forward(x)

    return dispatch.run("swiglu", backend, x, triton_call, lambda: torch_swiglu.swiglu_forward(x), max_batch=None)


@swiglu_op.register_fake
def _(x, backend):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@custom_op("swiglu_backward")
def swiglu_backward_op(dy: Tensor, x: Tensor, backend: str) -> Tensor:
    """Gradient of x, contiguous."""

    def triton_call():
        from .triton_bwd import swiglu_backward

        return swiglu_backward(dy, x)

    return dispatch.run("swiglu", backend, x, triton_call, lambda: torch_swiglu.swiglu_backward(dy, x), max_batch=None)


@swiglu_backward_op.register_fake
def _(dy, x, backend):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx, dy):
    (x,) = ctx.saved_tensors
    return torch.ops.mmvssm.swiglu_backward(dy, x, ctx.backend), None


swiglu_op.register_autograd(_backward, setup_context=_setup_context)


@flop_formula("swiglu")
def _flops(*shapes, out_shape=None, **kwargs) -> int:
    """None, as torch's FLOP counter counts for its own activations."""
    return 0


@flop_formula("swiglu_backward")
def _backward_flops(*shapes, out_shape=None, **kwargs) -> int:
    """None, as in the forward pass."""
    return 0
