"""Bias, activation and residual sum: the specification of the operator."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def bias_activation_reference(x, bias, activation=None, residual=None) -> torch.Tensor:
    """(..., D) in float32 (float64 for float64 inputs), differentiable by autograd."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = ACTIVATIONS[activation](x.to(dtype) + bias.to(dtype))
    return y if residual is None else y + residual.to(dtype)
