"""What the kernels of the four-direction scan share: where tokens lie, the inputs of a tile, scans inside a tile.

A tile is (T tokens, Q sequences, C channels). Token i of a tile is its i-th in scan order. A warp lane owns a few
neighbouring channels of one sequence and keeps all T tokens in registers, so that a scan over tokens is a chain of
multiply-adds without shuffles, and what is loaded per token (address, B, C) serves several channels. The layout follows
from the loads, see :func:`tile_pointers`.

Maps are walked along rows (directions 0 and 2) or columns (1 and 3); a row or column is cut into tiles, its last one
masked. Some tiles in a row, in the order of the tokens, are a segment: the part of a sequence that a program walks.
Numbers: step sizes are v = dt log2(e), so a decay is exp2(-v rate) with rate = exp(A_log); everything is float32.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus_log2(x):
    """log2(1 + 2^x) as max(x, 0) + log2(1 + 2^-|x|).

    log2(1 + e) / e on [0, 1] is a Chebyshev fit of degree 7 (relative error 3e-7), which keeps small step sizes
    accurate and needs no logarithm from the special-function unit.
    """
    e = tl.exp2(-tl.abs(x))
    series = 0.0625709101 - e * 0.0120270237
    series = -0.153903683 + e * series
    series = 0.255003465 + e * series
    series = -0.353034251 + e * series
    series = 0.480001761 + e * series
    series = -0.721306059 + e * series
    series = 1.44269472 + e * series
    return tl.maximum(x, 0.0) + e * series


@triton.jit
def tile_pointers(p_sequence, o_pixel, o_channel, STRIDE: tl.constexpr, V: tl.constexpr):
    """Pointers (T, Q, C) to the channels of a tile's pixels, which are ``STRIDE`` elements apart.

    The hint makes the layout: a lane takes ``V`` neighbouring channels, the other lanes of the warp first the other
    channels, then the sequences, never the tokens. Sequences are not contiguous, but without a number above that of the
    tokens the order of the two axes would be left to the version of Triton.
    """
    pointers = p_sequence[None, :, None] + o_pixel[:, :, None] * STRIDE + o_channel[None, None, :]
    return tl.max_contiguous(pointers, [1, 2, V])


@triton.jit
def direction_geometry(is_column, height, width, T: tl.constexpr):
    """Number of rows (columns), tokens in one, tiles in one, and the pixel strides between both kinds."""
    n_outer = tl.where(is_column, width, height)
    n_inner = tl.where(is_column, height, width)
    stride_outer = tl.where(is_column, 1, width)
    stride_inner = tl.where(is_column, width, 1)
    return n_outer, n_inner, (n_inner + T - 1) // T, stride_outer, stride_inner


@triton.jit
def next_tile(i_outer, i_inner, n_tiles_inner, step):
    """The tile after (``step`` = 1) or before (-1) tile ``i_inner`` of row ``i_outer``; the same one for 0."""
    i_inner += step
    wrapped = (i_inner == n_tiles_inner) | (i_inner < 0)
    i_outer += tl.where(wrapped, step, 0)
    return i_outer, tl.where(wrapped, tl.where(step > 0, 0, n_tiles_inner - 1), i_inner)


@triton.jit
def tile_tokens(
    i_outer,
    i_inner,
    m_sequence,
    is_reverse,
    n_outer,
    n_inner,
    stride_outer,
    stride_inner,
    T: tl.constexpr,
    FULL: tl.constexpr,
):
    """Row-major pixels and mask (T, Q) of the tokens of a tile. ``FULL`` promises that none is masked."""
    i_token = tl.arange(0, T)
    step = tl.where(is_reverse, -1, 1)
    i_first = i_inner * T + tl.where(is_reverse, T - 1, 0)
    o_pixel = (i_outer * stride_outer + i_first * stride_inner)[None, :] + (i_token * (step * stride_inner))[:, None]
    if FULL:
        m_token = tl.full(o_pixel.shape, True, tl.int1)
    else:
        m_row = m_sequence & (i_outer >= 0) & (i_outer < n_outer)
        m_token = (i_first[None, :] + (i_token * step)[:, None] < n_inner) & m_row[None, :]
    return o_pixel, m_token


@triton.jit
def load_low_rank(p_projected, o_pixel, m_token, STRIDE: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Low-rank step sizes of a tile, (T Q, R) padded with zeros to BLOCK_R."""
    o_rank = tl.arange(0, BLOCK_R)
    low_rank = tl.load(
        p_projected[None, :, None] + o_pixel[:, :, None] * STRIDE + o_rank[None, None, :],
        mask=m_token[:, :, None] & (o_rank < R)[None, None, :],
        other=0.0,
    )
    return tl.reshape(low_rank, (o_pixel.shape[0] * o_pixel.shape[1], BLOCK_R))


