"""Bidirectional gated linear attention, one token after the other: the specification."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import computing_dtype


def bidirectional_gla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gf: Tensor,
    gb: Tensor,
    norm_weight: Tensor | None,
    scale: float,
    gate_normalizer: float | None,
    norm_eps: float,
) -> Tensor:
    """Differentiable by autograd; arguments as :func:`mmvssm_kernels.bidirectional_gla`, result float32 (float64)."""
    dtype = computing_dtype(q)
    q, k, v, gf, gb = (t.to(dtype) for t in (q, k, v, gf, gb))
    if gate_normalizer is not None:
        gf, gb = (F.logsigmoid(g) / gate_normalizer for g in (gf, gb))
    length = q.shape[1]
    total = 0
    for gate, order in ((gf, range(length)), (gb, range(length - 1, -1, -1))):
        state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])  # (B, heads, K, V)
        outputs = [None] * length
        for t in order:
            state = gate[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
            outputs[t] = (q[:, t, :, :, None] * state).sum(2)
        total = total + scale * torch.stack(outputs, dim=1)
    if norm_weight is None:
        return total
    rstd = (total.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
    return total * rstd * norm_weight.to(dtype)
