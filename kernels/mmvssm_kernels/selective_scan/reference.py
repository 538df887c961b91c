"""Selective scan by its recurrence: the specification of the operator (Mamba, arXiv:2312.00752, section 3)."""

import torch
import torch.nn.functional as F


def selective_scan_reference(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, reverse=False
) -> tuple[torch.Tensor, torch.Tensor]:
    """One recurrence step per token in float32 (float64 for float64 inputs), differentiable by autograd.

    Args as :func:`mmvssm_kernels.selective_scan`, with B and C of shape (B, G, N, L).

    Returns:
        Output (B, D, L) and last state (B, D, N) in the computing type.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    channels_per_group = u.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(channels_per_group, dim=1) for t in (B, C))  # (B, D, N, L)
    steps = range(u.shape[2])
    state = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    outputs = [None] * len(steps)
    for t in reversed(steps) if reverse else steps:
        decay = torch.exp(delta[:, :, t, None] * A)
        state = decay * state + (delta[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        outputs[t] = (state * C[..., t]).sum(-1)
    y = torch.stack(outputs, dim=2)
    if D is not None:
        y = y + D.to(dtype)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y, state
