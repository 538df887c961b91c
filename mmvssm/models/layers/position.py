"""Learned position embeddings of plain backbones: class rows and other grids."""

import math

import torch
from torch.nn import functional as F

CLASS_POSITIONS = ("middle", "head", "double")


def class_indices(position: str | None, num_patches: int) -> tuple[int, ...]:
    """Places of the class tokens in a sequence of ``num_patches`` patches and them.

    Args:
        position: 'middle' (after half of the patches, rounded down), 'head' (first), 'double' (first and last), or None
            for no class token.
        num_patches: Number of patches P.
    """
    return {None: (), "middle": (num_patches // 2,), "head": (0,), "double": (0, num_patches + 1)}[position]


def split_class_rows(rows: torch.Tensor, indices: tuple[int, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Take the rows at ``indices`` (increasing) out of (B, L, C).

    Returns:
        The other rows (B, L - len(indices), C) and the rows taken out, (B, 1, C) each.
    """
    pieces, start = [], 0
    for index in (*indices, rows.shape[1]):
        if index > start:
            pieces.append(rows[:, start:index])
        start = index + 1
    patches = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    return patches, [rows[:, index : index + 1] for index in indices]


def insert_class_rows(patches: torch.Tensor, class_rows: list[torch.Tensor], indices: tuple[int, ...]) -> torch.Tensor:
    """Inverse of :func:`split_class_rows`; ``indices`` are places in the result."""
    pieces, start = [], 0
    for count, (index, row) in enumerate(zip(indices, class_rows, strict=True)):
        pieces += [patches[:, start : index - count], row]
        start = index - count
    return torch.cat([*pieces, patches[:, start:]], dim=1) if indices else patches


def resize_grid(patches: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Interpolate the embedding of a grid of patches, bicubically, with ``align_corners=False`` and no antialiasing.

    Args:
        patches: (1, h * w, C), row by row.
        grid: (h, w).
        new_grid: (h', w').

    Returns:
        (1, h' * w', C) in the dtype of ``patches``; ``patches`` itself if the grids are the same.
    """
    if grid == new_grid:
        return patches
    maps = patches.unflatten(1, grid).permute(0, 3, 1, 2)
    maps = F.interpolate(maps.to(torch.promote_types(maps.dtype, torch.float32)), size=new_grid, mode="bicubic")
    return maps.permute(0, 2, 3, 1).flatten(1, 2).to(patches.dtype)


def resize_position_embedding(
    embedding: torch.Tensor,
    position: str | None,
    grid: tuple[int, int],
    new_position: str | None,
    new_grid: tuple[int, int],
) -> torch.Tensor:
    """Bring a position embedding in sequence order, class rows included, to another grid.

    The class rows are taken out at their true places, pass unchanged, and are put back at their new places or left
    out.

    Args:
        embedding: (1, L, C) with L = h * w plus the class rows.
        position: Position of the class tokens in it, see :func:`class_indices`.
        grid: (h, w).
        new_position: The same position again, or None to leave the class rows out.
        new_grid: (h', w').

    Returns:
        (1, L', C).
    """
    patches, class_rows = split_class_rows(embedding, class_indices(position, grid[0] * grid[1]))
    patches = resize_grid(patches, grid, new_grid)
    if new_position is None:
        return patches
    return insert_class_rows(patches, class_rows, class_indices(new_position, new_grid[0] * new_grid[1]))


def square_grid(num_patches: int) -> tuple[int, int] | None:
    """(g, g) with ``g * g = num_patches``, or None if there is none."""
    side = math.isqrt(num_patches)
    return (side, side) if side and side * side == num_patches else None
