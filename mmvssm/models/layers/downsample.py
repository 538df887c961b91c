"""Downsampling between stages: (B, H, W, C) to half the grid at width C'; channel-last throughout."""

import torch
from mmengine.model import BaseModule
from torch import nn
from torch.nn import functional as F

from .channel_last import conv_channel_last
from .norm import LayerNorm


class ConvDownsample(BaseModule):
    """Strided convolution with bias, then LayerNorm.

    Args:
        in_dims: Input width C.
        out_dims: Output width C'.
        kernel_size: 3 (padding 1, grid ceil(size / 2)) or 2 (grid floor(size / 2), at least 2 x 2 wanted).
        init_cfg: Initialisation config of mmengine.
    """

    def __init__(self, in_dims: int, out_dims: int, kernel_size: int = 3, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        self.conv = nn.Conv2d(in_dims, out_dims, kernel_size, stride=2, padding=(kernel_size - 1) // 2)
        self.norm = LayerNorm(out_dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, H, W, C) to (B, H', W', C')."""
        if self.conv.kernel_size[0] == 2:
            _require_two(x, "the 2x2 convolution downsampling")
        return self.norm(conv_channel_last(self.conv, x))


class PatchMerging(BaseModule):
    """Every 2x2 neighbourhood becomes one token: gather to 4C, LayerNorm, Linear without bias.

    Args:
        in_dims: Input width C.
        out_dims: Output width C'.
        odd_size: What happens to an odd last row or column: 'pad' (with zeros, grid ceil(size / 2)) or 'crop' (drop
            it, grid floor(size / 2), as the first code release did). Even grids do not see the difference.
        init_cfg: Initialisation config of mmengine.
    """

    def __init__(self, in_dims: int, out_dims: int, odd_size: str = "pad", init_cfg: dict | None = None):
        super().__init__(init_cfg)
        if odd_size not in ("pad", "crop"):
            raise ValueError(f"odd_size={odd_size!r} is unknown; choose 'pad' or 'crop'")
        self.odd_size = odd_size
        self.norm = LayerNorm(4 * in_dims)
        self.reduction = nn.Linear(4 * in_dims, out_dims, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, H, W, C) to (B, H', W', C')."""
        H, W = x.shape[1:3]
        if self.odd_size == "crop":
            _require_two(x, "patch merging with odd_size='crop'")
            x = x[:, : H - H % 2, : W - W % 2]
        elif H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        # Columns outside, rows inside: the order the released weights expect.
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


def _require_two(x: torch.Tensor, what: str) -> None:
    if min(x.shape[1:3]) < 2:
        raise ValueError(f"{what} needs a grid of at least 2 x 2, got {x.shape[1]} x {x.shape[2]}: give larger images")
