"""Rotary position embedding over a grid, as in Vim and EVA-02 (https://arxiv.org/abs/2303.11331)."""

import torch
from torch import nn

from .grid_cache import GridCache


class GridRope(nn.Module):
    """Rotate pairs of channels by angles that grow with the row (first half of the channels) and column (second half).

    The frequency of pair j of an axis is 10000^(-4j / C). Positions are scaled so that every grid spans
    ``reference`` cells, the grid of pre-training. The tables depend on the grid only and are no part of the state dict.

    Args:
        embed_dims: Width C, divisible by 4.
        reference: Cells per axis to which positions are scaled.

    Raises:
        ValueError: If the width is not divisible by 4.
    """

    def __init__(self, embed_dims: int, reference: int = 14):
        super().__init__()
        if embed_dims % 4:
            raise ValueError(f"rotary position embedding needs embed_dims divisible by 4, got {embed_dims}")
        self.embed_dims = embed_dims
        self.reference = reference
        self._cache = GridCache()

    def tables(self, grid: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (h * w, C / 2), float32, one angle per pair of channels."""
        return self._cache.get((grid, device), lambda: self._make_tables(grid, device), device)

    def _make_tables(self, grid: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        exponents = torch.arange(0, self.embed_dims // 2, 2, dtype=torch.float32, device=device)
        frequencies = 1.0 / 10000.0 ** (exponents / (self.embed_dims // 2))
        rows, columns = (
            (torch.arange(cells, dtype=torch.float32, device=device) / cells * self.reference)[:, None] * frequencies
            for cells in grid
        )
        shape = (*grid, self.embed_dims // 4)
        angles = torch.cat([rows[:, None].expand(shape), columns[None].expand(shape)], dim=-1).flatten(0, 1)
        return angles.cos(), angles.sin()

    def forward(self, x: torch.Tensor, grid: tuple[int, int], class_tokens: int = 0) -> torch.Tensor:
        """Rotate.

        Args:
            x: Tokens (B, L, C) with L = h * w plus class tokens.
            grid: (h, w).
            class_tokens: With 1, the first token is left alone and the others take the table in order, wherever the
                class token is: so do the authors of Vim. With 2, the first and the last are left alone.

        Returns:
            (B, L, C) in the dtype of ``x``; computed in float32 (float64 for float64 tokens).
        """
        cos, sin = self.tables(grid, x.device)
        tokens = x[:, 1 : x.shape[1] - (class_tokens > 1)] if class_tokens else x
        pairs = tokens.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
        even, odd = pairs.unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)
        if not class_tokens:
            return rotated
        return torch.cat([x[:, :1], rotated, x[:, x.shape[1] - 1 :][:, : class_tokens - 1]], dim=1)
