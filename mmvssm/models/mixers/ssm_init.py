"""Initialisation of the parameters that state-space mixers share: A, dt and D.

All functions work in place, on packed parameters of any leading shape (scan directions), and compute in float32
whatever the dtype of the parameter.
"""

import math

import torch
from torch import nn


@torch.no_grad()
def init_A_log_(A_log: torch.Tensor) -> torch.Tensor:
    """S4D-real: A = -(1, 2, ..., N) for every channel, stored as its logarithm. A_log is (..., N)."""
    states = torch.arange(1, A_log.shape[-1] + 1, dtype=torch.float32, device=A_log.device)
    return A_log.copy_(states.log().expand_as(A_log))


@torch.no_grad()
def init_dt_proj_(
    weight: torch.Tensor,
    bias: torch.Tensor,
    dt_min: float = 1e-3,
    dt_max: float = 0.1,
    dt_floor: float = 1e-4,
) -> None:
    """Step sizes that start log-uniform in [dt_min, dt_max].

    The weight is uniform in +-R^-0.5, which keeps the variance of the low-rank step; the bias is the inverse softplus
    of the drawn step, so that softplus(bias) gives it back.

    Args:
        weight: (..., D, R).
        bias: (..., D).
        dt_min: Smallest drawn step.
        dt_max: Largest drawn step.
        dt_floor: Lower bound after drawing.
    """
    nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
    log_dt = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
    dt = log_dt.uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=dt_floor)
    bias.copy_(inverse_softplus(dt))


@torch.no_grad()
def init_x_proj_(weight: torch.Tensor) -> torch.Tensor:
    """The default of a Linear without bias per direction: uniform in +-D^-0.5. The weight is (..., R + 2N, D)."""
    return nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)


def init_D_(D: torch.Tensor) -> torch.Tensor:
    """The skip connection starts as one."""
    return nn.init.ones_(D)


def inverse_softplus(y: torch.Tensor) -> torch.Tensor:
    """x with softplus(x) = y for y > 0, accurate for small y."""
    return y + torch.log(-torch.expm1(-y))
