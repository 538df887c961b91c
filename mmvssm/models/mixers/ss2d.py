"""SS2D, the token mixer of VMamba (https://arxiv.org/abs/2401.10166)."""

import math

import torch
from mmengine.model import BaseModule
from torch import nn

from mmvssm_kernels import selective_scan_2d

from ..layers import AddLayerNorm, Conv2d, Linear, autocast_enabled, build_activation, conv_channel_last
from .ssm_init import init_A_log_, init_D_, init_dt_proj_, init_x_proj_

DIRECTIONS = 4  # row-major, column-major, and both reversed


class SS2D(BaseModule):
    """Four-direction selective scan over a grid, between two projections; channel-last in and out.

    With D = int(ssm_ratio * C) inner channels, N states and step rank R:

        x, z = in_proj(input)                  # z only if gated
        x = act(depthwise_conv(x))
        y = out_norm(selective_scan_2d(x))     # the four directions are summed
        output = out_proj(out_act(y) * gate_act(z))

    Args:
        embed_dims: Width C.
        ssm_ratio: Inner width D as a multiple of C.
        d_state: States per channel N.
        dt_rank: Rank R of the step size, or 'auto' for ceil(C / 16).
        d_conv: Side of the depthwise kernel, odd; 1 leaves the convolution out.
        conv_bias: Whether the depthwise convolution has a bias.
        gated: Whether the output is multiplied by a second projection of the input.
        act: Activation of the scan branch: 'silu', 'gelu', 'relu' or None.
        gate_act: Activation of the gate; None gives a linear gate. Ignored unless gated.
        out_act: Activation after the output norm.
        fp32_core: If True, the scan's inputs, its norm and the gate product are float32 under autocast and with half
            weights too (the first VMamba generation). If False, the scan reads the input dtype and sums in float32, and
            what leaves the norm is in the input dtype.
        init_cfg: Initialisation config of mmengine.
    """

    # Parameters on which weight decay makes no sense: decays, skip, step bias. See BaseBackbone.no_weight_decay.
    no_weight_decay_params = ("A_log", "D", "dt_proj_bias")

    def __init__(
        self,
        embed_dims: int,
        ssm_ratio: float = 1.0,
        d_state: int = 1,
        dt_rank: int | str = "auto",
        d_conv: int = 3,
        conv_bias: bool = False,
        gated: bool = False,
        act: str | None = "silu",
        gate_act: str | None = "silu",
        out_act: str | None = None,
        fp32_core: bool = False,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        if not isinstance(d_conv, int) or d_conv < 1 or d_conv % 2 == 0:
            raise ValueError(f"d_conv={d_conv!r} must be an odd number (1 leaves the convolution out)")
        if not (dt_rank == "auto" or (isinstance(dt_rank, int) and dt_rank > 0)):
            raise ValueError(f"dt_rank={dt_rank!r} must be a positive integer or 'auto'")
        if not isinstance(d_state, int) or d_state < 1:
            raise ValueError(f"d_state={d_state!r} must be a positive integer")
        D, N, K = int(ssm_ratio * embed_dims), d_state, DIRECTIONS
        if D < 1:
            raise ValueError(f"ssm_ratio={ssm_ratio!r} leaves no inner channels at width {embed_dims}")
        R = math.ceil(embed_dims / 16) if dt_rank == "auto" else dt_rank
        self.gated = gated
        self.fp32_core = fp32_core

        self.in_proj = Linear(embed_dims, 2 * D if gated else D, bias=False)
        self.conv = Conv2d(D, D, d_conv, padding=d_conv // 2, groups=D, bias=conv_bias) if d_conv > 1 else None
        self.act = build_activation(act, "ssm_act")
        self.x_proj_weight = nn.Parameter(torch.empty(K, R + 2 * N, D))
        self.dt_proj_weight = nn.Parameter(torch.empty(K, D, R))
        self.dt_proj_bias = nn.Parameter(torch.empty(K, D))
        self.A_log = nn.Parameter(torch.empty(K * D, N))
        self.D = nn.Parameter(torch.empty(K * D))
        self.out_norm = AddLayerNorm(D)
        self.out_act = build_activation(out_act, "out_act")
        self.gate_act = build_activation(gate_act, "gate_act") if gated else None
        self.out_proj = Linear(D, embed_dims, bias=False)
        self.init_ssm_parameters()

    def init_ssm_parameters(self) -> None:
        """Draw the scan's own parameters; projections, convolution and norm keep what they have."""
        init_x_proj_(self.x_proj_weight)
        init_dt_proj_(self.dt_proj_weight, self.dt_proj_bias)
        init_A_log_(self.A_log)
        init_D_(self.D)

    def init_weights(self) -> None:
        """Initialise as mmengine says, then restore what a general rule must not touch."""
        first_call = not self.is_init  # a second call only warns, in mmengine and here
        super().init_weights()
        if first_call:
            self.init_ssm_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix tokens.

        Args:
            x: (B, H, W, C).

        Returns:
            (B, H, W, C) in the dtype of out_proj's result.
        """
        input_dtype = x.dtype
        x = self.in_proj(x)  # (B, H, W, D or 2D)
        if self.gated:
            x, z = x.chunk(2, dim=-1)
        if self.conv is not None:
            x = conv_channel_last(self.conv, x)
        x = self.act(x)
        y = self._scan(x)  # (B, H, W, D), float32
        # The norm reads the sum in float32 and writes what comes next in the precision of that.
        y, _ = self.out_norm(y, residual_dtype=y.dtype, out_dtype=y.dtype if self.fp32_core else x.dtype)
        y = self.out_act(y)
        if self.gated:
            y = y * self.gate_act(z)
        if not autocast_enabled(y.device):
            y = y.to(input_dtype)
        return self.out_proj(y)

    def _scan(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, D) to the sum of the four directions, same shape, float32; both permutes are views."""
        if self.fp32_core:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        y = selective_scan_2d(
            x.permute(0, 3, 1, 2), self.x_proj_weight, self.dt_proj_weight, self.dt_proj_bias, self.A_log, self.D
        )
        return y.permute(0, 2, 3, 1)