@triton.jit
def raw_steps(low_rank, weight, bias, T: tl.constexpr, PRECISION: tl.constexpr):
    """Step sizes before softplus, times log2(e), (T, Q, C)."""
    Q: tl.constexpr = low_rank.shape[0] // T
    C: tl.constexpr = weight.shape[1]
    start = tl.broadcast_to(bias[None, :], (low_rank.shape[0], C))
    return tl.reshape(tl.dot(low_rank, weight, start, input_precision=PRECISION), (T, Q, C))


@triton.jit
def load_step_weights(
    p_dt_weight, p_dt_bias, o_channel, m_channel, i_direction, D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Weight (BLOCK_R, C) and bias (C) of a direction's step sizes, times log2(e)."""
    o_rank = tl.arange(0, BLOCK_R)
    o_row = i_direction * D + o_channel
    m_weight = (o_rank < R)[:, None] & m_channel[None, :]
    weight = tl.load(p_dt_weight + o_row[None, :] * R + o_rank[:, None], mask=m_weight, other=0.0)
    bias = tl.load(p_dt_bias + o_row, mask=m_channel, other=0.0)
    return weight.to(tl.float32) * LOG2_E, bias.to(tl.float32) * LOG2_E


@triton.jit
def chain(decay_1, state_1, decay_2, state_2):
    return decay_1 * decay_2, decay_2 * state_1 + state_2


@triton.jit
def _chain_with_inflow(decay_1, state_1, inflow_1, decay_2, state_2, inflow_2):
    return decay_1 * decay_2, decay_2 * state_1 + state_2, decay_2 * state_1 + inflow_2


@triton.jit
def _chain_adjoint(decay_1, open_1, flow_1, grad_1, decay_2, open_2, flow_2, grad_2):
    return decay_1 * decay_2, decay_1 * open_2, decay_2 * flow_1 + flow_2, open_2 * flow_1 + grad_2


@triton.jit
def _later(index_1, value_1, index_2, value_2):
    return tl.maximum(index_1, index_2), tl.where(index_1 > index_2, value_1, value_2)


@triton.jit
def last_row(tile):
    """The last row of a tile. The indices are known to the compiler, so for a tile in registers this costs nothing."""
    index = tl.arange(0, tile.shape[0])
    for _ in tl.static_range(len(tile.shape) - 1):
        index = tl.expand_dims(index, -1)
    _, row = tl.reduce((tl.broadcast_to(index, tile.shape), tile), 0, _later)
    return row


@triton.jit
def _is_first(tile):
    return (tl.arange(0, tile.shape[0]) == 0)[:, None, None]


@triton.jit
def scan_states(decay, value, state):
    """States (T, Q, C) of a tile, and the last one (Q, C), from the state that enters it.

    The entering state joins the first token, so that the scan itself is one multiply-add per element.
    """
    value = tl.where(_is_first(value), value + decay * state[None, :, :], value)
    _, states = tl.associative_scan((decay, value), 0, chain)
    return states, last_row(states)


@triton.jit
def scan_states_and_inflow(decay, value, state):
    """States (T, Q, C) and the part ``decay[t] state[t - 1]`` of each, without cancellation."""
    inflow = tl.where(_is_first(value), decay * state[None, :, :], 0.0)
    _, states, inflow = tl.associative_scan((decay, value + inflow, inflow), 0, _chain_with_inflow)
    return states, inflow


@triton.jit
def scan_adjoint(decay, value, flow):
    """Gradients ``G[t] = value[t] + decay[t + 1] G[t + 1]`` (T, Q, C) of the states, and ``decay[0] G[0]`` (Q, C).

    ``flow`` (Q, C) enters at the last token. The tile is flipped in registers, which costs nothing, because a scan
    with ``reverse=True`` goes through shuffles.
    """
    decay, value = tl.flip(decay, 0), tl.flip(value, 0)
    value = tl.where(_is_first(value), value + flow[None, :, :], value)
    ones = tl.full(decay.shape, 1.0, tl.float32)
    _, _, flows, grad = tl.associative_scan((decay, ones, decay * value, value), 0, _chain_adjoint)
    return tl.flip(grad, 0), last_row(flows)
