"""States at the borders of segments, so that segments can be scanned in parallel.

1. :func:`selective_scan_2d_states_kernel` scans every segment of every direction from a zero state and leaves the state
   it ends with and its decay; for the adjoint scan it does the same in the opposite order.
2. :func:`selective_scan_2d_carry_kernel` turns them into the states that enter the segments.
"""

import triton
import triton.language as tl

from .triton_chains import (
    as_chains,
    chain,
    chain_ends,
    end_flow,
    end_state,
    half_offsets,
    other_half,
    product,
    row,
    scan_states,
)
from .triton_tile import (
    LN_2,
    load_low_rank,
    load_rate,
    load_tile,
    only_weights,
    raw_steps,
    softplus_log2,
    step_weights,
    tile_tokens,
)


@triton.jit(do_not_specialize=["height", "width", "n_tiles", "n_walk"])
def selective_scan_2d_states_kernel(
    p_rows,
    p_projected,
    p_dt_weight,
    p_dt_bias,
    p_rate,
    p_state,
    p_decay,
    height,
    width,
    n_tiles,
    n_walk,
    stride_pixel: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ADJOINT: tl.constexpr,
    T: tl.constexpr,
    Q: tl.constexpr,
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    PRECISE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Local end states and decays of segments, both (batch, 4, segments, N, D).

    ``p_rows`` is x, or for ``ADJOINT`` the gradient of y; the adjoint flow obeys F[t-1] = a[t] (F[t] + C[t] dy[t]).
    """
    C: tl.constexpr = 4 * V
    N_BLOCKS: tl.constexpr = (D + C - 1) // C
    WIDTH: tl.constexpr = 2 if p_dt_weight.dtype.element_ty.primitive_bitwidth == 16 else 1
    i_channel = tl.program_id(0) % N_BLOCKS * C
    # All directions of the same tokens run side by side, so that they share reads of the map.
    i_slot = tl.program_id(0) // N_BLOCKS % 4
    i_direction = i_slot // 2 + i_slot % 2 * 2
    is_column, is_reverse = i_slot >= 2, i_slot % 2 == 1
    n_segments = (n_tiles + n_walk - 1) // n_walk
    i_segment = tl.program_id(0) // (4 * N_BLOCKS)
    i_image = i_segment // n_segments
    i_segment -= i_image * n_segments
    i_first = i_segment * n_walk
    n_now = tl.minimum(n_walk, n_tiles - i_first)
    weight, bias = step_weights(p_dt_weight, p_dt_bias, i_channel, i_direction, D, R, BLOCK_R, V, PRECISION)
    o_half = half_offsets(i_channel, C)
    m_half = o_half < D
    i_summary = ((i_image * 4 + i_direction) * n_segments + i_segment).to(tl.int64) * (N * D)
    p_state += i_summary + o_half
    p_decay += i_summary + o_half
    state, total = tl.zeros((2, C), tl.float32), tl.full((2, C), 1.0, tl.float32)
    rate = load_rate(p_rate, i_channel, i_direction, 0, D, N, Q, V)
    for i in range(n_now):
        i_tile = i_first + tl.where(is_reverse != ADJOINT, n_now - 1 - i, i)
        o_pixel, m_token = tile_tokens(i_image, i_tile, is_column, is_reverse, height, width, T, Q)
        rows = load_tile(p_rows, o_pixel, m_token, i_channel, stride_pixel, D, V).to(tl.float32)
        low_rank = load_low_rank(p_projected, o_pixel, i_direction, K, R, BLOCK_R)
        v = softplus_log2(raw_steps(low_rank, weight, bias, WIDTH, PRECISION), PRECISE)
        if N == 1:
            b_B, b_C = only_weights(p_projected, low_rank, o_pixel, i_direction, K, R, V, WIDTH, PRECISION)
            b_weight = b_C if ADJOINT else b_B
        for n in tl.range(N, loop_unroll_factor=UNROLL if N > 1 else 1):
            if N > 1:  # too many for registers
                rate = load_rate(p_rate, i_channel, i_direction, n, D, N, Q, V)
                if i > 0:  # and not ahead of where it was stored
                    state = tl.load(p_state + n * D, mask=m_half, other=0.0)
                    total = tl.load(p_decay + n * D, mask=m_half, other=1.0)
                else:
                    state, total = tl.zeros((2, C), tl.float32), tl.full((2, C), 1.0, tl.float32)
                p_weight = p_projected + (i_direction * K + R + N * ADJOINT + n) + o_pixel.to(tl.int64) * (4 * K)
                b_weight = tl.load(p_weight).to(tl.float32)[:, :, None]
            decay = tl.exp2(v * -rate[None, :, :])
            end = end_flow(decay, rows * b_weight) if ADJOINT else end_state(decay, rows * v * (b_weight * LN_2))
            total_now, _, state = chain_ends(as_chains(product(decay)), as_chains(end), state, ADJOINT)
            total *= total_now * other_half(total_now)
            if N > 1:
                tl.store(p_state + n * D, state, mask=m_half)
                tl.store(p_decay + n * D, total, mask=m_half)
    if N == 1:
        tl.store(p_state, state, mask=m_half)
        tl.store(p_decay, total, mask=m_half)


@triton.jit
def _load_part(
    p_state, p_decay, i_part, i_first, n_part, n_segments, o_channel, m_channel, is_reverse, stride, S: tl.constexpr
):
    """Segments (S, P, C) ``i_first`` on of every part, in scan order: end states, decays, numbers, mask."""
    i_inside = i_first + tl.arange(0, S)
    i_order = i_part[None, :] * n_part + i_inside[:, None]
    m_order = (i_inside < n_part)[:, None] & (i_order >= 0) & (i_order < n_segments)
    i_segment = tl.where(is_reverse, n_segments - 1 - i_order, i_order)
    mask = m_order[:, :, None] & m_channel[None, None, :]
    # As for tiles, the hints keep the scanned axis in the registers of a lane.
    p_local = p_state + i_segment[:, :, None] * stride + o_channel[None, None, :]
    p_total = p_decay + i_segment[:, :, None] * stride + o_channel[None, None, :]
    local = tl.load(tl.max_contiguous(p_local, [1, 2, 4]), mask=mask, other=0.0)
    decay = tl.load(tl.max_contiguous(p_total, [1, 2, 4]), mask=mask, other=1.0)
    return local, decay, i_order, mask


@triton.jit(do_not_specialize=["n_segments", "n_part"])
def selective_scan_2d_carry_kernel(
    p_state,
    p_decay,
    p_entering,
    n_segments,
    n_part,
    D: tl.constexpr,
    N: tl.constexpr,
    ADJOINT: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
):
    """States that enter the segments, from those they end with on their own; both (batch, 4, segments, N, D).

    The segments are scanned in P parts of ``n_part``: first each part up to the next one, then the parts, then again
    inside each part.
    """
    N_BLOCKS: tl.constexpr = (D + C - 1) // C
    i_sequence = (tl.program_id(0) // (N_BLOCKS * N)).to(tl.int64)
    i_state = tl.program_id(0) // N_BLOCKS % N
    o_channel = tl.program_id(0) % N_BLOCKS * C + tl.arange(0, C)
    m_channel = o_channel < D
    is_reverse = (i_sequence % 4 >= 2) != ADJOINT
    p_state += i_sequence * n_segments * (N * D) + i_state * D
    p_entering += i_sequence * n_segments * (N * D) + i_state * D
    p_decay += i_sequence * n_segments * (N * D) + i_state * D
    i_part = tl.arange(0, P)

    # Each part looks at the one before it, so that the scan over parts gives what enters, not what leaves.
    state = tl.zeros((P, C), tl.float32)
    total = tl.full((P, C), 1.0, tl.float32)
    for i_first in range(0, n_part, S):
        local, decay, i_order, mask = _load_part(
            p_state, p_decay, i_part - 1, i_first, n_part, n_segments, o_channel, m_channel, is_reverse, N * D, S
        )
        _before, leaving = scan_states(decay, local, state)
        state = row(leaving, S - 1)
        total *= product(decay)
    _, state = tl.associative_scan((total, state), 0, chain)
    i_start = i_part * n_part
    i_segment = tl.where(is_reverse, n_segments - 1 - i_start, i_start)
    m_part = (i_start < n_segments)[:, None] & m_channel[None, :]
    tl.store(p_entering + i_segment[:, None] * (N * D) + o_channel[None, :], state, mask=m_part)

    for i_first in range(0, n_part, S):
        local, decay, i_order, mask = _load_part(
            p_state, p_decay, i_part, i_first, n_part, n_segments, o_channel, m_channel, is_reverse, N * D, S
        )
        _before, leaving = scan_states(decay, local, state)
        state = row(leaving, S - 1)
        # What leaves a segment enters the next one; the first of a part has been written above.
        i_next = tl.where(is_reverse, n_segments - 2 - i_order, i_order + 1)
        m_next = (i_first + tl.arange(0, S) + 1 < n_part)[:, None] & (i_order + 1 < n_segments)
        p_next = p_entering + i_next[:, :, None] * (N * D) + o_channel[None, None, :]
        tl.store(tl.max_contiguous(p_next, [1, 2, 4]), leaving, mask=mask & m_next[:, :, None])
