"""The scan mixer of MambaVision (https://arxiv.org/abs/2407.08083)."""

import math

import torch
from mmengine.model import BaseModule
from torch import nn

from mmvssm_kernels import causal_conv1d, selective_scan

from ..layers import Linear
from .ssm_init import init_A_log_, init_D_, init_dt_proj_

DT_INITS = ("mamba", "zero")


class MambaVisionMixer(BaseModule):
    """Selective scan of one half of the channels beside a convolution of the other half.

    With D = C / 2 scanned channels, N states and step rank R, over the tokens of a window in row-major order:

        x, z = in_proj(input)
        x, z = silu(conv(x)), silu(conv(z))                       # depthwise, three taps, both neighbours
        dt, B, C = x_proj(x)
        y = selective_scan(x, softplus(dt_proj(dt) + dt_bias), -exp(A_log), B, C, D)
        output = out_proj([y, z])

    z is no gate: it reaches the output beside the scan. The bias of ``dt_proj`` enters the step size **twice**, once
    with the projection and once in the scan; so does the authors' code, and their weights expect it.

    The authors' two convolutions are one here, of C channels.

    Args:
        embed_dims: Width C, even.
        d_state: States per channel N.
        dt_rank: Rank R of the step size, or 'auto' for ceil(C / 16).
        dt_init: Step sizes at the start of training: 'mamba' draws them log-uniform from [0.001, 0.1]; 'zero' has bias
            0 and a weight like all projections, steps of about 0.69, as the authors' training started.
        init_cfg: Initialisation config of mmengine.

    Raises:
        ValueError: If an argument is not as described.
    """

    # Parameters on which weight decay makes no sense: decays, skip, step bias. See BaseBackbone.no_weight_decay.
    no_weight_decay_params = ("A_log", "D", "dt_proj.bias")

    def __init__(
        self,
        embed_dims: int,
        d_state: int = 8,
        dt_rank: int | str = "auto",
        dt_init: str = "mamba",
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        if embed_dims % 2:
            raise ValueError(f"half of the channels is scanned, so the width {embed_dims} must be even")
        if not isinstance(d_state, int) or d_state < 1:
            raise ValueError(f"d_state={d_state!r} must be a positive integer")
        if not (dt_rank == "auto" or (isinstance(dt_rank, int) and dt_rank > 0)):
            raise ValueError(f"dt_rank={dt_rank!r} must be a positive integer or 'auto'")
        if dt_init not in DT_INITS:
            raise ValueError(f"dt_init={dt_init!r} is unknown; choose one of {', '.join(map(repr, DT_INITS))}")
        D, N = embed_dims // 2, d_state
        R = math.ceil(embed_dims / 16) if dt_rank == "auto" else dt_rank
        self.splits = (R, N, N)
        self.dt_init = dt_init

        self.in_proj = Linear(embed_dims, embed_dims, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(embed_dims, 3))
        self.x_proj = Linear(D, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, D)
        self.A_log = nn.Parameter(torch.empty(D, N))
        self.D = nn.Parameter(torch.empty(D))
        self.out_proj = Linear(embed_dims, embed_dims, bias=False)
        nn.init.uniform_(self.conv_weight, -(3**-0.5), 3**-0.5)  # torch's default for a convolution of three inputs
        self.init_ssm_parameters()

    def init_ssm_parameters(self) -> None:
        """Draw the scan's own parameters; projections and convolution keep what they have."""
        if self.dt_init == "mamba":
            init_dt_proj_(self.dt_proj.weight, self.dt_proj.bias)
            with torch.no_grad():
                self.dt_proj.bias.mul_(0.5)  # it is added twice
        else:
            nn.init.normal_(self.dt_proj.weight, std=0.02)
            nn.init.zeros_(self.dt_proj.bias)
        init_A_log_(self.A_log)
        init_D_(self.D)

    def init_weights(self) -> None:
        """Initialise as mmengine says, then restore what a general rule must not touch."""
        first_call = not self.is_init  # a second call only warns, in mmengine and here
        super().init_weights()
        if first_call:
            self.init_ssm_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, L, C) to (B, L, C)."""
        xz = self.in_proj(x)
        xz = causal_conv1d(xz.transpose(1, 2), self.conv_weight, activation="silu", padding="same").transpose(1, 2)
        x, z = xz.chunk(2, dim=-1)  # views (B, L, D)
        dt, B, C = self.x_proj(x).split(self.splits, dim=-1)
        dt = nn.functional.linear(dt, self.dt_proj.weight)
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        y = selective_scan(
            x.transpose(1, 2),
            dt.transpose(1, 2),
            -torch.exp(self.A_log.to(wide)),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D.to(wide),
            delta_bias=2 * self.dt_proj.bias.to(wide),
            delta_softplus=True,
        ).transpose(1, 2)
        if torch.is_grad_enabled() and xz.requires_grad:
            xz = torch.cat([y, z], dim=-1)  # the backward pass needs x
        else:
            x.copy_(y)  # y takes the place of x beside z
        return self.out_proj(xz)
