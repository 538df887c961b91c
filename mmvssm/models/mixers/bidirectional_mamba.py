"""The token mixer of Vim (https://arxiv.org/abs/2401.09417): selective scans in both directions of a sequence."""

import math

import torch
from mmengine.model import BaseModule
from torch import nn
from torch.nn import functional as F

from mmvssm_kernels import ScanParameters, bidirectional_selective_scan, causal_conv1d, selective_scan

from ..layers import Linear
from .ssm_init import init_A_log_, init_D_, init_dt_proj_, init_x_proj_

DIRECTIONS = ("separate", "shared", "forward")
DT_INITS = ("mamba", "official")


class ScanDirection(nn.Module):
    """Parameters of one direction: convolution, projections, decays and skip.

    Args:
        inner_dims: Inner width E.
        d_state: States per channel N.
        d_conv: Taps of the depthwise convolution.
        dt_rank: Rank R of the step size.
    """

    # Parameters on which weight decay makes no sense. See BaseBackbone.no_weight_decay.
    no_weight_decay_params = ("A_log", "D", "dt_proj_bias")

    def __init__(self, inner_dims: int, d_state: int, d_conv: int, dt_rank: int):
        super().__init__()
        self.conv_weight = nn.Parameter(torch.empty(inner_dims, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(inner_dims))
        self.x_proj_weight = nn.Parameter(torch.empty(dt_rank + 2 * d_state, inner_dims))
        self.dt_proj_weight = nn.Parameter(torch.empty(inner_dims, dt_rank))
        self.dt_proj_bias = nn.Parameter(torch.empty(inner_dims))
        self.A_log = nn.Parameter(torch.empty(inner_dims, d_state))
        self.D = nn.Parameter(torch.empty(inner_dims))

    def init_parameters(self, dt_init: str) -> None:
        """Draw all parameters; ``dt_init`` as in :class:`BidirectionalMamba`."""
        bound = self.conv_weight.shape[1] ** -0.5  # torch's default for a depthwise convolution
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        init_x_proj_(self.x_proj_weight)
        init_dt_proj_(self.dt_proj_weight, self.dt_proj_bias)
        if dt_init == "official":
            nn.init.zeros_(self.dt_proj_bias)
        init_A_log_(self.A_log)
        init_D_(self.D)

    def packed(self) -> ScanParameters:
        """The parameters as the operators take them."""
        return ScanParameters(*(getattr(self, name) for name in ScanParameters._fields))

    def extra_repr(self) -> str:
        (E, R), N = self.dt_proj_weight.shape, self.A_log.shape[1]
        return f"inner_dims={E}, d_state={N}, d_conv={self.conv_weight.shape[1]}, dt_rank={R}"


class BidirectionalMamba(BaseModule):
    """Gated selective scan of a sequence in both directions, between two projections.

    With E = expand * C inner channels:

        x, z = in_proj(input)
        y = scan(silu(conv(x))) from the first token to the last + the same from the last to the first
        output = out_proj(scale * y * silu(z))

    Args:
        embed_dims: Width C.
        expand: Inner width E as a multiple of C.
        d_state: States per channel N.
        d_conv: Taps of the depthwise convolution over the sequence.
        dt_rank: Rank R of the step size, or 'auto' for ceil(C / 16).
        directions: 'separate' (every direction has parameters of its own, all released models; the backward one's
            convolution runs backwards too), 'shared' (both scan what the forward convolution gives, with the same
            parameters but for the decays) or 'forward' (one direction). The authors' ``bimamba_type`` v2, v1 and none.
        divide_out: Whether the two directions are averaged instead of added; with 'separate' only.
        layer_scale: Start of a learned factor per channel on the output, or None for no factor.
        dt_init: 'mamba' draws the step sizes of both directions log-uniform from [0.001, 0.1]. 'official' leaves those
            of the backward direction at about 0.69, as the authors' training starts.
        depth: Number of mixers in the network; the output projection starts smaller by its square root.
        init_cfg: Initialisation config of mmengine.

    Raises:
        ValueError: If an argument is not as described.
    """

    def __init__(
        self,
        embed_dims: int,
        expand: float = 2,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | str = "auto",
        directions: str = "separate",
        divide_out: bool = True,
        layer_scale: float | None = None,
        dt_init: str = "mamba",
        depth: int = 1,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        for name, value in {"d_state": d_state, "d_conv": d_conv}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if not (dt_rank == "auto" or (isinstance(dt_rank, int) and dt_rank > 0)):
            raise ValueError(f"dt_rank={dt_rank!r} must be a positive integer or 'auto'")
        if directions not in DIRECTIONS:
            raise ValueError(f"directions={directions!r} is unknown; choose one of {', '.join(map(repr, DIRECTIONS))}")
        if dt_init not in DT_INITS:
            raise ValueError(f"dt_init={dt_init!r} is unknown; choose one of {', '.join(map(repr, DT_INITS))}")
        E = int(expand * embed_dims)
        if E < 1:
            raise ValueError(f"expand={expand!r} leaves no inner channels at width {embed_dims}")
        R = math.ceil(embed_dims / 16) if dt_rank == "auto" else dt_rank
        self.directions = directions
        self.dt_init = dt_init
        self.scale = 0.5 if divide_out and directions == "separate" else 1.0

        self.in_proj = Linear(embed_dims, 2 * E, bias=False)
        self.forward_scan = ScanDirection(E, d_state, d_conv, R)
        if directions == "separate":
            self.backward_scan = ScanDirection(E, d_state, d_conv, R)
        elif directions == "shared":
            self.backward_A_log = nn.Parameter(torch.empty(E, d_state))
            self.no_weight_decay_params = ("backward_A_log",)
        self.out_proj = Linear(E, embed_dims, bias=False)
        self.layer_scale = None
        if layer_scale is not None:
            self.layer_scale = nn.Parameter(torch.full((embed_dims,), float(layer_scale)))
        self.init_ssm_parameters()
        nn.init.uniform_(self.out_proj.weight, -((E * depth) ** -0.5), (E * depth) ** -0.5)

    def init_ssm_parameters(self) -> None:
        """Draw the scans' own parameters; the two projections keep what they have."""
        self.forward_scan.init_parameters("mamba")
        if self.directions == "separate":
            self.backward_scan.init_parameters(self.dt_init)
        elif self.directions == "shared":
            init_A_log_(self.backward_A_log)

    def init_weights(self) -> None:
        """Initialise as mmengine says, then restore what a general rule must not touch."""
        first_call = not self.is_init  # a second call only warns, in mmengine and here
        super().init_weights()
        if first_call:
            self.init_ssm_parameters()

    def forward(self, x: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """Mix tokens.

        Args:
            x: (B, L, C), or a list of it alone, which is emptied, so that its memory is free during the scans.

        Returns:
            (B, L, C) in the dtype of out_proj's result.
        """
        xz = self.in_proj(x.pop() if isinstance(x, list) else x)  # (B, L, 2E)
        if self.directions == "shared":
            y = self._shared_scans(xz)
        else:
            backward = self.backward_scan.packed() if self.directions == "separate" else None
            y = bidirectional_selective_scan(xz, self.forward_scan.packed(), backward, scale=self.scale)
        y = self.out_proj(y)
        return y if self.layer_scale is None else y * self.layer_scale.to(y.dtype)

    def _shared_scans(self, xz: torch.Tensor) -> torch.Tensor:
        """(B, L, 2E) to (B, L, E): both directions scan the same convolved sequence."""
        p = self.forward_scan
        x, z = xz.transpose(1, 2).chunk(2, dim=1)  # (B, E, L) each
        u = causal_conv1d(x, p.conv_weight, p.conv_bias, activation="silu")
        N = p.A_log.shape[1]
        low_rank, B, C = F.linear(u.transpose(1, 2), p.x_proj_weight).split([p.dt_proj_weight.shape[1], N, N], dim=-1)
        delta = F.linear(low_rank, p.dt_proj_weight).transpose(1, 2)
        B, C = B.transpose(1, 2), C.transpose(1, 2)  # (B, N, L)
        dtype = torch.promote_types(p.A_log.dtype, torch.float32)
        y = sum(
            selective_scan(u, delta, -A_log.to(dtype).exp(), B, C, p.D, z, p.dt_proj_bias, True, reverse)
            for A_log, reverse in ((p.A_log, False), (self.backward_A_log, True))
        )
        return y.transpose(1, 2)
