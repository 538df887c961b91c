"""The operators ``mmvssm::bidirectional_gla`` and its backward: schema, fake, autograd, FLOPs."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import computing_dtype
from ..flops import BACKWARD_FACTOR, flop_formula
from ..registration import custom_op
from . import torch_gla

# A program of the kernels holds a head's whole state, keys x values, in registers.
_MAX_KEYS, _MAX_VALUES = 64, 128


def _obstacle(q: Tensor, v: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve these heads and a result, or its gradient, of this dtype; None if they can."""
    if dtype == torch.float64:
        return dispatch.FLOAT32_ONLY
    if q.shape[3] <= _MAX_KEYS and v.shape[3] <= _MAX_VALUES:
        return None
    return (
        f"the kernels take heads of at most {_MAX_KEYS} keys and {_MAX_VALUES} values, "
        f"not {q.shape[3]} and {v.shape[3]}"
    )


def normed_dtype(v: Tensor) -> torch.dtype:
    """Dtype in which the normalised output is kept: at most sqrt(V), it fits float16, which is finer than bfloat16.

    Its rounding is magnified in the gradients of gates, which are differences of products with it.
    """
    return torch.float16 if v.dtype == torch.bfloat16 else v.dtype


@custom_op("bidirectional_gla")
def bidirectional_gla_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gf: Tensor,
    gb: Tensor,
    norm_weight: Tensor | None,
    scale: float,
    gate_normalizer: float | None,
    norm_eps: float,
    out_dtype: torch.dtype,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, L, heads, V); with a norm and ``keep`` what its backward pass needs, else two empty tensors.

    These are the normalised output before its weight, in :func:`normed_dtype`, and 1 / RMS (B, L, heads). The
    caller checks arguments.
    """
    arguments = (q, k, v, gf, gb, norm_weight, scale, gate_normalizer, norm_eps, out_dtype, keep)

    def triton_call():
        from .triton_fwd import bidirectional_gla_forward

        return bidirectional_gla_forward(*arguments)

    def torch_call():
        out, normed, rstd = torch_gla.bidirectional_gla_forward(*arguments)
        return out, normed.to(normed_dtype(v)), rstd

    return dispatch.run(
        "bidirectional_gla", backend, q, triton_call, torch_call, _obstacle(q, v, out_dtype), max_batch=None
    )


@bidirectional_gla_op.register_fake
def _(q, k, v, gf, gb, norm_weight, scale, gate_normalizer, norm_eps, out_dtype, keep, backend):
    out = v.new_empty(v.shape, dtype=out_dtype)
    wide = computing_dtype(q)
    if norm_weight is None or not keep:
        return out, v.new_empty(0, dtype=normed_dtype(v)), v.new_empty(0, dtype=wide)
    return out, v.new_empty(v.shape, dtype=normed_dtype(v)), v.new_empty(v.shape[:3], dtype=wide)


@custom_op("bidirectional_gla_backward")
def bidirectional_gla_backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gf: Tensor,
    gb: Tensor,
    norm_weight: Tensor | None,
    normed: Tensor,
    rstd: Tensor,
    scale: float,
    gate_normalizer: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gf, gb (contiguous) and of the norm's weight, empty without one."""
    arguments = (dout, q, k, v, gf, gb, norm_weight, normed, rstd, scale, gate_normalizer)

    def triton_call():
        from .triton_bwd import bidirectional_gla_backward

        return bidirectional_gla_backward(*arguments)

    def torch_call():
        return torch_gla.bidirectional_gla_backward(*arguments)

    return dispatch.run(
        "bidirectional_gla", backend, q, triton_call, torch_call, _obstacle(q, v, dout.dtype), max_batch=None
    )


@bidirectional_gla_backward_op.register_fake
def _(dout, q, k, v, gf, gb, norm_weight, normed, rstd, scale, gate_normalizer, backend):
    grads = tuple(t.new_empty(t.shape) for t in (q, k, v, gf, gb))
    return *grads, q.new_empty(0) if norm_weight is None else torch.empty_like(norm_weight)


def _setup_context(ctx, inputs, output):
    q, k, v, gf, gb, norm_weight, ctx.scale, ctx.gate_normalizer, _, _, keep, ctx.backend = inputs
    if norm_weight is not None and not keep:
        raise RuntimeError("mmvssm::bidirectional_gla with a norm needs keep=True to be differentiated")
    _, normed, rstd = output
    ctx.save_for_backward(q, k, v, gf, gb, norm_weight, normed, rstd)
    ctx.mark_non_differentiable(normed, rstd)
    ctx.set_materialize_grads(False)  # or autograd fills tensors of their size with zeros


def _backward(ctx, dout, *_):
    if dout is None:  # nothing depends on the output
        return (None,) * 12
    saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
    grads = torch.ops.mmvssm.bidirectional_gla_backward(dout, *saved, ctx.scale, ctx.gate_normalizer, ctx.backend)
    if saved[5] is None:
        grads = (*grads[:5], None)
    return (*grads, *(None,) * 6)


bidirectional_gla_op.register_autograd(_backward, setup_context=_setup_context)


@flop_formula("bidirectional_gla")
def _flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """As two recurrences: update and read-out of a K x V state for every token, two per multiply-add."""
    batch, length, heads, keys = q_shape
    return 2 * 2 * 2 * batch * length * heads * keys * v_shape[3]


@flop_formula("bidirectional_gla_backward")
def _backward_flops(dout_shape, *shapes, out_shape=None, **kwargs) -> int:
    return BACKWARD_FACTOR * _flops(*shapes)
