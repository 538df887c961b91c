"""Index arithmetic and memory order shared by the backends.

All four kinds of padding are one: with taps ``w`` in ascending order of tokens and ``left`` tokens before the current
one, ``y[t] = sum_k w[k] x[t - left + k]``.
"""

import torch
from torch import Tensor


def tokens_before(width: int, reverse: bool, padding: str) -> int:
    """Number of tokens before the current one that a window of ``width`` taps reaches, ``left`` in the formulas."""
    left = width - 1 if padding == "causal" else (width - 1) // 2
    return width - 1 - left if reverse else left


def is_channel_first(x: Tensor) -> bool:
    """Whether (B, D, L) has adjacent tokens in memory; if both axes have stride one, it counts as channel-last."""
    return x.stride(2) == 1 and x.stride(1) != 1


def empty_in_order(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised dense tensor of the shape and in the memory order of ``x`` (B, D, L)."""
    batch, channels, length = x.shape
    if is_channel_first(x):
        return x.new_empty(batch, channels, length, dtype=dtype)
    return x.new_empty(batch, length, channels, dtype=dtype).transpose(1, 2)
