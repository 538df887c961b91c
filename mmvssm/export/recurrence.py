"""The one primitive of exported models: a linear recurrence over tokens, which ONNX has as the node Scan.

All scans of the package are cases of

    state_t = exp(g_t) * state_{t-1} + k_t v_t'        # (N, D) per row of the batch
    y_t = q_t' state_t

with decays g_t of every state row (gated linear attention), or of every state, g_t' rates (selective scan).
"""

import torch
from torch import Tensor


@torch.library.custom_op("mmvssm_export::recurrence", mutates_args=())
def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, rates: Tensor | None, state: Tensor) -> Tensor:
    """Outputs (L, *, D) of a scan that begins with ``state`` (*, N, D).

    Args:
        q: (L, *, N).
        k: (L, *, N).
        v: (L, *, D).
        g: (L, *, D) with rates, (L, *, N) without; log-decays are at most 0.
        rates: (*, N, D), or None.
        state: (*, N, D).
    """
    outputs = []
    for q_t, k_t, v_t, g_t in zip(q, k, v, g, strict=True):
        decay = g_t[..., None] if rates is None else g_t[..., None, :] * rates
        state = decay.exp() * state + k_t[..., None] * v_t[..., None, :]
        outputs.append((q_t[..., None, :] @ state).squeeze(-2))
    return torch.stack(outputs)


@recurrence.register_fake
def _(q, k, v, g, rates, state):
    return v.new_empty(v.shape)


def scan_tokens(q: Tensor, k: Tensor, v: Tensor, g: Tensor, rates: Tensor | None = None) -> Tensor:
    """:func:`recurrence` that begins with zeros."""
    return recurrence(q, k, v, g, rates, v.new_zeros(*v.shape[1:-1], k.shape[-1], v.shape[-1]))
