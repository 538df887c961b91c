"""The gate of a SwiGLU perceptron, Triton backward pass: both halves of the gradient in one pass."""

import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv
from ..rows import rows_of
from .triton_fwd import BLOCK_H, ROWS, RUN_TIME_SIZES, locate


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def swiglu_bwd_kernel(p_dy, p_x, p_dx, n_rows, hidden, stride_dy, stride_x, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    """Gradient (M, 2 H) of the rows."""
    o_row, o_hidden, m_tile = locate(n_rows, hidden, ROWS, BLOCK_H)
    p_tile = p_x + o_row * stride_x + o_hidden
    a = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    b = tl.load(p_tile + hidden, mask=m_tile, other=0.0).to(tl.float32)
    dy = tl.load(p_dy + o_row * stride_dy + o_hidden, mask=m_tile, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(a)
    da = dy * b * sigmoid * (1 + a * (1 - sigmoid))
    p_out = p_dx + o_row * (2 * hidden) + o_hidden
    tl.store(p_out, da.to(p_dx.dtype.element_ty), mask=m_tile)
    tl.store(p_out + hidden, (dy * a * sigmoid).to(p_dx.dtype.element_ty), mask=m_tile)


def swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of ``x``, contiguous."""
    dx = x.new_empty(x.shape)
    rows, dy, hidden = rows_of(x), rows_of(dy), x.shape[-1] // 2
    sizes = (rows.shape[0], hidden, dy.stride(0), rows.stride(0))
    grid = (cdiv(rows.shape[0], ROWS), cdiv(hidden, BLOCK_H))
    swiglu_bwd_kernel[grid](dy, rows, dx, *sizes, ROWS=ROWS, BLOCK_H=BLOCK_H, num_warps=4)
    return dx
