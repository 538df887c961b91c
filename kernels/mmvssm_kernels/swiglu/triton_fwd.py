"""The gate of a SwiGLU perceptron, Triton forward pass: a program owns a tile of rows and hidden channels."""

import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv
from ..rows import rows_of

# Rows and hidden channels of a tile: the widths in use are multiples of 32, and most of 128.
ROWS, BLOCK_H = 8, 128
RUN_TIME_SIZES = ["n_rows"]


@triton.jit
def locate(n_rows, hidden, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    """Rows (R, 1), hidden channels (1, H) and mask (R, H) of the program's tile."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_hidden = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    return o_row, o_hidden, (o_row < n_rows) & (o_hidden < hidden)


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def swiglu_fwd_kernel(p_x, p_y, n_rows, hidden, stride_x, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    """SiLU of the first half of each row times the second half (M, H)."""
    o_row, o_hidden, m_tile = locate(n_rows, hidden, ROWS, BLOCK_H)
    p_tile = p_x + o_row * stride_x + o_hidden
    a = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    b = tl.load(p_tile + hidden, mask=m_tile, other=0.0).to(tl.float32)
    y = a * tl.sigmoid(a) * b
    tl.store(p_y + o_row * hidden + o_hidden, y.to(p_y.dtype.element_ty), mask=m_tile)


def swiglu_forward(x: Tensor) -> Tensor:
    """(..., 2 H) to (..., H) in the dtype of ``x``."""
    rows, hidden = rows_of(x), x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], hidden)
    grid = (cdiv(rows.shape[0], ROWS), cdiv(hidden, BLOCK_H))
    swiglu_fwd_kernel[grid](rows, y, rows.shape[0], hidden, rows.stride(0), ROWS=ROWS, BLOCK_H=BLOCK_H, num_warps=4)
    return y
