"""The operators ``mmvssm::add_norm`` and ``mmvssm::add_norm_backward``: schema, fake, autograd, FLOPs."""

import torch
from torch import Tensor

from .. import dispatch
from ..flops import flop_formula
from ..registration import custom_op
from . import torch_norm

# The kernels keep a row in registers.
MAX_KERNEL_CHANNELS = 8192


def is_norm_alone(x: Tensor, residual: Tensor | None, scale: Tensor | None, residual_dtype: torch.dtype) -> bool:
    """Whether the residual stream would be a copy of ``x``: then the operator leaves it out."""
    return residual is None and scale is None and residual_dtype == x.dtype


def _obstacle(weight: Tensor, *dtypes: torch.dtype | None) -> str | None:
    """Why the kernels cannot serve rows of this size and residual streams of these dtypes; None if they can."""
    if weight.shape[0] > MAX_KERNEL_CHANNELS:
        return f"the kernels take rows of at most {MAX_KERNEL_CHANNELS} channels, not {weight.shape[0]}"
    return dispatch.FLOAT32_ONLY if torch.float64 in dtypes else None


@custom_op("add_norm")
def add_norm_op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm: str,
    scale: Tensor | None,
    residual_dtype: torch.dtype,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Normalised rows and residual stream (B, ..., D), contiguous; the stream is empty where it would be ``x`` itself.

    Arguments are checked by the caller.
    """
    keep = None if is_norm_alone(x, residual, scale, residual_dtype) else residual_dtype
    arguments = (x, residual, weight, bias, eps, norm, scale, keep, out_dtype)

    def triton_call():
        from .triton_fwd import add_norm_forward

        return add_norm_forward(*arguments)

    def torch_call():
        return torch_norm.add_norm_forward(*arguments)

    obstacle = _obstacle(weight, residual_dtype, out_dtype, None if residual is None else residual.dtype)
    return dispatch.run("add_norm", backend, x, triton_call, torch_call, obstacle=obstacle, max_batch=None)


@add_norm_op.register_fake
def _(x, residual, weight, bias, eps, norm, scale, residual_dtype, out_dtype, backend):
    alone = is_norm_alone(x, residual, scale, residual_dtype)
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(0 if alone else x.shape, dtype=residual_dtype)


@custom_op("add_norm_backward")
def add_norm_backward_op(
    dy: Tensor | None,
    dr: Tensor | None,
    r: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm: str,
    scale: Tensor | None,
    x_dtype: torch.dtype,
    in_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x in ``x_dtype``, of residual in ``in_dtype``, of weight and bias; empty for what was None."""
    arguments = (dy, dr, r, weight, bias, eps, norm, scale, x_dtype, in_dtype)

    def triton_call():
        from .triton_bwd import add_norm_backward

        return add_norm_backward(*arguments)

    def torch_call():
        return torch_norm.add_norm_backward(*arguments)

    obstacle = _obstacle(weight, x_dtype, in_dtype)
    return dispatch.run("add_norm", backend, r, triton_call, torch_call, obstacle=obstacle, max_batch=None)


@add_norm_backward_op.register_fake
def _(dy, dr, r, weight, bias, eps, norm, scale, x_dtype, in_dtype, backend):
    return (
        r.new_empty(r.shape, dtype=x_dtype),
        r.new_empty(0) if in_dtype is None else r.new_empty(r.shape, dtype=in_dtype),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        r.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format),
    )


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, ctx.eps, ctx.norm, scale, residual_dtype, _, ctx.backend = inputs
    ctx.x_dtype = x.dtype
    ctx.in_dtype = None if residual is None else residual.dtype
    r = x if is_norm_alone(x, residual, scale, residual_dtype) else output[1]
    ctx.save_for_backward(r, weight, bias, scale)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dr):
    r, weight, bias, scale = ctx.saved_tensors
    if dr is not None and dr.numel() < r.numel():  # of the empty stream
        dr = None
    # Without a scale the gradients of x and residual are equal: one of them is enough when their dtypes are, too.
    same = ctx.in_dtype == ctx.x_dtype and scale is None
    in_dtype = None if same else ctx.in_dtype
    dx, dresidual, dweight, dbias = torch.ops.mmvssm.add_norm_backward(
        dy, dr, r, weight, bias, ctx.eps, ctx.norm, scale, ctx.x_dtype, in_dtype, ctx.backend
    )
    if ctx.in_dtype is None:
        dresidual = None
    elif same:
        dresidual = dx
    return dx, dresidual, dweight, None if bias is None else dbias, None, None, None, None, None, None


add_norm_op.register_autograd(_backward, setup_context=_setup_context)


@flop_formula("add_norm")
def _flops(*shapes, out_shape=None, **kwargs) -> int:
    """None, as torch's FLOP counter counts for its own norms: the fused and the plain model then count the same."""
    return 0


@flop_formula("add_norm_backward")
def _backward_flops(*shapes, out_shape=None, **kwargs) -> int:
    """None, as in the forward pass."""
    return 0
