"""The gate between long and short context in ViG (arXiv:2405.18425), in one pass."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_positive, check_tensor
from .op import locality_gate_op
from .reference import locality_gate_reference

__all__ = ["locality_gate"]


def locality_gate(
    long: Tensor,
    x: Tensor,
    logits: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    silu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Mix two contexts, the second of which is normalised here, by a gate per channel.

    For every token and head, with V channels::

        short = weight * x / sqrt(mean(x^2) + eps)
        y = s long + (1 - s) short        with s = sigmoid(logits + bias)

    and with ``silu`` the activation y sigmoid(y) of that. Computed in float32 (float64 for float64 inputs). Twice
    differentiation is not supported.

    Args:
        long: Long context (..., heads, V), as :func:`mmvssm_kernels.bidirectional_gla` returns it with a norm.
        x: Short context (..., heads, V), the features of each token itself.
        logits: Logits of the gate (..., heads, V). All three may have any strides and their own dtype; views of a
            projection's output are read in place.
        weight: Weight of the norm (V), shared by all heads.
        bias: Bias of the logits (heads * V), as that of a projection; None for no bias.
        eps: Added to the mean square, > 0.
        silu: Whether SiLU follows.
        backend: ``auto``, ``triton``, ``torch`` or ``reference``. Triton kernels exist for V up to 2048; with ``auto``
            torch serves wider heads.

    Returns:
        (..., heads, V), contiguous, in the dtype of ``long``.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If a shape, dtype, device, number or the backend is wrong; the sentence names the argument.

    Example:
        >>> long, x, logits = torch.randn(3, 2, 196, 6, 64).unbind()
        >>> y = locality_gate(long, x, logits, torch.ones(64))
    """
    axes = ["L"] * (long.dim() - 2) if isinstance(long, torch.Tensor) else ["..."]
    check_tensor("long", long, (*axes, "heads", "V"))
    values = long.shape[-1]
    check_positive("long", values, "channel (last axis)")
    for name, tensor in (("x", x), ("logits", logits)):
        check_tensor(name, tensor, tuple(long.shape), long.device)
    check_tensor("weight", weight, (values,), long.device)
    if bias is not None:
        check_tensor("bias", bias, (long.shape[-2] * values,), long.device)
    if not eps > 0:
        raise ValueError(f"eps must be greater than 0, but it is {eps}")
    backend = dispatch.requested_backend(backend)
    if backend == "reference":
        return locality_gate_reference(long, x, logits, weight, bias, eps, silu).to(long.dtype)
    if long.numel() == 0:
        return long.clone(memory_format=torch.contiguous_format)
    return locality_gate_op(long, x, logits, weight, bias, float(eps), bool(silu), backend)
