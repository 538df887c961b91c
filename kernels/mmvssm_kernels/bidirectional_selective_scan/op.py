"""The operators ``mmvssm::bidirectional_selective_scan`` and its backward: schema, fake, autograd, FLOPs."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import computing_dtype
from ..flops import BACKWARD_FACTOR, flop_formula, projection_flops, scan_flops
from ..registration import custom_op
from . import torch_scan
from .parameters import ScanParameters

# Tokens of a tile of the kernels, which keep the state that enters every tile for the backward pass.
TILE = 16

# Taps of the convolutions that the kernels unroll.
MAX_TAPS = 16


def row_size(parameters: ScanParameters) -> int:
    """Values of a row of projections [step-size rank | B | C], the rank padded to whole vectors of four."""
    return (parameters.rank + 3) // 4 * 4 + 2 * parameters.state


def kept_tensors(xz: Tensor, parameters: list[Tensor], keep_states: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised tensors for what the kernels keep for the backward pass.

    In float32 the states that enter all tiles but the first (K, B, tiles - 1, E, N), the projections
    (K, B, padded L, row), and weights and biases of the convolutions (K, W + 1, E); in the dtype of ``xz`` the sum of
    both directions before the gate (B, padded L, E). All empty unless ``keep_states``.
    """
    if not keep_states:
        return *(xz.new_empty(0, dtype=torch.float32) for _ in range(3)), xz.new_empty(0)
    batch, length, columns = xz.shape
    directions = len(parameters) // len(ScanParameters._fields)
    first = ScanParameters(*parameters[: len(ScanParameters._fields)])
    tiles = (length + TILE - 1) // TILE
    return (
        xz.new_empty(directions, batch, tiles - 1, columns // 2, first.state, dtype=torch.float32),
        xz.new_empty(directions, batch, tiles * TILE, row_size(first), dtype=torch.float32),
        xz.new_empty(directions, first.conv_weight.shape[1] + 1, columns // 2, dtype=torch.float32),
        xz.new_empty(batch, tiles * TILE, columns // 2),
    )


def _obstacle(parameters: list[Tensor], dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve these parameters and a result, or its gradient, of this dtype; None if they can."""
    if dtype == torch.float64:
        return dispatch.FLOAT32_ONLY
    width = parameters[0].shape[1]
    return None if width <= MAX_TAPS else f"the kernels take at most {MAX_TAPS} taps, not {width}"


def gated_empty(xz: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised contiguous (B, L, E)."""
    return xz.new_empty(*xz.shape[:2], xz.shape[2] // 2, dtype=dtype)


@custom_op("bidirectional_selective_scan")
def bidirectional_selective_scan_op(
    xz: Tensor, parameters: list[Tensor], scale: float, keep_states: bool, out_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Result (B, L, E) in ``out_dtype`` and the four of :func:`kept_tensors`.

    ``parameters`` are the seven tensors of one direction or fourteen of two; arguments are checked by the caller.
    """
    kept = kept_tensors(xz, parameters, keep_states)

    def triton_call():
        from .triton_fwd import bidirectional_forward

        return bidirectional_forward(xz, parameters, scale, out_dtype, *kept)

    def torch_call():
        return gated_empty(xz, out_dtype).copy_(torch_scan.bidirectional_forward(xz, parameters, scale))

    obstacle = _obstacle(parameters, out_dtype)
    return dispatch.run("bidirectional_selective_scan", backend, xz, triton_call, torch_call, obstacle), *kept


@bidirectional_selective_scan_op.register_fake
def _(xz, parameters, scale, keep_states, out_dtype, backend):
    return gated_empty(xz, out_dtype), *kept_tensors(xz, parameters, keep_states)


@custom_op("bidirectional_selective_scan_backward")
def bidirectional_selective_scan_backward_op(
    dout: Tensor,
    xz: Tensor,
    parameters: list[Tensor],
    borders: Tensor,
    projected: Tensor,
    taps: Tensor,
    sums: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradient of ``xz``, contiguous, and those of all parameters, flat in the computing dtype.

    One flat tensor, because results of an operator must not share memory and a dozen would be a dozen launches. What
    the forward pass keeps may be empty.
    """

    def triton_call():
        from .triton_bwd import bidirectional_backward

        return bidirectional_backward(dout, xz, parameters, scale, borders, projected, taps, sums)

    def torch_call():
        dxz, *dparameters = torch_scan.bidirectional_backward(dout, xz, parameters, scale)
        dxz = torch.empty_like(xz, memory_format=torch.contiguous_format).copy_(dxz)
        return dxz, torch.cat([g.flatten() for g in dparameters])

    obstacle = _obstacle(parameters, dout.dtype)
    return dispatch.run("bidirectional_selective_scan", backend, xz, triton_call, torch_call, obstacle)


@bidirectional_selective_scan_backward_op.register_fake
def _(dout, xz, parameters, borders, projected, taps, sums, scale, backend):
    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    return dxz, xz.new_empty(sum(t.numel() for t in parameters), dtype=computing_dtype(xz))


def _setup_context(ctx, inputs, output):
    xz, parameters, ctx.scale, _, _, ctx.backend = inputs
    ctx.save_for_backward(xz, *output[1:], *parameters)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *unused):
    xz, borders, projected, taps, sums, *parameters = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(gated_empty(xz))
    dxz, flat = torch.ops.mmvssm.bidirectional_selective_scan_backward(
        dout, xz, parameters, borders, projected, taps, sums, ctx.scale, ctx.backend
    )
    pieces = flat.split([t.numel() for t in parameters])
    dparameters = [g.view(t.shape).to(t.dtype) for g, t in zip(pieces, parameters, strict=True)]
    return dxz, dparameters, None, None, None, None


bidirectional_selective_scan_op.register_autograd(_backward, setup_context=_setup_context)


@flop_formula("bidirectional_selective_scan")
def _flops(xz_shape, parameter_shapes, *args, out_shape=None, **kwargs) -> int:
    batch, length, columns = xz_shape
    directions = len(parameter_shapes) // len(ScanParameters._fields)
    shapes = ScanParameters(*parameter_shapes[: len(ScanParameters._fields)])
    sizes = (batch, columns // 2, length, shapes.A_log[1])
    convolution = 2 * directions * batch * columns // 2 * length * shapes.conv_weight[1]
    projections = projection_flops(*sizes, rank=shapes.dt_proj_weight[1], directions=directions)
    return scan_flops(*sizes, directions=directions) + projections + convolution


@flop_formula("bidirectional_selective_scan_backward")
def _backward_flops(dout_shape, *shapes, out_shape=None, **kwargs) -> int:
    return BACKWARD_FACTOR * _flops(*shapes)
