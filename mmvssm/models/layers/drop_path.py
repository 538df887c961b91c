"""Stochastic depth (https://arxiv.org/abs/1603.09382)."""

import torch
from torch import nn


class DropPath(nn.Module):
    """Drop a residual branch per sample and rescale the survivors; the identity in eval mode.

    Args:
        drop_prob: Probability to drop the branch of a sample, in [0, 1).
    """

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, ...) to a tensor of the same shape and dtype."""
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def sample_scale(self, x: torch.Tensor) -> torch.Tensor | None:
        """The factors (B) that :meth:`forward` would multiply the samples of x by; None for the identity."""
        if not self.training or self.drop_prob == 0:
            return None
        keep = 1 - self.drop_prob
        return x.new_empty(x.shape[0], dtype=torch.float32).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


def drop_path_rates(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates that grow linearly from 0 to ``rate`` over all blocks, as one list per stage."""
    total = sum(depths)
    rates = [rate * k / max(total - 1, 1) for k in range(total)]
    return [rates[sum(depths[:i]) : sum(depths[: i + 1])] for i in range(len(depths))]
