"""Depthwise convolution with torch's own convolution, without flipped copies.

It runs as a two-dimensional convolution of height one in channel-last memory: ``conv1d`` does not know channel-last
memory, and on a CPU its transposes take many times as long as the sums.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import computing_dtype
from .layout import empty_in_order, tokens_before


def _image(x: Tensor, before: int, after: int, dtype: torch.dtype) -> Tensor:
    """(B, D, L) to (B, D, 1, before + L + after) in ``dtype``, channel-last memory, with zero tokens around."""
    tokens = x.transpose(1, 2).to(dtype).contiguous()
    return F.pad(tokens, (0, 0, before, after)).transpose(1, 2)[:, :, None]


def _convolve(x, weight, bias, reverse, padding) -> tuple[Tensor, Tensor, Tensor]:
    """Sums before the activation (B, D, 1, L), the padded image, and the taps (D, 1, 1, W) in order of tokens."""
    dtype, width = computing_dtype(x), weight.shape[1]
    left = tokens_before(width, reverse, padding)
    image = _image(x, left, width - 1 - left, dtype)
    taps = weight.to(dtype)[:, None, None]
    taps = taps.flip(3) if reverse else taps
    bias = None if bias is None else bias.to(dtype)
    return F.conv2d(image, taps, bias, groups=x.shape[1]), image, taps


def causal_conv1d_forward(x, weight, bias, activation, reverse, padding, out_dtype) -> Tensor:
    """Output (B, D, L) in the memory order of ``x``; arguments as the public function's."""
    y = _convolve(x, weight, bias, reverse, padding)[0]
    if activation == "silu":
        y = F.silu(y, inplace=True)
    return empty_in_order(x, out_dtype).copy_(y[:, :, 0])


def causal_conv1d_backward(dy, x, weight, bias, activation, reverse, padding) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; empty for a bias of None."""
    before, image, taps = _convolve(x, weight, bias, reverse, padding)
    gradient = _image(dy, 0, 0, before.dtype)
    if activation == "silu":
        gradient = torch.ops.aten.silu_backward(gradient, before)
    channels, length = x.shape[1:]
    dimage, dtaps, dbias = torch.ops.aten.convolution_backward(
        gradient, image, taps, [channels], [1, 1], [0, 0], [1, 1], False, [0, 0], channels, [True, True, True]
    )
    left = tokens_before(weight.shape[1], reverse, padding)
    dtaps = (dtaps.flip(3) if reverse else dtaps)[:, 0, 0]
    return (
        empty_in_order(x).copy_(dimage[:, :, 0, left : left + length]),
        torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(dtaps),
        x.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format).copy_(dbias),
    )
