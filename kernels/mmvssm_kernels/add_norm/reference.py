"""Addition and normalisation: the specification of the operator."""

import torch


def add_norm_reference(
    x, residual, weight, bias=None, eps=1e-5, norm="rms", scale=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add and normalise in float32 (float64 for float64 inputs), differentiable by autograd.

    Args as :func:`mmvssm_kernels.add_norm`.

    Returns:
        Normalised rows and residual stream, both (B, ..., D) in the computing type.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    r = x.to(dtype)
    if scale is not None:
        r = r * scale.to(dtype).reshape(-1, *[1] * (x.dim() - 1))
    if residual is not None:
        r = r + residual.to(dtype)
    centred = r if norm == "rms" else r - r.mean(-1, keepdim=True)
    y = weight.to(dtype) * centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    if bias is not None:
        y = y + bias.to(dtype)
    return y, r
