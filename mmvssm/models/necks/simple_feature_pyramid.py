"""The simple feature pyramid of ViTDet (https://arxiv.org/abs/2203.16527), for detection heads."""

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule, ModuleList, Sequential
from torch import nn

from mmvssm.registry import MODELS

from .rescale import NORMS, STRIDES, check_maps, check_settings, check_widths, rescale_layers


class ConvNorm(BaseModule):
    """Convolution without bias that keeps the grid, then a norm over the channels.

    Args:
        in_dims: Input width.
        out_dims: Output width.
        kernel_size: Odd.
        norm: A key of ``NORMS``.
    """

    def __init__(self, in_dims: int, out_dims: int, kernel_size: int, norm: str):
        super().__init__()
        self.conv = nn.Conv2d(in_dims, out_dims, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = NORMS[norm](out_dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, H, W) to (B, C', H, W)."""
        return self.norm(self.conv(x))


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """A pyramid of one width from the last map of a plain backbone.

    Each level changes the stride of the same map (deconvolutions that halve the width each time, or a maximum), then
    has a 1x1 and a 3x3 convolution, each with a norm. Further levels take every second row and column of the one
    before.

    Args:
        in_channels: Width of the map, an integer or a sequence with one.
        out_channels: Width of every level.
        stride: Stride of the map: 16, 8 or 4.
        num_outs: Number of levels from stride 4 on, at least 4.
        norm: 'LN' (over channels, eps 1e-6), 'BN' or 'SyncBN'.
        init_cfg: Initialisation config of mmengine.

    Attributes:
        in_channels: Widths of the maps that go in, a list with one entry.
        out_channels: Width of every level.

    Example:
        >>> import torch
        >>> from mmvssm.models import SimpleFeaturePyramid
        >>> neck = SimpleFeaturePyramid(16, out_channels=8)
        >>> [tuple(x.shape[2:]) for x in neck([torch.rand(1, 16, 5, 7)])]
        [(20, 28), (10, 14), (5, 7), (2, 3), (1, 2)]
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int = 256,
        stride: int = 16,
        num_outs: int = 5,
        norm: str = "LN",
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        check_settings(stride, norm)
        self.in_channels = check_widths(in_channels, (1,))
        if not isinstance(num_outs, int) or num_outs < len(STRIDES):
            raise ValueError(f"num_outs={num_outs!r} must be an integer of at least {len(STRIDES)}")
        if not isinstance(out_channels, int) or out_channels < 1:
            raise ValueError(f"out_channels={out_channels!r} must be a positive integer")
        width = self.in_channels[0]
        if width % 4:
            raise ValueError(f"in_channels={in_channels!r} must be divisible by 4, as two deconvolutions halve it")
        self.out_channels = out_channels
        self.num_outs = num_outs
        self.levels = ModuleList()
        for out_stride in STRIDES:
            scaling = rescale_layers(width, (width // 2, width // 4), stride, out_stride, norm)
            deconvolutions = [layer for layer in scaling if isinstance(layer, nn.ConvTranspose2d)]
            reached = deconvolutions[-1].out_channels if deconvolutions else width
            convolutions = ConvNorm(reached, out_channels, 1, norm), ConvNorm(out_channels, out_channels, 3, norm)
            self.levels.append(Sequential(*scaling, *convolutions))

    def forward(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Build the pyramid.

        Args:
            inputs: A sequence with one (B, C, H, W) map.

        Returns:
            ``num_outs`` contiguous maps (B, out_channels, H_i, W_i), finest first. Norms over channels leave
            channels_last strides, which compiled RoIAlign operators do not heed.

        Raises:
            ValueError: If there is not exactly one map of the right width.
        """
        check_maps(inputs, self.in_channels, type(self).__name__)
        outs = [level(inputs[0]).contiguous() for level in self.levels]
        while len(outs) < self.num_outs:
            outs.append(outs[-1][:, :, ::2, ::2].contiguous())
        return tuple(outs)
