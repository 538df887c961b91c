"""Addition to a residual stream followed by RMSNorm or LayerNorm, in one pass."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import FLOATS, check_positive, check_tensor, computing_dtype
from .op import add_norm_op, is_norm_alone
from .reference import add_norm_reference

__all__ = ["add_norm"]

NORMS = ("rms", "layer")


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    norm: str = "rms",
    scale: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise over the last axis, the step before every mixer of Vim and VMamba.

    For every row, with ``scale`` of its sample::

        r = residual + scale x                                         x alone if residual is None
        y = weight r / sqrt(mean(r^2) + eps) + bias                    norm="rms"
        y = weight (r - mean(r)) / sqrt(var(r) + eps) + bias           norm="layer", var over D without correction

    Sum, statistics and normalisation are float32 (float64 for float64 inputs) and are formed before r is rounded to
    ``residual_dtype``. Twice differentiation is not supported.

    Args:
        x: Output of the previous mixer (B, ..., D), float16, bfloat16, float32 or float64, any strides.
        residual: Residual stream (B, ..., D), any floating dtype; None at the start of the stream.
        weight: Weight of the norm (D).
        bias: Bias of the norm (D).
        eps: Added to the mean square or variance, > 0.
        norm: ``"rms"`` or ``"layer"``.
        scale: Factor of ``x`` for every sample (B): 0 or 1 / keep for drop path. Receives no gradient.
        residual_dtype: Dtype of the returned residual stream, float32 (float64 for float64 inputs) if None.
        out_dtype: Dtype of the normalised rows, that of ``x`` if None.
        backend: ``auto``, ``triton``, ``torch`` or ``reference``. Triton kernels exist for D up to 8192; with ``auto``
            torch serves wider rows.

    Returns:
        Normalised rows y in ``out_dtype`` and the new residual stream r in ``residual_dtype``, both (B, ..., D) and
        contiguous. Where nothing is added, scaled or converted, r is ``x`` itself: the call is a norm alone.

    Raises:
        TypeError: If an argument is no tensor, or ``residual_dtype`` or ``out_dtype`` no dtype.
        ValueError: If a shape, dtype, device, option or the backend is wrong; the sentence names the argument.
    """
    between = ["L"] * (x.dim() - 2) if isinstance(x, Tensor) else ["..."]
    check_tensor("x", x, ("B", *between, "D"))
    channels = x.shape[-1]
    check_positive("x", channels, "channel (last axis)")
    if residual is not None:
        check_tensor("residual", residual, tuple(x.shape), x.device)
    check_tensor("weight", weight, (channels,), x.device)
    if bias is not None:
        check_tensor("bias", bias, (channels,), x.device)
    if not eps > 0:
        raise ValueError(f"eps must be greater than 0, but it is {eps}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, but it is {norm!r}")
    if scale is not None:
        check_tensor("scale", scale, (x.shape[0],), x.device)
        if scale.requires_grad:
            raise ValueError("scale must not require a gradient, because the operator computes none for it")
    residual_dtype = _checked_dtype("residual_dtype", residual_dtype, computing_dtype(x))
    out_dtype = _checked_dtype("out_dtype", out_dtype, x.dtype)
    backend = dispatch.requested_backend(backend)
    if backend == "reference":
        with dispatch.without_autocast(x.device):
            y, r = add_norm_reference(x, residual, weight, bias, eps, norm, scale)
        return y.to(out_dtype), r.to(residual_dtype)
    if x.numel() == 0:
        return x.to(out_dtype, copy=True), x.to(residual_dtype, copy=True)
    y, r = add_norm_op(x, residual, weight, bias, eps, norm, scale, residual_dtype, out_dtype, backend)
    return y, x if is_norm_alone(x, residual, scale, residual_dtype) else r


def _checked_dtype(name: str, dtype: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    if dtype is None:
        return default
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype, but it is {type(dtype).__name__}")
    if dtype not in FLOATS:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, but it is {dtype}")
    return dtype
