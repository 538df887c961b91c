"""The gate between long and short context with its gradients in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import computing_dtype


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows (..., V) of mean square one, and the factor (..., 1) that made them so."""
    factor = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
    return x * factor, factor


def _gate(logits: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """sigmoid(logits + bias)."""
    logits = logits.to(dtype)
    return torch.sigmoid(logits if bias is None else logits + bias.to(dtype).view(logits.shape[-2:]))


def locality_gate_forward(long, x, logits, weight, bias, eps, silu) -> Tensor:
    """(..., heads, V) in the dtype of ``long``, contiguous."""
    dtype = computing_dtype(long)
    short = _unit(x.to(dtype), eps)[0].mul_(weight.to(dtype))
    y = torch.lerp(short, long.to(dtype), _gate(logits, bias, dtype))
    y = F.silu(y) if silu else y
    return y.to(long.dtype).contiguous()


def locality_gate_backward(dy, long, x, logits, weight, bias, eps, silu) -> tuple[Tensor, ...]:
    """Gradients of ``long``, ``x``, ``logits``, ``weight`` and ``bias``, the last empty without one."""
    dtype = computing_dtype(long)
    grad, wide_long, weights = dy.to(dtype), long.to(dtype), weight.to(dtype)
    unit, factor = _unit(x.to(dtype), eps)
    short, s = unit * weights, _gate(logits, bias, dtype)
    if silu:
        y = torch.lerp(short, wide_long, s)
        sigmoid = torch.sigmoid(y)
        grad = grad * sigmoid * (1 + y * (1 - sigmoid))
    dshort = grad * (1 - s)
    dunit = dshort * weights
    dx = factor * (dunit - unit * (dunit * unit).mean(-1, keepdim=True))
    dlogits = grad * (wide_long - short) * s * (1 - s)
    dweight = (dshort * unit).flatten(0, -2).sum(0)
    gradients = zip((grad * s, dx, dlogits, dweight), (long, x, logits, weight), strict=True)
    dbias = long.new_empty(0) if bias is None else dlogits.flatten(-2).flatten(0, -2).sum(0).to(bias.dtype)
    return *(g.to(t.dtype).contiguous() for g, t in gradients), dbias
