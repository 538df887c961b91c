"""Depthwise convolution with one-sided or centred padding: the specification of the operator."""

import torch
import torch.nn.functional as F


def causal_conv1d_reference(x, weight, bias=None, activation=None, reverse=False, padding="causal") -> torch.Tensor:
    """Pad, convolve, activate in float32 (float64 for float64 inputs), differentiable by autograd.

    Args as :func:`mmvssm_kernels.causal_conv1d`.

    Returns:
        Output (B, D, L) in the computing type.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    width = weight.shape[1]
    before = width - 1 if padding == "causal" else (width - 1) // 2
    if reverse:
        x = x.flip(2)
    y = F.conv1d(F.pad(x, (before, width - 1 - before)), weight[:, None], bias, groups=x.shape[1])
    if reverse:
        y = y.flip(2)
    return F.silu(y) if activation == "silu" else y
