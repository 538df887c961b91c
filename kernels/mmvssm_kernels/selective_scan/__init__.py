"""One-direction selective scan (Mamba, arXiv:2312.00752, section 3)."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_positive, check_tensor, checked_dtype
from .op import selective_scan_op
from .reference import selective_scan_reference

__all__ = ["selective_scan"]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    return_last_state: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state-space scan over a sequence.

    With ``dt = softplus(delta + delta_bias)`` (or ``delta + delta_bias``), for every batch element and channel::

        h[t] = exp(dt[t] A) h[t - 1] + dt[t] B[t] u[t]          state of size N, zero before the first token
        y[t] = sum_n C[t, n] h[t, n] + D u[t]                   times silu(z[t]) if z is given

    States, decays and sums are float32 (float64 for float64 inputs). Twice differentiation is not supported.

    Args:
        u: Inputs (B, D, L), float16, bfloat16, float32 or float64, any strides.
        delta: Step sizes before bias and softplus (B, D, L).
        A: Negative decay rates (D, N).
        B: Input weights (B, N, L), or (B, G, N, L) for G groups of D / G channels each.
        C: Output weights, shaped like ``B``.
        D: Skip weights (D).
        z: Gate (B, D, L).
        delta_bias: Bias of the step sizes (D).
        delta_softplus: Whether softplus is applied to the step sizes.
        reverse: Scan from the last token to the first.
        return_last_state: Whether to return the state after the last step, too.
        out_dtype: Dtype of the output; None means that of ``u``.
        backend: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        Output (B, D, L) in ``out_dtype``; with ``return_last_state`` also the state (B, D, N), float32 (float64).

    Raises:
        TypeError: If an argument is no tensor, or ``out_dtype`` no dtype.
        ValueError: If a shape, dtype, device or the backend is wrong; the sentence names the argument.
    """
    check_tensor("u", u, ("B", "D", "L"))
    batch, channels, length = u.shape
    check_positive("u", channels, "channel (axis 1)")
    check_positive("u", length, "token (axis 2)")
    check_tensor("delta", delta, (batch, channels, length), u.device)
    check_tensor("A", A, (channels, "N"), u.device)
    state = A.shape[1]
    check_positive("A", state, "state (axis 1)")
    B, C = (t[:, None] if isinstance(t, Tensor) and t.dim() == 3 else t for t in (B, C))
    check_tensor("B", B, (batch, "G", state, length), u.device)
    groups = B.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"B must have a number of groups (axis 1) that divides the {channels} channels, not {groups}")
    check_tensor("C", C, (batch, groups, state, length), u.device)
    if D is not None:
        check_tensor("D", D, (channels,), u.device)
    if z is not None:
        check_tensor("z", z, (batch, channels, length), u.device)
    if delta_bias is not None:
        check_tensor("delta_bias", delta_bias, (channels,), u.device)
    out_dtype = checked_dtype("out_dtype", out_dtype, u.dtype)
    backend = dispatch.requested_backend(backend)
    if backend == "reference":
        with dispatch.without_autocast(u.device):
            y, last = selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
        y = y.to(out_dtype)
    elif batch == 0:
        y, last = u.to(out_dtype, copy=True), A.new_zeros(0, channels, state)
    else:
        tensors = (u, delta, A, B, C, D, z, delta_bias)
        # The kernels keep some states for the backward pass; inference and torch do not need them.
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        keep_states = learns and (u.is_cuda or backend == "triton")
        options = (delta_softplus, reverse, keep_states, out_dtype, backend)
        y, last, _ = selective_scan_op(*tensors, *options)
    return (y, last) if return_last_state else y
