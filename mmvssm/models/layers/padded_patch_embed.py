"""Patches of a plain backbone, for images of any size."""

import torch
from mmengine.model import BaseModule
from torch import nn
from torch.nn import functional as F

from .precision import autocast_enabled


class PaddedPatchEmbed(BaseModule):
    """One convolution over square patches, overlapping where the stride is smaller than they are.

    Images are padded with zeros at the bottom and right until the patches cover them exactly, so that any size from
    1 x 1 on works.

    Args:
        in_channels: Channels of the image.
        embed_dims: Output width C.
        patch_size: Side of a patch.
        stride: Distance of two patches, at most ``patch_size``; None for ``patch_size``.
        init_cfg: Initialisation config of mmengine.

    Raises:
        ValueError: If sizes are not as described.
    """

    min_size = 1

    def __init__(
        self,
        in_channels: int,
        embed_dims: int,
        patch_size: int,
        stride: int | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        if not isinstance(patch_size, int) or patch_size < 1:
            raise ValueError(f"patch_size={patch_size!r} must be a positive integer")
        stride = patch_size if stride is None else stride
        if not isinstance(stride, int) or not 1 <= stride <= patch_size:
            raise ValueError(f"stride={stride!r} must be an integer in 1..patch_size={patch_size}, or None")
        self.patch_size = patch_size
        self.stride = stride
        self.projection = nn.Conv2d(in_channels, embed_dims, kernel_size=patch_size, stride=stride)
        # LeCun's normal initialisation, cut at two deviations, which 0.8796 makes up for.
        deviation = (in_channels * patch_size**2) ** -0.5 / 0.87962566
        nn.init.trunc_normal_(self.projection.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        nn.init.zeros_(self.projection.bias)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches that an image of this size has."""
        return tuple(max(-((self.patch_size - side) // self.stride), 0) + 1 for side in (height, width))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Map x (B, C_in, H, W) to tokens (B, h * w, C), row by row, and the grid (h, w)."""
        H, W = x.shape[2:]
        h, w = self.grid(H, W)
        bottom, right = ((n - 1) * self.stride + self.patch_size - side for n, side in ((h, H), (w, W)))
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        if self.stride < self.patch_size:
            return self.projection(x).flatten(2).transpose(1, 2), (h, w)
        return self._project_patches(x, h, w), (h, w)

    def _project_patches(self, x: torch.Tensor, h: int, w: int) -> torch.Tensor:
        """The convolution as one product; cuDNN makes nothing of windows that do not overlap (0.43 ms for Vim-T)."""
        B, C = x.shape[:2]
        patches = x.reshape(B, C, h, self.patch_size, w, self.patch_size).permute(0, 2, 4, 1, 3, 5)
        if autocast_enabled(x.device):  # the one copy converts, too
            patches = patches.to(torch.get_autocast_dtype(x.device.type), memory_format=torch.contiguous_format)
        weight = self.projection.weight.flatten(1)
        return F.linear(patches.reshape(B, h * w, weight.shape[1]), weight, self.projection.bias)
