"""Stems: from an image (B, C_in, H, W) to channel-last tokens (B, H', W', C)."""

import torch
from mmengine.model import BaseModule
from torch import nn

from .channel_last import conv_channel_last
from .norm import LayerNorm
from .precision import autocast_enabled


def image_to_channel_last(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to (B, H, W, C); the one copy on the way in, a few channels wide.

    Under autocast the copy has the dtype in which the convolution behind it reads, so that this makes none of its own.
    """
    convert = autocast_enabled(x.device) and x.dtype != torch.float64  # which autocast leaves alone
    dtype = torch.get_autocast_dtype(x.device.type) if convert else x.dtype
    return x.to(dtype, memory_format=torch.channels_last).permute(0, 2, 3, 1).contiguous()


class PatchEmbed(BaseModule):
    """Non-overlapping patches: a convolution with kernel = stride = 4, then LayerNorm.

    The grid is floor(size / 4): rows and columns on the right and bottom that fill no patch are dropped.

    Args:
        in_channels: Channels of the image.
        embed_dims: Output width C.
        init_cfg: Initialisation config of mmengine.
    """

    stride = 4
    min_size = 4

    def __init__(self, in_channels: int, embed_dims: int, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        self.projection = nn.Conv2d(in_channels, embed_dims, kernel_size=4, stride=4)
        self.norm = LayerNorm(embed_dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C_in, H, W) to (B, H // 4, W // 4, C)."""
        return self.norm(conv_channel_last(self.projection, image_to_channel_last(x)))


class ConvPatchEmbed(BaseModule):
    """Overlapping stem: two 3x3 convolutions of stride 2, each with LayerNorm, and a GELU between them.

    The grid is ceil(ceil(size / 2) / 2), so that any size from 1 x 1 on works.

    Args:
        in_channels: Channels of the image.
        embed_dims: Output width C, even.
        init_cfg: Initialisation config of mmengine.
    """

    stride = 4
    min_size = 1

    def __init__(self, in_channels: int, embed_dims: int, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        if embed_dims % 2:
            raise ValueError(f"the convolutional stem halves the width, so embed_dims={embed_dims} must be even")
        self.conv1 = nn.Conv2d(in_channels, embed_dims // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = LayerNorm(embed_dims // 2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(embed_dims // 2, embed_dims, kernel_size=3, stride=2, padding=1)
        self.norm2 = LayerNorm(embed_dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C_in, H, W) to (B, ceil(H / 4), ceil(W / 4), C)."""
        x = self.norm1(conv_channel_last(self.conv1, image_to_channel_last(x)))
        return self.norm2(conv_channel_last(self.conv2, self.act(x)))
