"""Layer normalisation that stays in the dtype of its input."""

import torch
from torch import nn

from mmvssm_kernels import add_norm


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis whose result has the dtype of its input, under autocast too.

    Mean, variance and normalisation are float32 in any case. Autocast would also read a float32 copy and write the
    result in float32, only for the next projection to round it again; and torch's kernel gives every row a block of
    threads, of which rows of 48 or 96 channels leave most idle.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., C) to a tensor of the same shape and dtype."""
        return add_norm(x, None, self.weight, self.bias, self.eps, "layer", residual_dtype=x.dtype)[0]
