"""The inner block of Vim (Vision Mamba, arXiv:2401.09417, section 3.2): two convolutions, two scans, one gate."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_positive, check_tensor, checked_dtype
from .op import bidirectional_selective_scan_op
from .parameters import ScanParameters, check_alike, check_parameters
from .reference import bidirectional_selective_scan_reference

__all__ = ["ScanParameters", "bidirectional_selective_scan"]


def bidirectional_selective_scan(
    xz: Tensor,
    forward: ScanParameters,
    backward: ScanParameters | None,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scan a sequence in both directions, add the results and gate the sum.

    With x and z the halves of ``xz`` along channels, every direction computes, from its first to its last token::

        u[t]        = silu(conv_bias + sum_k conv_weight[k] x[t - W + 1 + k])       depthwise, zero before the sequence
        [r | B | C] = x_proj_weight u[t]                                            R, N and N values
        dt          = softplus(dt_proj_weight r + dt_proj_bias)
        h[t]        = exp(dt A) h[t - 1] + dt u[t] B                                A = -exp(A_log)
        y[t]        = sum_n C_n h[t, n] + D u[t]

    and the result is ``scale (y_forward + y_backward) silu(z)``. The backward direction runs from the last token to the
    first, its convolution too; no reversed copy is made. States, decays and sums are float32 (float64 for float64
    inputs), rounded once at the end. Twice differentiation is not supported.

    Args:
        xz: Inputs and gate (B, L, 2E), float16, bfloat16, float32 or float64, any strides.
        forward: Parameters of the direction from the first token to the last, any floating dtypes.
        backward: Parameters of the other direction, of the same sizes; None for one direction only.
        scale: Factor of the sum; Vim takes the mean of the directions, 0.5.
        out_dtype: Dtype of the result; None means that of ``xz``.
        backend: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        (B, L, E) in ``out_dtype``, contiguous.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a shape, dtype, device or the backend is wrong; the sentence names the argument.

    Example:
        >>> channels, rank, state = 8, 2, 4
        >>> parameters = ScanParameters(
        ...     conv_weight=torch.randn(channels, 4), conv_bias=torch.zeros(channels),
        ...     x_proj_weight=torch.randn(rank + 2 * state, channels), dt_proj_weight=torch.randn(channels, rank),
        ...     dt_proj_bias=torch.zeros(channels), A_log=torch.zeros(channels, state), D=torch.ones(channels))
        >>> bidirectional_selective_scan(torch.randn(2, 10, 16), parameters, parameters, scale=0.5).shape
        torch.Size([2, 10, 8])
    """
    check_tensor("xz", xz, ("B", "L", "2E"))
    batch, length, columns = xz.shape
    check_positive("xz", length, "token (axis 1)")
    check_positive("xz", columns, "channel (axis 2)")
    if columns % 2:
        raise ValueError(f"xz must hold inputs and gate, an even number of channels, but axis 2 has {columns}")
    channels = columns // 2
    forward = check_parameters("forward", forward, channels, xz.device)
    if backward is not None:
        backward = check_parameters("backward", backward, channels, xz.device)
        check_alike(forward, backward)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number, but it is {type(scale).__name__}")
    out_dtype = checked_dtype("out_dtype", out_dtype, xz.dtype)
    backend = dispatch.requested_backend(backend)
    if backend == "reference":
        with dispatch.without_autocast(xz.device):
            y = bidirectional_selective_scan_reference(xz, forward, backward, scale)
            return y.to(out_dtype).contiguous()
    parameters = [*forward, *(backward or ())]
    if batch == 0:
        return xz[..., :channels].to(out_dtype, copy=True, memory_format=torch.contiguous_format)
    # The kernels keep the states at tile borders for the backward pass; inference and torch do not need them.
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (xz, *parameters))
    keep_states = learns and (xz.is_cuda or backend == "triton")
    return bidirectional_selective_scan_op(xz, parameters, float(scale), keep_states, out_dtype, backend)[0]
