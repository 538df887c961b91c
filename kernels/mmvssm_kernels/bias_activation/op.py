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


@custom_op("bias_activation_backward")
def bias_activation_backward_op(
    dy: Tensor, x: Tensor, bias: Tensor, activation: str | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x, contiguous, and of bias."""

    def triton_call():
        from .triton_bwd import bias_activation_backward

        return bias_activation_backward(dy, x, bias, activation)

    def torch_call():
        dtype = computing_dtype(x)
        gradient = dy.to(dtype)
        if activation is not None:
            before = x.to(dtype) + bias.to(dtype)
            if activation == "relu":
                gradient = gradient * (before > 0)
            else:
                gradient = torch.ops.aten.gelu_backward(gradient, before, approximate="tanh")
        dbias = bias.new_empty(bias.shape).copy_(gradient.reshape(-1, x.shape[-1]).sum(0))
        return x.new_empty(x.shape).copy_(gradient), dbias

    return dispatch.run("bias_activation", backend, x, triton_call, torch_call, max_batch=None)


@bias_activation_backward_op.register_fake
def _(dy, x, bias, activation, backend):
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _setup_context(ctx, inputs, output):
    x, bias, ctx.activation, residual, ctx.backend = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, bias)


def _backward(ctx, dy):
    dx, dbias = torch.ops.mmvssm.bias_activation_backward(dy, *ctx.saved_tensors, ctx.activation, ctx.backend)
    dresidual = None if ctx.residual_dtype is None else dy.to(ctx.residual_dtype)
    return dx, dbias, None, dresidual, None


bias_activation_op.register_autograd(_backward, setup_context=_setup_context)


@flop_formula("bias_activation")
def _flops(*shapes, out_shape=None, **kwargs) -> int:
    """None, as torch's FLOP counter counts for biases and activations."""
    return 0


@flop_formula("bias_activation_backward")
def _backward_flops(*shapes, out_shape=None, **kwargs) -> int:
    """None, as in the forward pass."""
    return 0
