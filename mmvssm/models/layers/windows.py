"""Cutting a map into windows, and putting it together again; channel-last."""

from typing import NamedTuple

import torch
from torch.nn import functional as F


class WindowGrid(NamedTuple):
    """How a map is covered by windows.

    Attributes:
        height, width: The map.
        rows, columns: Windows from top to bottom and from left to right.
        window_height, window_width: Size of a window. Together the windows may be larger than the map; what is beyond
            its right and lower edge is padding.
    """

    height: int
    width: int
    rows: int
    columns: int
    window_height: int
    window_width: int

    @classmethod
    def cover(cls, height: int, width: int, window_size: int | None, fit: bool = False) -> "WindowGrid":
        """Cover a (height, width) map.

        Args:
            height: Rows of the map.
            width: Columns of the map.
            window_size: Side of a window; None for one window that is the map.
            fit: If False, windows are squares of exactly ``window_size`` and the map is padded to multiples of it, even
                where it is smaller. If True, ``window_size`` is the most that a side may have: the map is divided into
                as few equal parts as that allows, height and width each for itself, so that fewer rows and columns are
                padding than there are windows, and none where one window is enough.
        """
        if window_size is None:
            return cls(height, width, 1, 1, height, width)
        rows, columns = -(-height // window_size), -(-width // window_size)
        if not fit:
            return cls(height, width, rows, columns, window_size, window_size)
        return cls(height, width, rows, columns, -(-height // rows), -(-width // columns))

    @property
    def tokens(self) -> int:
        """Tokens of a window."""
        return self.window_height * self.window_width


def partition_windows(x: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
    """Map x (B, H, W, C) to (B * windows, tokens, C), padded with zeros on the right and below.

    Windows are ordered by image, row and column, the tokens of a window by row and column. One window per image
    without padding is a view.
    """
    B, H, W, C = x.shape
    _, _, rows, columns, h, w = grid
    if rows * h != H or columns * w != W:
        x = F.pad(x, (0, 0, 0, columns * w - W, 0, rows * h - H))
    if rows * columns == 1:
        return x.reshape(B, h * w, C)
    return x.reshape(B, rows, h, columns, w, C).transpose(2, 3).reshape(B * rows * columns, h * w, C)


def merge_windows(tokens: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
    """Inverse of :func:`partition_windows`: (B * windows, tokens, C) to (B, H, W, C), without the padding."""
    H, W, rows, columns, h, w = grid
    B, C = tokens.shape[0] // (rows * columns), tokens.shape[-1]
    if rows * columns == 1:
        x = tokens.reshape(B, h, w, C)
    else:
        x = tokens.reshape(B, rows, columns, h, w, C).transpose(2, 3).reshape(B, rows * h, columns * w, C)
    return x[:, :H, :W]
