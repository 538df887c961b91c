"""In which order the backbones visit the cells of a grid.

Nothing is drawn from a description here: the orders come out of the functions that the models run, applied to a grid
of cell numbers.
"""

from typing import NamedTuple

import torch

from mmvssm.models.layers import class_indices
from mmvssm.models.layers.windows import WindowGrid, partition_windows
from mmvssm_kernels.selective_scan_2d.reference import cross_scan

FAMILIES = ("vmamba", "vim", "mambavision", "vig", "vigh")


class ScanOrder(NamedTuple):
    """One direction of a scan.

    Attributes:
        name: What the direction is called.
        sequences: Cells (y * width + x) in the order in which they are visited, one tuple per independent sequence.
            Negative numbers are no cells of the grid: -1 is padding, -2 a class token.
        window_width: Columns of the windows that the sequences belong to; None where a sequence covers the grid.
    """

    name: str
    sequences: tuple[tuple[int, ...], ...]
    window_width: int | None = None


def scan_orders(
    family: str,
    height: int,
    width: int,
    window_size: int | None = 14,
    fit_windows: bool = False,
    cls_token: str | None = "middle",
) -> list[ScanOrder]:
    """The directions in which a family scans a grid.

    Args:
        family: 'vmamba' (four directions), 'vim' (two, with the class token among the patches), 'mambavision' (one, in
            windows), 'vig' or 'vigh' (two).
        height: Rows of the grid.
        width: Columns of the grid.
        window_size: MambaVision's, None for one window that is the map.
        fit_windows: MambaVision's, see :meth:`WindowGrid.cover`.
        cls_token: Vim's: 'middle', 'head', 'double' or None.

    Raises:
        ValueError: If an argument is not as described.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(map(repr, FAMILIES))}, got {family!r}")
    if min(height, width) < 1 or (window_size is not None and window_size < 1):
        raise ValueError(f"a grid of {height} x {width} with windows of {window_size} has no cells")
    if cls_token not in ("middle", "head", "double", None):
        raise ValueError(f"cls_token must be 'middle', 'head', 'double' or None, got {cls_token!r}")
    cells = torch.arange(height * width).reshape(height, width)
    if family == "vmamba":
        names = ("rows", "columns", "rows, reversed", "columns, reversed")
        sequences = cross_scan(cells[None, None])[0, :, 0]  # (4, H W)
        return [ScanOrder(name, (tuple(s.tolist()),)) for name, s in zip(names, sequences, strict=True)]
    if family == "mambavision":
        grid = WindowGrid.cover(height, width, window_size, fit_windows)
        windows = partition_windows(cells[None, :, :, None] + 1, grid)[..., 0] - 1  # padding is zero before, -1 after
        size = f"{grid.window_height} x {grid.window_width}"
        name = f"rows of {len(windows)} windows of {size}" if len(windows) > 1 else f"rows of one window of {size}"
        return [ScanOrder(name, tuple(tuple(window) for window in windows.tolist()), grid.window_width)]
    sequence = cells.flatten().tolist()
    if family == "vim":
        for index in class_indices(cls_token, len(sequence)):
            sequence.insert(index, -2)
    return [ScanOrder("rows", (tuple(sequence),)), ScanOrder("rows, reversed", (tuple(reversed(sequence)),))]
