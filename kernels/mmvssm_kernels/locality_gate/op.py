"""The operators ``mmvssm::locality_gate`` and its backward: schema, fake, autograd, FLOPs."""

import torch
from torch import Tensor

from .. import dispatch
from ..flops import flop_formula
from ..registration import custom_op
from . import torch_gate

# The kernels keep the channels of a head in registers.
MAX_KERNEL_VALUES = 2048


def _obstacle(*tensors: Tensor) -> str | None:
    """Why the kernels cannot serve these tensors; None if they can."""
    if tensors[0].shape[-1] > MAX_KERNEL_VALUES:
        return f"the kernels take heads of at most {MAX_KERNEL_VALUES} channels, not {tensors[0].shape[-1]}"
    return dispatch.FLOAT32_ONLY if torch.float64 in {t.dtype for t in tensors} else None


@custom_op("locality_gate")
def locality_gate_op(
    long: Tensor,
    x: Tensor,
    logits: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    backend: str,
) -> Tensor:
    """Mixed contexts (..., heads, V), contiguous; arguments are checked by the caller."""
    arguments = (long, x, logits, weight, bias, eps, silu)

    def triton_call():
        from .triton_fwd import locality_gate_forward

        return locality_gate_forward(*arguments)

    def torch_call():
        return torch_gate.locality_gate_forward(*arguments)

    obstacle = _obstacle(long, x, logits)
    return dispatch.run("locality_gate", backend, long, triton_call, torch_call, obstacle=obstacle, max_batch=None)


@locality_gate_op.register_fake
def _(long, x, logits, weight, bias, eps, silu, backend):
    return long.new_empty(long.shape)


@custom_op("locality_gate_backward")
def locality_gate_backward_op(
    dy: Tensor,
    long: Tensor,
    x: Tensor,
    logits: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of long, x, logits, weight and bias, contiguous; the last is empty without a bias."""
    arguments = (dy, long, x, logits, weight, bias, eps, silu)

    def triton_call():
        from .triton_bwd import locality_gate_backward

        return locality_gate_backward(*arguments)

    def torch_call():
        return torch_gate.locality_gate_backward(*arguments)

    obstacle = _obstacle(long, x, logits)
    return dispatch.run("locality_gate", backend, long, triton_call, torch_call, obstacle=obstacle, max_batch=None)


@locality_gate_backward_op.register_fake
def _(dy, long, x, logits, weight, bias, eps, silu, backend):
    dbias = long.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return *(t.new_empty(t.shape) for t in (long, x, logits, weight)), dbias


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.silu, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
    *grads, dbias = torch.ops.mmvssm.locality_gate_backward(dy, *saved, ctx.eps, ctx.silu, ctx.backend)
    return *grads, None if saved[4] is None else dbias, None, None, None


locality_gate_op.register_autograd(_backward, setup_context=_setup_context)


@flop_formula("locality_gate")
def _flops(*shapes, out_shape=None, **kwargs) -> int:
    """None, as torch's FLOP counter counts for norms and activations."""
    return 0


@flop_formula("locality_gate_backward")
def _backward_flops(*shapes, out_shape=None, **kwargs) -> int:
    """None, as in the forward pass."""
    return 0
