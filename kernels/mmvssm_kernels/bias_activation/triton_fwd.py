"""Bias, activation and residual sum, Triton forward pass: a program owns a tile of rows and channels."""

import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv
from ..rows import rows_of

RUN_TIME_SIZES = ["n_rows"]
# Elements of a tile: two loads of 16 bytes for each lane of four warps.
_TILE = 2048
_MAX_BLOCK_D = 256
# (1 + tanh(u)) / 2 = sigmoid(2 u), and this is the factor of 2 u in GELU's approximation.
GELU_SLOPE: tl.constexpr = tl.constexpr(1.5957691216057308)


@triton.jit
def locate(i_tile, i_block, channels, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (R, 1), channels (1, D) and mask of the channels of a tile."""
    o_row = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_channel = i_block * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return o_row, o_channel, o_channel < channels


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def bias_activation_fwd_kernel(
    p_x,
    p_bias,
    p_residual,
    p_y,
    n_rows,
    channels,
    stride_x,
    stride_residual,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """activation(x + bias) + residual (M, D)."""
    o_row, o_channel, m_channel = locate(tl.program_id(0), tl.program_id(1), channels, ROWS, BLOCK_D)
    m_tile = (o_row < n_rows) & m_channel
    y = tl.load(p_x + o_row * stride_x + o_channel, mask=m_tile, other=0.0).to(tl.float32)
    y += tl.load(p_bias + o_channel, mask=m_channel, other=0.0).to(tl.float32)
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu_tanh":
        y = y * tl.sigmoid((y + 0.044715 * y * y * y) * GELU_SLOPE)
    if p_residual is not None:
        y += tl.load(p_residual + o_row * stride_residual + o_channel, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(p_y + o_row * channels + o_channel, y.to(p_y.dtype.element_ty), mask=m_tile)


def tile_sizes(channels: int) -> dict[str, int]:
    """Rows and channels of a tile, and warps."""
    block = min(triton.next_power_of_2(channels), _MAX_BLOCK_D)
    return dict(ROWS=_TILE // block, BLOCK_D=block, num_warps=4)


def bias_activation_forward(x, bias, activation, residual) -> Tensor:
    """(..., D), contiguous, in the dtype of ``x``; arguments as the public function's."""
    y, channels = x.new_empty(x.shape), x.shape[-1]
    rows, residual = rows_of(x), None if residual is None else rows_of(residual)
    blocks = tile_sizes(channels)
    grid = (cdiv(rows.shape[0], blocks["ROWS"]), cdiv(channels, blocks["BLOCK_D"]))
    sizes = (rows.shape[0], channels, rows.stride(0), 0 if residual is None else residual.stride(0))
    bias_activation_fwd_kernel[grid](rows, bias.contiguous(), residual, y, *sizes, ACTIVATION=activation, **blocks)
    return y
