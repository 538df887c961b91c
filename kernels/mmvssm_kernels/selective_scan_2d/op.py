"""The operators ``mmvssm::selective_scan_2d`` and its backward: schema, fake, autograd, FLOPs."""

import torch
from torch import Tensor

from .. import dispatch
from ..flops import BACKWARD_FACTOR, flop_formula, projection_flops, scan_flops
from ..registration import custom_op
from . import torch_scan
from .segments import count_tiles

# What the kernels are made for; the memory for states at borders grows with their number.
_MAX_STATES = 16


def _obstacle(A_log: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve these parameters and a result, or its gradient, of this dtype; None if they can."""
    if dtype == torch.float64:
        return dispatch.FLOAT32_ONLY
    state = A_log.shape[1]
    return f"the kernels take at most {_MAX_STATES} states per channel, not {state}" if state > _MAX_STATES else None


def _channel_last_empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised (B, D, H, W) tensor in channel-last memory."""
    batch, channels, height, width = x.shape
    return x.new_empty(batch, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)


def _entering_states(x: Tensor, A_log: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    # One axis for tiles, states and channels: torch.export would settle whether an axis of tiles has length 1.
    size = count_tiles(height, width) * A_log.shape[1] * channels
    return x.new_empty(batch, 4, size, dtype=torch.float32)


@custom_op("selective_scan_2d")
def selective_scan_2d_op(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Sum of the four directions (B, D, H, W) in ``out_dtype``, channel-last memory; the caller checks arguments.

    The second tensor (B, 4, tiles N D) holds the states that enter the tiles: what the Triton backend hands to
    its backward pass. For other backends it is zero.
    """
    arguments = (x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)

    def triton_call():
        from .triton_fwd import selective_scan_2d_forward

        return selective_scan_2d_forward(*arguments, out_dtype)

    def torch_call():
        y = torch_scan.selective_scan_2d_forward(*arguments).to(out_dtype).contiguous().permute(0, 3, 1, 2)
        return y, _entering_states(x, A_log).zero_()

    return dispatch.run("selective_scan_2d", backend, x, triton_call, torch_call, _obstacle(A_log, out_dtype))


@selective_scan_2d_op.register_fake
def _(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, out_dtype, backend):
    return _channel_last_empty(x, out_dtype), _entering_states(x, A_log)


@custom_op("selective_scan_2d_backward")
def selective_scan_2d_backward_op(
    dy: Tensor,
    entering: Tensor,
    x: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (channel-last memory) and of the five parameters."""
    arguments = (x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)

    def triton_call():
        from .triton_bwd import selective_scan_2d_backward

        return selective_scan_2d_backward(dy, entering, *arguments)

    def torch_call():
        dx, *dweights = torch_scan.selective_scan_2d_backward(dy, *arguments)
        dx = dx.to(x.dtype).contiguous().permute(0, 3, 1, 2)
        return dx, *(g.to(w.dtype).contiguous() for g, w in zip(dweights, arguments[1:], strict=True))

    return dispatch.run("selective_scan_2d", backend, x, triton_call, torch_call, _obstacle(A_log, dy.dtype))


@selective_scan_2d_backward_op.register_fake
def _(dy, entering, x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, backend):
    weights = (x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    return _channel_last_empty(x, x.dtype), *(
        torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights
    )


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for it


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 8
    return (*torch.ops.mmvssm.selective_scan_2d_backward(dy, *ctx.saved_tensors, ctx.backend), None, None)


selective_scan_2d_op.register_autograd(_backward, setup_context=_setup_context)


@flop_formula("selective_scan_2d")
def _flops(x_shape, x_proj_shape, dt_proj_shape, dt_bias_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    batch, channels, height, width = x_shape
    sizes = (batch, channels, height * width, A_shape[1])
    return scan_flops(*sizes, directions=4) + projection_flops(*sizes, rank=dt_proj_shape[2], directions=4)


@flop_formula("selective_scan_2d_backward")
def _backward_flops(dy_shape, entering_shape, *shapes, out_shape=None, **kwargs) -> int:
    return BACKWARD_FACTOR * _flops(*shapes)
