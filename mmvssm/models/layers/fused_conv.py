"""Convolutions into which a batch norm has been folded, for inference."""

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mmvssm_kernels import bias_activation


class FusedConv(nn.Module):
    """Convolution, bias, activation and residual sum; (B, C, H, W), channels_last in memory.

    Stands for ``activation(norm(conv(x))) + residual`` in eval mode. All that follows the convolution itself is one
    pass over memory. The bias stays float32 (float64).

    Args:
        conv: A convolution, with or without bias.
        norm: The batch norm after it.
        activation: What follows, see :func:`mmvssm_kernels.bias_activation`.
    """

    @torch.no_grad()
    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, activation: str | None = None):
        super().__init__()
        wide = torch.promote_types(conv.weight.dtype, torch.float32)
        bias = None if conv.bias is None else conv.bias.to(wide)
        statistics = [t.to(wide) for t in (norm.running_mean, norm.running_var)]
        affine = [t.to(wide) for t in (norm.weight, norm.bias)]
        weight, bias = fuse_conv_bn_weights(conv.weight.to(wide), bias, *statistics, norm.eps, *affine)
        self.weight = nn.Parameter(weight.to(conv.weight.dtype, memory_format=torch.channels_last), requires_grad=False)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.stride, self.padding = conv.stride, conv.padding
        self.activation = activation

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Map x (B, C, H, W), and a residual in the shape of the result, to (B, C', H', W')."""
        y = nn.functional.conv2d(x, self.weight, None, self.stride, self.padding).permute(0, 2, 3, 1)
        residual = None if residual is None else residual.permute(0, 2, 3, 1)
        return bias_activation(y, self.bias, self.activation, residual).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        channels = f"{self.weight.shape[1]}, {self.weight.shape[0]}"
        return f"{channels}, stride={self.stride}, padding={self.padding}, activation={self.activation!r}"
