"""Convolutions on channel-last activations."""

import torch
from torch import nn


def conv_channel_last(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Apply a 2-D convolution to x (B, H, W, C) without changing the memory layout.

    The permuted view is what torch calls ``channels_last``, so no data moves before the convolution. Its result has
    the same layout as a rule; where a backend answers in another one, the copy is made here.

    Returns:
        Contiguous (B, H', W', C').
    """
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
