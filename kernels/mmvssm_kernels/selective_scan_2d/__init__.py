"""Four-direction selective scan of a feature map, the SS2D core of VMamba (arXiv:2401.10166, section 4.2)."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_positive, check_tensor, checked_dtype, computing_dtype
from .op import selective_scan_2d_op
from .reference import selective_scan_2d_reference

__all__ = ["selective_scan_2d"]


def selective_scan_2d(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scan a feature map along rows, columns and both reversed, and add the four results at their pixels.

    Each direction k projects its own step sizes, input and output weights from the sequence and runs a selective scan
    (:func:`mmvssm_kernels.selective_scan`) with softplus, step-size bias, skip and ``A = -exp(A_log)``::

        [r | B | C] = x_proj_weight[k] x[t]         R, N and N values
        dt          = softplus(dt_proj_weight[k] r + dt_proj_bias[k])

    Projections are computed in the dtype of ``x``, everything after them in float32 (float64 for float64 inputs).

    Args:
        x: Feature map (B, D, H, W), any strides; channel-last memory is the fast path.
        x_proj_weight: (4, R + 2N, D).
        dt_proj_weight: (4, D, R).
        dt_proj_bias: (4, D).
        A_log: (4 D, N).
        D: Skip weights (4 D).
        out_dtype: Dtype of the result; None means float32 (float64 for float64 inputs).
        backend: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        (B, D, H, W) in channel-last memory.

    Raises:
        TypeError: If an argument is no tensor, or ``out_dtype`` no dtype.
        ValueError: If a shape, dtype, device or the backend is wrong; the sentence names the argument.
    """
    check_tensor("x", x, ("B", "D", "H", "W"))
    batch, channels, height, width = x.shape
    check_positive("x", channels, "channel (axis 1)")
    check_positive("x", height, "row (axis 2)")
    check_positive("x", width, "column (axis 3)")
    check_tensor("A_log", A_log, (4 * channels, "N"), x.device)
    check_tensor("dt_proj_weight", dt_proj_weight, (4, channels, "R"), x.device)
    state, rank = A_log.shape[1], dt_proj_weight.shape[2]
    check_positive("A_log", state, "state (axis 1)")
    check_positive("dt_proj_weight", rank, "rank (axis 2)")
    check_tensor("x_proj_weight", x_proj_weight, (4, rank + 2 * state, channels), x.device)
    check_tensor("dt_proj_bias", dt_proj_bias, (4, channels), x.device)
    check_tensor("D", D, (4 * channels,), x.device)
    out_dtype = checked_dtype("out_dtype", out_dtype, computing_dtype(x))
    backend = dispatch.requested_backend(backend)
    weights = (x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    if backend == "reference":
        with dispatch.without_autocast(x.device):
            return selective_scan_2d_reference(x, *weights).to(out_dtype)
    if batch == 0:
        return x.to(out_dtype, copy=True)
    return selective_scan_2d_op(x, *weights, out_dtype, backend)[0]
