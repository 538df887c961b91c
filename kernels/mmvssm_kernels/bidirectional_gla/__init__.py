"""Gated linear attention over a sequence and its reverse, the token mixer's core of ViG (arXiv:2405.18425)."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_positive, check_tensor, checked_dtype
from .op import bidirectional_gla_op
from .reference import bidirectional_gla_reference

__all__ = ["bidirectional_gla"]


def bidirectional_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gf: Tensor,
    gb: Tensor,
    scale: float | None = None,
    *,
    gate_normalizer: float | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend with two decaying states of K x V numbers, one from either end, and add both results.

    For every batch element and head, with states that are zero before the first and behind the last token::

        F[t] = exp(gf[t]) F[t - 1] + k[t] v[t]^T        R[t] = exp(gb[t]) R[t + 1] + k[t] v[t]^T
        o[t] = scale * (F[t] + R[t])^T q[t]

    so a token counts twice for itself. States, decays and sums are float32 (float64 for float64 inputs), and no
    gate is too strong: a state may decay to nothing within one token.

    With ``norm_weight`` an RMS norm over the values of each head follows, applied to the float32 sum before it is
    rounded::

        out[t] = norm_weight * o[t] / sqrt(mean(o[t]^2) + norm_eps)

    A factor by which a model merges the directions belongs into ``scale``: an average is ``scale = K**-0.5 / 2``. A
    norm cancels such a factor only as far as ``norm_eps`` does not matter, so it is not left out. (Published ViG: 1/2,
    and 1/4 when the plain models are evaluated.)

    Args:
        q: Queries (B, L, heads, K), any strides; views of a projection's output are read in place.
        k: Keys (B, L, heads, K).
        v: Values (B, L, heads, V).
        gf: Log-decays of the forward direction (B, L, heads, K), none positive; the first token's have no effect.
        gb: Log-decays of the backward direction (B, L, heads, K); the last token's have no effect.
        scale: Factor of the result; None means ``K**-0.5``.
        gate_normalizer: If given, ``gf`` and ``gb`` are raw logits, and the log-decays are
            ``logsigmoid(logit) / gate_normalizer``, computed in float32.
        norm_weight: Weights (V) of an RMS norm, shared by all heads; None for no norm.
        norm_eps: Added to the mean square.
        out_dtype: Dtype of the result; None means that of ``q``.
        backend: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        (B, L, heads, V), contiguous.

    Raises:
        TypeError: If an argument is no tensor, or ``out_dtype`` no dtype.
        ValueError: If a shape, dtype, device, number or the backend is wrong; the sentence names the argument.

    Example:
        >>> q, k, gf, gb = torch.randn(4, 2, 196, 3, 32).unbind()
        >>> out = bidirectional_gla(q, k, torch.randn(2, 196, 3, 64), gf, gb, gate_normalizer=16)
    """
    check_tensor("q", q, ("B", "L", "heads", "K"))
    batch, length, heads, keys = q.shape
    check_positive("q", length, "token (axis 1)")
    check_positive("q", heads, "head (axis 2)")
    check_positive("q", keys, "key (axis 3)")
    check_tensor("v", v, (batch, length, heads, "V"), q.device)
    values = v.shape[3]
    check_positive("v", values, "value (axis 3)")
    for name, tensor in (("k", k), ("gf", gf), ("gb", gb)):
        check_tensor(name, tensor, (batch, length, heads, keys), q.device)
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, (values,), q.device)
        if not norm_eps > 0:
            raise ValueError(f"norm_eps must be positive, but it is {norm_eps}")
    if gate_normalizer is not None and not gate_normalizer > 0:
        raise ValueError(f"gate_normalizer must be positive, but it is {gate_normalizer}")
    out_dtype = checked_dtype("out_dtype", out_dtype, q.dtype)
    scale = keys**-0.5 if scale is None else float(scale)
    gate_normalizer = None if gate_normalizer is None else float(gate_normalizer)
    tensors = (q, k, v, gf, gb, norm_weight)
    backend = dispatch.requested_backend(backend)
    if backend == "reference":
        with dispatch.without_autocast(q.device):
            return bidirectional_gla_reference(*tensors, scale, gate_normalizer, norm_eps).to(out_dtype)
    if batch == 0:
        return v.to(out_dtype, copy=True)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return bidirectional_gla_op(*tensors, scale, gate_normalizer, float(norm_eps), out_dtype, keep, backend)[0]
