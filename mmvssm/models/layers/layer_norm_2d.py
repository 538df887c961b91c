"""LayerNorm over the channels of channel-first maps."""

import torch
from torch import nn
from torch.nn import functional as F

from mmvssm.registry import MODELS


@MODELS.register_module("LN2d")
class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over C at every position of a (B, C, H, W) map; in configs ``norm_cfg=dict(type='mmvssm.LN2d')``.

    Args:
        num_channels: Width C.
        eps: Added to the variance.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6):
        super().__init__(num_channels, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, H, W) to the same shape; the permutes are views."""
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)
