"""Bias, activation and residual sum, Triton backward pass: the activation's argument is computed again.

A program walks every P-th tile of rows and keeps its sums for the bias in registers; the P partial sums are added up
afterwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv, program_count
from ..row_sums import sum_rows
from ..rows import rows_of
from .triton_fwd import GELU_SLOPE, RUN_TIME_SIZES, locate, tile_sizes

# Programs that are at work at the same time on a large GPU; also the number of partial sums.
_MAX_PROGRAMS = 1024


@triton.jit(do_not_specialize=[*RUN_TIME_SIZES, "n_tiles"])
def bias_activation_bwd_kernel(
    p_dy,
    p_x,
    p_bias,
    p_dx,
    p_dbias,
    n_rows,
    n_tiles,
    channels,
    stride_dy,
    stride_x,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of x (M, D), and partial sums (P, D) for the bias."""
    i_program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    dbias = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in range(tl.cdiv(n_tiles - i_program, n_programs)):
        o_row, o_channel, m_channel = locate(i_program + i * n_programs, tl.program_id(1), channels, ROWS, BLOCK_D)
        m_tile = (o_row < n_rows) & m_channel
        gradient = tl.load(p_dy + o_row * stride_dy + o_channel, mask=m_tile, other=0.0).to(tl.float32)
        if ACTIVATION is not None:
            x = tl.load(p_x + o_row * stride_x + o_channel, mask=m_tile, other=0.0).to(tl.float32)
            x += tl.load(p_bias + o_channel, mask=m_channel, other=0.0).to(tl.float32)
            if ACTIVATION == "relu":
                gradient = tl.where(x > 0.0, gradient, 0.0)
            else:
                sigmoid = tl.sigmoid((x + 0.044715 * x * x * x) * GELU_SLOPE)
                slope = (1.0 + 0.134145 * x * x) * GELU_SLOPE
                gradient *= sigmoid * (1.0 + x * (1.0 - sigmoid) * slope)
        dbias += gradient
        tl.store(p_dx + o_row * channels + o_channel, gradient.to(p_dx.dtype.element_ty), mask=m_tile)
    o_channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(p_dbias + i_program * channels + o_channel, tl.sum(dbias, axis=0), mask=o_channel < channels)


def bias_activation_backward(dy, x, bias, activation) -> tuple[Tensor, Tensor]:
    """Gradients of x, contiguous, and of bias; arguments as the operator's."""
    dx, channels = x.new_empty(x.shape), x.shape[-1]
    dy, x = rows_of(dy), rows_of(x)
    n_rows = dx.numel() // channels
    blocks = tile_sizes(channels)
    n_tiles = cdiv(n_rows, blocks["ROWS"])
    n_programs = program_count(n_tiles, _MAX_PROGRAMS)
    dbias = x.new_empty(n_programs, channels, dtype=torch.float32)
    grid = (n_programs, cdiv(channels, blocks["BLOCK_D"]))
    sizes = (n_rows, n_tiles, channels, dy.stride(0), x.stride(0))
    bias_activation_bwd_kernel[grid](dy, x, bias.contiguous(), dx, dbias, *sizes, ACTIVATION=activation, **blocks)
    return dx, sum_rows(dbias, bias.dtype)
