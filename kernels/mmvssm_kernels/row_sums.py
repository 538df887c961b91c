"""Sums over the rows of a matrix in a fixed order: gradients of biases, and partial sums that programs left."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grids import cdiv

# Up to so many rows one launch adds; more are added in parts first, as many as keep a large GPU busy.
_ROWS_AT_ONCE = 1024
_MAX_PARTS = 512
# Elements of a tile, and its columns: few where one launch has to do, whose programs must not be too few.
_TILE = 4096
_COLUMNS, _COLUMNS_AT_ONCE = 128, 16


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def sum_rows_kernel(p_rows, p_sums, n_rows, columns, n_tiles, stride_row, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums (P, D) of P parts of the rows (M, D), each of ``n_tiles`` tiles."""
    i_part = tl.program_id(0)
    o_column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_column = o_column < columns
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in range(n_tiles):
        o_row = (i_part * n_tiles + i).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        m_tile = (o_row < n_rows)[:, None] & m_column[None, :]
        sums += tl.load(p_rows + o_row[:, None] * stride_row + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32)
    tl.store(p_sums + i_part * columns + o_column, tl.sum(sums, axis=0).to(p_sums.dtype.element_ty), mask=m_column)


def sum_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums (D) in ``dtype`` of the rows (M, D), added in float32; channels adjacent in memory."""
    n_rows, columns = rows.shape
    if n_rows > _ROWS_AT_ONCE:
        tile = _TILE // _COLUMNS
        n_tiles = cdiv(cdiv(n_rows, tile), _MAX_PARTS)
        parts = rows.new_empty(cdiv(n_rows, tile * n_tiles), columns, dtype=torch.float32)
        _launch(rows, parts, n_tiles, tile, _COLUMNS)
        rows, n_rows = parts, len(parts)
    sums = rows.new_empty(columns, dtype=dtype)
    tile = _TILE // _COLUMNS_AT_ONCE
    _launch(rows, sums[None], cdiv(n_rows, tile), tile, _COLUMNS_AT_ONCE)
    return sums


def _launch(rows: Tensor, sums: Tensor, n_tiles: int, tile: int, block: int) -> None:
    grid = (len(sums), cdiv(rows.shape[1], block))
    sum_rows_kernel[grid](rows, sums, *rows.shape, n_tiles, rows.stride(0), tile, block, num_warps=4)
