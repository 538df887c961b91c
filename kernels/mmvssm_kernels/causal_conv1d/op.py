"""The operators ``mmvssm::causal_conv1d`` and ``mmvssm::causal_conv1d_backward``: schema, fake, autograd, FLOPs."""

import torch
from torch import Tensor

from .. import dispatch
from ..flops import flop_formula
from ..registration import custom_op
from . import torch_conv
from .layout import empty_in_order

# The kernels keep a window of this many tokens in registers.
MAX_KERNEL_WIDTH = 4


def _obstacle(weight: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve this weight and a result, or its gradient, of this dtype; None if they can."""
    if dtype == torch.float64:
        return dispatch.FLOAT32_ONLY
    width = weight.shape[1]
    return None if width <= MAX_KERNEL_WIDTH else f"the kernels take at most {MAX_KERNEL_WIDTH} taps, not {width}"


@custom_op("causal_conv1d")
def causal_conv1d_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    reverse: bool,
    padding: str,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Output (B, D, L) in ``out_dtype`` and the memory order of ``x``; arguments are checked by the caller."""
    arguments = (x, weight, bias, activation, reverse, padding, out_dtype)

    def triton_call():
        from .triton_fwd import causal_conv1d_forward

        return causal_conv1d_forward(*arguments)

    def torch_call():
        return torch_conv.causal_conv1d_forward(*arguments)

    return dispatch.run(
        "causal_conv1d", backend, x, triton_call, torch_call, obstacle=_obstacle(weight, out_dtype), max_batch=None
    )


@causal_conv1d_op.register_fake
def _(x, weight, bias, activation, reverse, padding, out_dtype, backend):
    return empty_in_order(x, out_dtype)


@custom_op("causal_conv1d_backward")
def causal_conv1d_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    reverse: bool,
    padding: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in its memory order, of weight and of bias; empty for a bias of None."""
    arguments = (dy, x, weight, bias, activation, reverse, padding)

    def triton_call():
        from .triton_bwd import causal_conv1d_backward

        return causal_conv1d_backward(*arguments)

    def torch_call():
        return torch_conv.causal_conv1d_backward(*arguments)

    return dispatch.run(
        "causal_conv1d", backend, x, triton_call, torch_call, obstacle=_obstacle(weight, dy.dtype), max_batch=None
    )


@causal_conv1d_backward_op.register_fake
def _(dy, x, weight, bias, activation, reverse, padding, backend):
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    return empty_in_order(x), torch.empty_like(weight, memory_format=torch.contiguous_format), dbias


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, ctx.reverse, ctx.padding, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    tensors = ctx.saved_tensors
    options = (ctx.activation, ctx.reverse, ctx.padding, ctx.backend)
    dx, dweight, dbias = torch.ops.mmvssm.causal_conv1d_backward(dy, *tensors, *options)
    return dx, dweight, None if tensors[2] is None else dbias, None, None, None, None, None


causal_conv1d_op.register_autograd(_backward, setup_context=_setup_context)


@flop_formula("causal_conv1d")
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """Two per multiply-add, as torch's FLOP counter counts a depthwise convolution."""
    batch, channels, length = x_shape
    return 2 * batch * channels * length * weight_shape[1]


@flop_formula("causal_conv1d_backward")
def _backward_flops(dy_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """One convolution for the gradient of x and one for that of the weight; the recomputed one is not counted."""
    return 2 * _flops(x_shape, weight_shape)
