"""The operator ``mmvssm::bias_activation``: schema, fake, autograd, FLOPs."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import computing_dtype
from ..flops import flop_formula
from ..registration import custom_op
from .reference import bias_activation_reference


@custom_op("bias_activation")
def bias_activation_op(
    x: Tensor, bias: Tensor, activation: str | None, residual: Tensor | None, backend: str
) -> Tensor:
    """(..., D), contiguous, in the dtype of ``x``; arguments are checked by the caller."""
    arguments = (x, bias, activation, residual)

    def triton_call():
        from .triton_fwd import bias_activation_forward

        return bias_activation_forward(*arguments)

    def torch_call():
        return x.new_empty(x.shape).copy_(bias_activation_reference(*arguments))

    wide = residual is not None and residual.dtype == torch.float64
    obstacle = dispatch.FLOAT32_ONLY if wide else None
    return dispatch.run("bias_activation", backend, x, triton_call, torch_call, obstacle=obstacle, max_batch=None)


@bias_activation_op.register_fake
def _(x, bias, activation, residual, backend):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    x, bias, ctx.activation, residual, _ = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, bias)


def _backward(ctx, dy):
    x, bias = ctx.saved_tensors
    dtype = computing_dtype(x)
    gradient = dy.to(dtype)
    if ctx.activation is not None:
        before = x.to(dtype) + bias.to(dtype)
        if ctx.activation == "relu":
            gradient = gradient * (before > 0)
        else:
            gradient = torch.ops.aten.gelu_backward(gradient, before, approximate="tanh")
    dbias = gradient.flatten(0, -2).sum(0).to(bias.dtype) if x.dim() > 1 else gradient.to(bias.dtype)
    dresidual = None if ctx.residual_dtype is None else dy.to(ctx.residual_dtype)
    return gradient.to(x.dtype), dbias, None, dresidual, None


bias_activation_op.register_autograd(_backward, setup_context=_setup_context)


@flop_formula("bias_activation")
def _flops(*shapes, out_shape=None, **kwargs) -> int:
    """None, as torch's FLOP counter counts for biases and activations."""
    return 0
