"""Selective scan in plain torch, fast enough to train small models on a CPU.

Time is the first axis, so that every step of the recurrence works on one contiguous row. All functions here take
time-first tensors: L tokens, B batch, E channels, G groups, N states.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

# Below this row length the cost of a step is its overhead; then chunks of the sequence are treated as further rows.
_SHORT_ROW = 1500
_LONG_SEQUENCE = 256
_CHUNK = 32


def linear_recurrence_(decay: torch.Tensor, value: torch.Tensor, reverse: bool = False) -> torch.Tensor:
    """In place ``value[t] += decay[t] * value[t - 1]`` (``t + 1`` when reversed) over the first axis.

    Args:
        decay: (L, ...) factors, contiguous.
        value: (L, ...) inputs, contiguous; overwritten by the states.
        reverse: Walk from the last token to the first.

    Returns:
        ``value``.
    """
    length = value.shape[0]
    row = value[0].numel() if length else 0
    if length > _LONG_SEQUENCE and row < _SHORT_ROW:
        return _chunked_recurrence_(decay, value, reverse)
    order = range(length - 2, -1, -1) if reverse else range(1, length)
    step = 1 if reverse else -1
    rows, factors = value.unbind(0), decay.unbind(0)
    for t in order:
        rows[t].addcmul_(factors[t], rows[t + step])
    return value


def _chunked_recurrence_(decay: torch.Tensor, value: torch.Tensor, reverse: bool) -> torch.Tensor:
    """Recurrence inside all chunks at once, then chunk by chunk the carry that reaches every token."""
    length = value.shape[0]
    whole = length // _CHUNK * _CHUNK
    head, tail = (length - whole, length) if reverse else (0, whole)  # the chunked part; the rest is walked plainly
    shape = (whole // _CHUNK, _CHUNK, -1)
    local = value[head:tail].reshape(shape).transpose(0, 1).contiguous()
    factor = decay[head:tail].reshape(shape).transpose(0, 1).contiguous()
    linear_recurrence_(factor, local, reverse)
    products = factor.flip(0).cumprod_(0).flip(0) if reverse else factor.cumprod(0)
    order = range(shape[0] - 2, -1, -1) if reverse else range(1, shape[0])
    edge, step = (0, 1) if reverse else (-1, -1)
    for c in order:
        local[:, c].addcmul_(products[:, c], local[edge, c + step])
    value[head:tail] = local.transpose(0, 1).reshape(value[head:tail].shape)
    rest = range(head - 1, -1, -1) if reverse else range(tail, length)
    for t in rest:
        value[t].addcmul_(decay[t], value[t + step])
    return value


class ScanGradients(NamedTuple):
    """Gradients of :func:`scan_forward`; time-first like its arguments, float32 (float64)."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    delta_bias: torch.Tensor | None


def _states(u, delta, A, B, delta_bias, delta_softplus):
    """Step sizes (L, B, E), decays and states (L, B, G, E/G, N)."""
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    length, batch, channels = u.shape
    groups = B.shape[2]
    grouped = (length, batch, groups, channels // groups, 1)
    decay = torch.exp(delta.reshape(grouped) * A.view(groups, channels // groups, -1))
    states = (delta * u).reshape(grouped) * B[:, :, :, None, :]
    # A state of size one keeps no axis of its own in memory, so the product above is dense already.
    return delta, decay, linear_recurrence_(decay, states.contiguous())


def scan_forward(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
    """Selective scan without gate, first token first.

    Args:
        u: (L, B, E) inputs, float32 or float64 like everything here.
        delta: (L, B, E) step sizes before bias and softplus.
        A: (E, N) negative decay rates.
        B: (L, B, G, N) input weights.
        C: (L, B, G, N) output weights.
        D: (E) skip weights.
        delta_bias: (E).
        delta_softplus: Whether softplus turns ``delta + delta_bias`` into step sizes.

    Returns:
        Output (L, B, E) and last state (B, E, N).
    """
    _, _, states = _states(u, delta, A, B, delta_bias, delta_softplus)
    y = torch.einsum("lbgen,lbgn->lbge", states, C).reshape(u.shape)
    if D is not None:
        y = y + D * u
    return y, states[-1].flatten(1, 2).clone()


def scan_backward(dy, dlast, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False) -> ScanGradients:
    """Gradients of :func:`scan_forward` by the adjoint recurrence (Mamba, arXiv:2312.00752); recomputes the states.

    Args:
        dy: (L, B, E) gradient of the output.
        dlast: (B, E, N) gradient of the last state, or None.
        u: As in :func:`scan_forward`, and so the rest.
    """
    raw = delta
    delta, decay, states = _states(u, raw, A, B, delta_bias, delta_softplus)
    grouped = decay.shape[:-1]
    A = A.view(*grouped[2:], -1)
    dy_grouped = dy.reshape(grouped)
    adjoint = dy_grouped[..., None] * C[:, :, :, None, :]
    if dlast is not None:
        adjoint[-1] += dlast.view(adjoint[-1].shape)
    following = torch.cat([decay[1:], torch.zeros_like(decay[:1])])
    linear_recurrence_(following, adjoint, reverse=True)
    dC = torch.einsum("lbgen,lbge->lbgn", states, dy_grouped)
    du_delta = torch.einsum("lbgen,lbgn->lbge", adjoint, B).reshape(u.shape)
    dB = torch.einsum("lbgen,lbge->lbgn", adjoint, (delta * u).reshape(grouped))
    carried = adjoint[1:] * decay[1:] * states[:-1]  # the first token has no state before it
    ddelta = u * du_delta
    ddelta[1:] += torch.einsum("lbgen,gen->lbge", carried, A).reshape(ddelta[1:].shape)
    dA = torch.einsum("lbgen,lbge->gen", carried, delta.reshape(grouped)[1:]).flatten(0, 1)
    du = delta * du_delta
    if D is not None:
        du = du + D * dy
    if delta_softplus:
        # d softplus(x) = sigmoid(x) = 1 - exp(-softplus(x))
        ddelta = ddelta * -torch.expm1(-delta)
    return ScanGradients(
        du,
        ddelta,
        dA,
        dB,
        dC,
        None if D is None else (u * dy).sum((0, 1)),
        None if delta_bias is None else ddelta.sum((0, 1)),
    )
