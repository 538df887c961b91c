"""The gate of a SwiGLU perceptron with its gradient in plain torch."""

import torch
from torch import Tensor

from ..checks import computing_dtype


def swiglu_forward(x: Tensor) -> Tensor:
    """(..., 2 H) to (..., H) in the dtype of ``x``."""
    a, b = x.to(computing_dtype(x)).chunk(2, dim=-1)
    return torch.nn.functional.silu(a).mul_(b).to(x.dtype).contiguous()


def swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of ``x``."""
    dtype = computing_dtype(x)
    dy = dy.to(dtype)
    a, b = x.to(dtype).chunk(2, dim=-1)
    sigmoid = torch.sigmoid(a)
    da = dy * b * sigmoid * (1 + a * (1 - sigmoid))
    return torch.cat([da, dy * a * sigmoid], dim=-1).to(x.dtype).contiguous()
