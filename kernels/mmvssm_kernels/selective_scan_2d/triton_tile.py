"""What the kernels of the four-direction scan share: where a token lies, and the inputs of a tile."""

import triton
import triton.language as tl

from ..triton_scan import LOG2_E, softplus


@triton.jit
def tile_tokens(i_tile, n_tiles, i_segment, height, width, K: tl.constexpr, T: tl.constexpr):
    """Row-major pixels (T) and mask of a segment's ``i_tile``-th tile in scan order.

    Directions 0 and 2 walk along rows, 1 and 3 along columns; 2 and 3 backwards.
    """
    i_first = i_segment * n_tiles * T
    if K >= 2:
        i_first += (n_tiles - 1 - i_tile) * T
        i_in_tile = T - 1 - tl.arange(0, T)
    else:
        i_first += i_tile * T
        i_in_tile = tl.arange(0, T)
    m_token = i_first + i_in_tile < height * width
    if K % 2 == 0:
        return i_first + i_in_tile, m_token
    # Column-major: one division for the tile, small numbers for its tokens (a comparison, or a product with 2^16 / height
    # that is exact below 2 T).
    i_row = i_first % height + i_in_tile
    i_wrap = tl.where(height >= T, (i_row >= height).to(tl.int32), (i_row * (65536 // height + 1)) >> 16)
    return (i_row - i_wrap * height) * width + i_first // height + i_wrap, m_token


@triton.jit
def load_parameters(p_dt_weight, p_dt_bias, p_A_log, o_channel, m_channel, o_rank, m_rank, o_state, m_state, channels,
                    rank, K: tl.constexpr, N: tl.constexpr):
    """Weight (R, C) and bias (C) of the step sizes, and the rates A log2(e) (N, C) of direction K."""
    o_row = K * channels + o_channel
    weight = tl.load(p_dt_weight + o_row[None, :] * rank + o_rank[:, None], mask=m_rank[:, None] & m_channel[None, :], other=0.0)
    bias = tl.load(p_dt_bias + o_row, mask=m_channel, other=0.0).to(tl.float32)
    m_rate = m_state[:, None] & m_channel[None, :]
    A_log = tl.load(p_A_log + o_row[None, :] * N + o_state[:, None], mask=m_rate, other=0.0).to(tl.float32)
    rate = -tl.exp2(A_log * LOG2_E) * LOG2_E
    return weight, bias, rate


@triton.jit
def load_step_sizes(p_low_rank, o_pixel, m_token, o_rank, m_rank, weight, bias, stride_pixel, PRECISION: tl.constexpr):
    """Step sizes (T, C) of a tile, zero for masked tokens, which then change no state."""
    low_rank = tl.load(p_low_rank + o_pixel[:, None] * stride_pixel + o_rank[None, :],
                       mask=m_token[:, None] & m_rank[None, :], other=0.0)
    raw = tl.dot(low_rank, weight.to(low_rank.dtype), input_precision=PRECISION) + bias[None, :]
    return tl.where(m_token[:, None], softplus(raw), 0.0)
