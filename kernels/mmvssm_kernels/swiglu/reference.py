"""The gate of a SwiGLU perceptron: the specification of the operator."""

import torch


def swiglu_reference(x: torch.Tensor) -> torch.Tensor:
    """(..., 2 H) to (..., H) in float32 (float64 for float64 inputs), differentiable by autograd."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return a * torch.sigmoid(a) * b
