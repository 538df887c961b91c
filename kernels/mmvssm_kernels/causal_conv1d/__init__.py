"""Depthwise convolution over a sequence: causal, anti-causal or centred, with an optional SiLU."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_positive, check_tensor, checked_dtype
from .op import causal_conv1d_op
from .reference import causal_conv1d_reference

__all__ = ["causal_conv1d"]

ACTIVATIONS = (None, "silu")
PADDINGS = ("causal", "same")


def _check_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but it is {value!r}")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    reverse: bool = False,
    padding: str = "causal",
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution along a sequence that keeps its length.

    With W taps, for every batch element and channel, and x zero outside 0 .. L - 1::

        causal                  y[t] = bias + sum_k weight[k] x[t - (W - 1) + k]
        causal, reverse         y[t] = bias + sum_k weight[k] x[t + (W - 1) - k]
        same                    y[t] = bias + sum_k weight[k] x[t - (W - 1) // 2 + k]
        same, reverse           y[t] = bias + sum_k weight[k] x[t + (W - 1) // 2 - k]

    then ``silu(y)`` with ``activation="silu"``. In both causal orders the last tap, ``weight[W - 1]``, belongs to token
    t itself: ``reverse`` gives what flipping x, convolving and flipping back would give, without a flipped copy.
    ``same`` pads like ``torch.nn.Conv1d(padding="same")``. Sums are float32 (float64 for float64 inputs). Twice
    differentiation is not supported.

    Args:
        x: Inputs (B, D, L), float16, bfloat16, float32 or float64, any strides. Channel-last memory, for example the
            transposed view of (B, L, D) or of a slice of a wider projection, is the fast path and is not copied.
        weight: Taps (D, W), W >= 1; of an ``nn.Conv1d`` with ``groups=D`` it is ``conv.weight[:, 0]``.
        bias: Bias (D).
        activation: None or ``"silu"``.
        reverse: Run from the last token to the first.
        padding: ``"causal"`` or ``"same"``.
        out_dtype: Dtype of the output; None means that of ``x``.
        backend: ``auto``, ``triton``, ``torch`` or ``reference``. Triton kernels exist for up to 4 taps; with ``auto``
            torch serves wider ones.

    Returns:
        Output (B, D, L) in ``out_dtype``. Its memory is channel-first where the tokens of ``x`` are adjacent in
        memory, and channel-last otherwise.

    Raises:
        TypeError: If an argument is no tensor, or ``out_dtype`` no dtype.
        ValueError: If a shape, dtype, device, option or the backend is wrong; the sentence names the argument.
    """
    check_tensor("x", x, ("B", "D", "L"))
    batch, channels, length = x.shape
    check_positive("x", channels, "channel (axis 1)")
    check_positive("x", length, "token (axis 2)")
    check_tensor("weight", weight, (channels, "W"), x.device)
    check_positive("weight", weight.shape[1], "tap (axis 1)")
    if bias is not None:
        check_tensor("bias", bias, (channels,), x.device)
    _check_choice("activation", activation, ACTIVATIONS)
    _check_choice("padding", padding, PADDINGS)
    out_dtype = checked_dtype("out_dtype", out_dtype, x.dtype)
    backend = dispatch.requested_backend(backend)
    if backend == "reference":
        with dispatch.without_autocast(x.device):
            return causal_conv1d_reference(x, weight, bias, activation, reverse, padding).to(out_dtype)
    if batch == 0:
        return x.to(out_dtype, copy=True)
    return causal_conv1d_op(x, weight, bias, activation, reverse, padding, out_dtype, backend)
