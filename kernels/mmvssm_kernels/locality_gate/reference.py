"""The gate between long and short context: the specification of the operator."""

import torch


def locality_gate_reference(long, x, logits, weight, bias=None, eps=1e-6, silu=False) -> torch.Tensor:
    """Mix in float32 (float64 for float64 inputs), differentiable by autograd.

    Args as :func:`mmvssm_kernels.locality_gate`.
    """
    dtype = torch.promote_types(long.dtype, torch.float32)
    long, x, logits, weight = (t.to(dtype) for t in (long, x, logits, weight))
    short = weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    s = torch.sigmoid(logits if bias is None else logits + bias.to(dtype).view(logits.shape[-2:]))
    y = s * long + (1 - s) * short
    return y * torch.sigmoid(y) if silu else y
