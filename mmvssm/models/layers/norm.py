"""Layer normalisation that stays in the dtype of its input."""

import torch
from torch import nn
from torch.nn import functional as F

from .precision import autocast_enabled


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis whose result has the dtype of its input, under autocast too.

    Mean and variance are float32 in any case. Autocast would also write the result in float32, only for the next
    projection to read and round it again: three passes over memory instead of one.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., C) to a tensor of the same shape and dtype."""
        if x.dtype == self.weight.dtype or not autocast_enabled(x.device):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
