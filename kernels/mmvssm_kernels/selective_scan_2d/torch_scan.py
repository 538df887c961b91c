"""Four-direction selective scan in plain torch: the sequences are laid out time-first for the one-direction scan."""

import torch
from torch import Tensor

from ..checks import computing_dtype
from ..selective_scan.torch_scan import scan_backward, scan_forward


def _cross_scan(x: Tensor) -> Tensor:
    """(B, D, H, W) to (4, L, B, D): row-major, column-major, and both reversed."""
    rows = x.permute(2, 3, 0, 1).flatten(0, 1)
    columns = x.permute(3, 2, 0, 1).flatten(0, 1)
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])


def _cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """(4, L, B, D) to the sum over directions (B, H, W, D)."""
    rows = (y[0] + y[2].flip(0)).unflatten(0, (height, width))
    columns = (y[1] + y[3].flip(0)).unflatten(0, (width, height))
    return (rows + columns.transpose(0, 1)).permute(2, 0, 1, 3)


def _directions_to_channels(tensor: Tensor) -> Tensor:
    """(4, L, B, C) to (L, B, 4 C)."""
    return tensor.permute(1, 2, 0, 3).flatten(2)


def _channels_to_directions(tensor: Tensor) -> Tensor:
    """(L, B, 4 C) to (4, L, B, C)."""
    return tensor.unflatten(2, (4, -1)).permute(2, 0, 1, 3)


class _Sequences:
    """What forward and backward both need: the sequences, their projections and the parameters, in one dtype."""

    def __init__(self, x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D):
        dtype = computing_dtype(x)
        self.x_proj_weight, self.dt_proj_weight = x_proj_weight.to(dtype), dt_proj_weight.to(dtype)
        self.rank = dt_proj_weight.shape[2]
        self.sequences = _cross_scan(x.to(dtype))  # (4, L, B, D)
        self.shape = self.sequences.shape
        flat = self.sequences.flatten(1, 2)
        self.projected = torch.bmm(flat, self.x_proj_weight.mT).unflatten(1, self.shape[1:3])  # (4, L, B, R + 2N)
        self.low_rank = self.projected[..., : self.rank]
        delta = torch.bmm(self.low_rank.flatten(1, 2), self.dt_proj_weight.mT).view(self.shape)
        B, C = self.projected[..., self.rank :].permute(1, 2, 0, 3).chunk(2, dim=-1)  # (L, B, 4, N) each
        self.A = -A_log.to(dtype).exp()
        self.arguments = (
            _directions_to_channels(self.sequences),
            _directions_to_channels(delta),
            self.A,
            B.contiguous(),
            C.contiguous(),
            D.to(dtype),
            dt_proj_bias.to(dtype).flatten(),
            True,
        )


def selective_scan_2d_forward(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D) -> Tensor:
    """Result (B, H, W, D) in the computing dtype; arguments as :func:`mmvssm_kernels.selective_scan_2d`."""
    inputs = _Sequences(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    y, _ = scan_forward(*inputs.arguments)
    return _cross_merge(_channels_to_directions(y), *x.shape[2:])


def selective_scan_2d_backward(dy, x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D) -> tuple[Tensor, ...]:
    """Gradients of x as (B, H, W, D) and of the five parameters, in the computing dtype."""
    inputs = _Sequences(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    dsequences = _directions_to_channels(_cross_scan(dy.to(inputs.A.dtype)))
    grads = scan_backward(dsequences, None, *inputs.arguments)
    ddelta = _channels_to_directions(grads.delta).flatten(1, 2)  # (4, L B, D)
    low_rank = inputs.low_rank.flatten(1, 2)
    ddt_weight = torch.bmm(ddelta.mT, low_rank)
    dprojected = torch.cat(
        [
            torch.bmm(ddelta, inputs.dt_proj_weight),
            *(g.permute(2, 0, 1, 3).flatten(1, 2) for g in (grads.B, grads.C)),
        ],
        dim=-1,
    )
    sequences = inputs.sequences.flatten(1, 2)
    dx_weight = torch.bmm(dprojected.mT, sequences)
    through_projection = torch.bmm(dprojected, inputs.x_proj_weight).view(inputs.shape)
    dx = _cross_merge(_channels_to_directions(grads.u) + through_projection, *x.shape[2:])
    return dx, dx_weight, ddt_weight, grads.delta_bias.view(dt_proj_bias.shape), grads.A * inputs.A, grads.D
