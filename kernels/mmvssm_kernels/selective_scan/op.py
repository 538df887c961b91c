"""The operators ``mmvssm::selective_scan`` and ``mmvssm::selective_scan_backward``: schema, fake, autograd, FLOPs."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import computing_dtype
from ..flops import BACKWARD_FACTOR, flop_formula, scan_flops
from ..registration import custom_op
from .torch_scan import scan_backward, scan_forward

# Tokens between the states that the kernels keep for the backward pass, a multiple of the tokens of their tiles.
KEEP = 8


def kept_states(u: Tensor, A: Tensor, keep_states: bool) -> Tensor:
    """Uninitialised states that enter every ``KEEP``-th token but the first (B, K, N, D); empty if not to be kept."""
    borders = (u.shape[2] - 1) // KEEP if keep_states else 0
    return u.new_empty(u.shape[0], borders, *A.shape[::-1], dtype=torch.float32)


def channel_last_empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised (B, D, L) tensor whose channels are adjacent in memory."""
    batch, channels, length = like.shape
    return like.new_empty(batch, length, channels, dtype=dtype).transpose(1, 2)


def token_major_empty(like: Tensor) -> Tensor:
    """Uninitialised (B, G, N, L) tensor that lies as (B, L, G, N) in memory."""
    batch, groups, state, length = like.shape
    return like.new_empty(batch, length, groups, state).permute(0, 2, 3, 1)


def _time_first(tensor: Tensor, dtype: torch.dtype, reverse: bool) -> Tensor:
    """(B, ..., L) to contiguous (L, B, ...) in ``dtype``, in scan order."""
    tensor = tensor.movedim(-1, 0)
    return (tensor.flip(0) if reverse else tensor).to(dtype).contiguous()


def _back(tensor: Tensor, reverse: bool) -> Tensor:
    """Inverse of :func:`_time_first`, a view where possible."""
    return (tensor.flip(0) if reverse else tensor).movedim(0, -1)


def _torch_arguments(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
    dtype = computing_dtype(u)
    rows = [_time_first(t, dtype, reverse) for t in (u, delta)]
    weights = [_time_first(t, dtype, reverse) for t in (B, C)]
    vectors = [None if t is None else t.to(dtype) for t in (D, delta_bias)]
    return (*rows, A.to(dtype), *weights, *vectors, delta_softplus)


def _torch_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    y, last = scan_forward(*_torch_arguments(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse))
    y = _back(y, reverse)
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(y.dtype))
    return y, last


def _torch_backward(dout, dlast, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    arguments = _torch_arguments(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    dtype = arguments[0].dtype
    dy = dout.to(dtype)
    dz = None
    if z is not None:
        gate = torch.sigmoid(z.to(dtype))
        y = _back(scan_forward(*arguments)[0], reverse)
        dz = dy * y * gate * (1 + z.to(dtype) * (1 - gate))
        dy = dy * z.to(dtype) * gate
    grads = scan_backward(_time_first(dy, dtype, reverse), dlast, *arguments)
    return (
        channel_last_empty(u).copy_(_back(grads.u, reverse)),
        channel_last_empty(delta).copy_(_back(grads.delta, reverse)),
        grads.A.to(A.dtype),
        token_major_empty(B).copy_(_back(grads.B, reverse)),
        token_major_empty(C).copy_(_back(grads.C, reverse)),
        u.new_empty(0) if D is None else grads.D.to(D.dtype),
        u.new_empty(0) if z is None else channel_last_empty(z).copy_(dz),
        u.new_empty(0) if delta_bias is None else grads.delta_bias.to(delta_bias.dtype),
    )


@custom_op("selective_scan")
def selective_scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    keep_states: bool,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, D, L) in ``out_dtype``, channels adjacent in memory, last state (B, D, N), :func:`kept_states`.

    Arguments are checked by the caller.
    """
    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    borders = kept_states(u, A, keep_states)

    def triton_call():
        from .triton_fwd import selective_scan_forward

        return selective_scan_forward(*arguments, out_dtype, borders)

    def torch_call():
        y, last = _torch_forward(*arguments)
        return channel_last_empty(u, out_dtype).copy_(y), last

    obstacle = dispatch.FLOAT32_ONLY if out_dtype == torch.float64 else None
    return *dispatch.run("selective_scan", backend, u, triton_call, torch_call, obstacle=obstacle), borders


@selective_scan_op.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, keep_states, out_dtype, backend):
    last = u.new_empty(u.shape[0], *A.shape, dtype=computing_dtype(u))
    return channel_last_empty(u, out_dtype), last, kept_states(u, A, keep_states)


@custom_op("selective_scan_backward")
def selective_scan_backward_op(
    dout: Tensor,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    borders: Tensor,
    delta_softplus: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias; empty for what was None.

    ``borders`` are the :func:`kept_states` of the forward pass, or empty.
    """
    arguments = (dout, dlast, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)

    def triton_call():
        from .triton_bwd import selective_scan_backward

        kept = borders
        if not kept.numel() and u.shape[2] > KEEP:
            *_, kept = selective_scan_op(*arguments[2:], True, u.dtype, backend)
        return selective_scan_backward(*arguments, kept)

    return dispatch.run("selective_scan", backend, u, triton_call, lambda: _torch_backward(*arguments))


@selective_scan_backward_op.register_fake
def _(dout, dlast, u, delta, A, B, C, D, z, delta_bias, borders, delta_softplus, reverse, backend):
    def like(tensor):
        return u.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return (
        channel_last_empty(u),
        channel_last_empty(delta),
        like(A),
        token_major_empty(B),
        token_major_empty(C),
        like(D),
        u.new_empty(0) if z is None else channel_last_empty(z),
        like(delta_bias),
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.reverse, _, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlast, _):
    *tensors, borders = ctx.saved_tensors
    u = tensors[0]
    if dout is None:
        dout = torch.zeros_like(u)
    grads = torch.ops.mmvssm.selective_scan_backward(
        dout, dlast, *tensors, borders, ctx.delta_softplus, ctx.reverse, ctx.backend
    )
    return (*(None if t is None else g for g, t in zip(grads, tensors, strict=True)), *[None] * 5)


selective_scan_op.register_autograd(_backward, setup_context=_setup_context)


@flop_formula("selective_scan")
def _flops(u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    batch, channels, length = u_shape
    return scan_flops(batch, channels, length, A_shape[1])


@flop_formula("selective_scan_backward")
def _backward_flops(dout_shape, dlast_shape, u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    return BACKWARD_FACTOR * _flops(u_shape, delta_shape, A_shape)
