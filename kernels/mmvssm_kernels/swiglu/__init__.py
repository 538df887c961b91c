"""The gate of a SwiGLU perceptron, in one pass."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_positive, check_tensor
from .op import swiglu_op
from .reference import swiglu_reference

__all__ = ["swiglu"]


def swiglu(x: Tensor, backend: str = "auto") -> Tensor:
    """SiLU(a) * b with [a | b] = x: what stands between the two projections of a gated perceptron (arXiv:2002.05202).

    Computed in float32 (float64 for float64 inputs). Twice differentiation is not supported.

    Args:
        x: Output of the first projection (..., 2 H), float16, bfloat16, float32 or float64, any strides.
        backend: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        (..., H), contiguous, in the dtype of ``x``.

    Raises:
        TypeError: If ``x`` is no tensor.
        ValueError: If the last axis is empty or odd, or the dtype or backend is wrong.

    Example:
        >>> hidden = swiglu(torch.randn(2, 196, 2 * 512))
    """
    axes = ["L"] * (x.dim() - 1) if isinstance(x, torch.Tensor) else ["..."]
    check_tensor("x", x, (*axes, "2H"))
    check_positive("x", x.shape[-1], "channel (last axis)")
    if x.shape[-1] % 2:
        raise ValueError(f"x must have an even number of channels (last axis), but it has {x.shape[-1]}")
    backend = dispatch.requested_backend(backend)
    if backend == "reference":
        return swiglu_reference(x).to(x.dtype)
    if x.numel() == 0:
        return x[..., : x.shape[-1] // 2].clone(memory_format=torch.contiguous_format)
    return swiglu_op(x, backend)
