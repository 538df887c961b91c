"""Bias, activation and residual sum after a convolution or projection, in one pass."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_positive, check_tensor
from .op import bias_activation_op
from .reference import ACTIVATIONS, bias_activation_reference

__all__ = ["bias_activation"]


def bias_activation(
    x: Tensor,
    bias: Tensor,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """What follows a convolution whose batch norm has been folded into it: ``activation(x + bias) + residual``.

    Channels are the last axis; of a convolution's channels_last result that is ``y.permute(0, 2, 3, 1)``. Computed in
    float32 (float64 for float64 inputs) and rounded once. Twice differentiation is not supported.

    Args:
        x: Result of the convolution without its bias (..., D), float16, bfloat16, float32 or float64, any strides.
        bias: Bias (D), any floating dtype.
        activation: None, ``"relu"`` or ``"gelu_tanh"`` (the tanh approximation).
        residual: Added at the end (..., D), any floating dtype.
        backend: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        (..., D), contiguous, in the dtype of ``x``.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If a shape, dtype, device, option or the backend is wrong; the sentence names the argument.
    """
    axes = ["L"] * (x.dim() - 1) if isinstance(x, torch.Tensor) else ["..."]
    check_tensor("x", x, (*axes, "D"))
    channels = x.shape[-1]
    check_positive("x", channels, "channel (last axis)")
    check_tensor("bias", bias, (channels,), x.device)
    if residual is not None:
        check_tensor("residual", residual, tuple(x.shape), x.device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, but it is {activation!r}")
    backend = dispatch.requested_backend(backend)
    if backend == "reference":
        with dispatch.without_autocast(x.device):
            return bias_activation_reference(x, bias, activation, residual).to(x.dtype)
    if x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    return bias_activation_op(x, bias, activation, residual, backend)
