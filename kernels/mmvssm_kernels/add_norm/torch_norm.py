"""Addition and normalisation with their gradients in plain torch."""

import torch
from torch import Tensor

from ..checks import computing_dtype


def _per_sample(scale: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Factors (B) in a shape that multiplies ``x`` (B, ..., D)."""
    return scale.to(dtype).reshape(-1, *[1] * (x.dim() - 1))


def _normalised(r: Tensor, eps: float, norm: str) -> tuple[Tensor, Tensor]:
    """Rows (..., D) of mean square (variance) one, and the factor (..., 1) that made them so."""
    centred = r if norm == "rms" else r - r.mean(-1, keepdim=True)
    factor = torch.rsqrt(centred.square().mean(-1, keepdim=True).add_(eps))
    return centred * factor, factor


def add_norm_forward(x, residual, weight, bias, eps, norm, scale, residual_dtype, out_dtype) -> tuple[Tensor, Tensor]:
    """Normalised rows and residual stream (empty if ``residual_dtype`` is None); arguments as the public ones."""
    dtype = computing_dtype(x)
    r = x.to(dtype)
    if scale is not None:
        r = r * _per_sample(scale, x, dtype)
    if residual is not None:
        r = r + residual.to(dtype)
    y = _normalised(r, eps, norm)[0].mul_(weight.to(dtype))
    if bias is not None:
        y.add_(bias.to(dtype))
    stream = x.new_empty(0) if residual_dtype is None else x.new_empty(x.shape, dtype=residual_dtype).copy_(r)
    return x.new_empty(x.shape, dtype=out_dtype).copy_(y), stream


def add_norm_backward(
    dy, dr, r, weight, bias, eps, norm, scale, x_dtype, in_dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias; empty where ``in_dtype``, the residual's dtype, or bias is None.

    Args:
        dy: Gradient of the normalised rows, or None.
        dr: Gradient of the returned residual stream, or None.
        r: Residual stream of the forward pass, any strides.
        weight: As in the forward pass, and so are bias, eps, norm and scale.
        x_dtype: Dtype of x.
        in_dtype: Dtype of the gradient of residual, None if it is not wanted.
    """
    dtype = torch.promote_types(x_dtype, torch.float32)
    rows = r.to(dtype)
    gradient = torch.zeros_like(rows) if dr is None else dr.to(dtype)
    dweight = dbias = rows.new_zeros(r.shape[-1])
    if dy is not None:
        axes = tuple(range(r.dim() - 1))
        dy = dy.to(dtype)
        unit, factor = _normalised(rows, eps, norm)
        dweight, dbias = (dy * unit).sum(axes), dy.sum(axes)
        dunit = dy * weight.to(dtype)
        inner = dunit - unit * (dunit * unit).mean(-1, keepdim=True)
        if norm == "layer":
            inner -= dunit.mean(-1, keepdim=True)
        gradient = gradient + factor * inner
    dx = gradient if scale is None else gradient * _per_sample(scale, r, dtype)
    return (
        r.new_empty(r.shape, dtype=x_dtype).copy_(dx),
        r.new_empty(0) if in_dtype is None else r.new_empty(r.shape, dtype=in_dtype).copy_(gradient),
        torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(dweight),
        r.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format).copy_(dbias),
    )
