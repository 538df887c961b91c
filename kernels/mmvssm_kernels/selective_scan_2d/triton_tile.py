"""What the kernels of the four-direction scan share: where a token lies, and the inputs of a tile."""

import triton
import triton.language as tl

from ..triton_scan import LOG2_E, softplus


@triton.jit
def tile_pixels(i_tile, n_tiles, i_segment, height, width, i_direction, NARROW: tl.constexpr, T: tl.constexpr):
    """Row-major pixels (T) and mask of a segment's ``i_tile``-th tile in scan order.

    Directions 0 and 2 walk along rows, 1 and 3 along columns; 2 and 3 backwards. The direction is a run-time number, so
    that the code of the loops exists once. NARROW says that a row or column may be shorter than a tile.
    """
    is_column = i_direction % 2 == 1
    is_reverse = i_direction >= 2
    n_inner = tl.where(is_column, height, width)
    stride_inner = tl.where(is_column, width, 1)
    stride_outer = tl.where(is_column, 1, width)
    i_first = (i_segment * n_tiles + tl.where(is_reverse, n_tiles - 1 - i_tile, i_tile)) * T
    i_in_tile = tl.where(is_reverse, T - 1, 0) + tl.where(is_reverse, -1, 1) * tl.arange(0, T)
    m_token = i_first + i_in_tile < height * width
    # One division for the tile; its tokens only count how often they passed the end of a row or column.
    i_first_inner = i_first % n_inner
    o_first = i_first // n_inner * stride_outer + i_first_inner * stride_inner
    o_wrap = stride_outer - n_inner * stride_inner
    i_inner = i_first_inner + i_in_tile
    o_pixel = o_first + i_in_tile * stride_inner
    if NARROW:
        # The product with 2^16 / n_inner is an exact division of numbers below 2 T.
        i_wrap = tl.where(n_inner >= T, (i_inner >= n_inner).to(tl.int32), (i_inner * (65536 // n_inner + 1)) >> 16)
        return o_pixel + i_wrap * o_wrap, m_token
    else:
        return o_pixel + tl.where(i_inner >= n_inner, o_wrap, 0), m_token


@triton.jit
def load_parameters(
    p_dt_weight,
    p_dt_bias,
    p_A_log,
    o_channel,
    m_channel,
    o_rank,
    m_rank,
    o_state,
    m_state,
    channels,
    rank,
    i_direction,
    N: tl.constexpr,
):
    """Weight (R, C) and bias (C) of the step sizes, and the rates A log2(e) (N, C) of a direction."""
    o_row = i_direction * channels + o_channel
    weight = tl.load(
        p_dt_weight + o_row[None, :] * rank + o_rank[:, None], mask=m_rank[:, None] & m_channel[None, :], other=0.0
    )
    bias = tl.load(p_dt_bias + o_row, mask=m_channel, other=0.0).to(tl.float32)
    m_rate = m_state[:, None] & m_channel[None, :]
    A_log = tl.load(p_A_log + o_row[None, :] * N + o_state[:, None], mask=m_rate, other=0.0).to(tl.float32)
    rate = -tl.exp2(A_log * LOG2_E) * LOG2_E
    return weight, bias, rate


@triton.jit
def load_step_sizes(p_low_rank, o_pixel, m_token, o_rank, m_rank, weight, bias, stride_pixel, PRECISION: tl.constexpr):
    """Step sizes (T, C) of a tile, zero for masked tokens, which then change no state."""
    low_rank = tl.load(
        p_low_rank + o_pixel[:, None] * stride_pixel + o_rank[None, :],
        mask=m_token[:, None] & m_rank[None, :],
        other=0.0,
    )
    raw = tl.dot(low_rank, weight.to(low_rank.dtype), input_precision=PRECISION) + bias[None, :]
    return tl.where(m_token[:, None], softplus(raw), 0.0)
