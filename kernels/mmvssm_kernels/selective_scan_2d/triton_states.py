"""States at the borders of segments, so that segments can be scanned in parallel.

1. :func:`selective_scan_2d_states_kernel` scans every segment of every direction from a zero state and leaves the state
   it ends with and the sum of its step sizes; for the adjoint scan it does the same in the opposite order.
2. :func:`selective_scan_2d_carry_kernel` turns them into the states that enter the segments.
"""

import triton
import triton.language as tl

from .triton_tile import (
    LN_2,
    LOG2_E,
    chain,
    end_flow,
    end_state,
    load_low_rank,
    load_rate,
    load_tile,
    raw_steps,
    row,
    scan_groups,
    scan_states,
    segment_tokens,
    softplus_log2,
    step_weights,
    store_row,
)


@triton.jit(do_not_specialize=["batch", "height", "width", "n_segments", "n_loops"])
def selective_scan_2d_states_kernel(
    p_rows,
    p_projected,
    p_dt_weight,
    p_dt_bias,
    p_rate,
    p_state,
    p_steps,
    batch,
    height,
    width,
    n_segments,
    n_loops,
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
):
    """Local end states (batch, 4, segments, N, D) and sums of step sizes (batch, 4, segments, D).

    ``p_rows`` is x, or for ``ADJOINT`` the gradient of y; the adjoint flow obeys F[t-1] = a[t] (F[t] + C[t] dy[t]).
    """
    C: tl.constexpr = 4 * V
    N_BLOCKS: tl.constexpr = (D + C - 1) // C
    WIDTH: tl.constexpr = 2 if p_dt_weight.dtype.element_ty.primitive_bitwidth == 16 else 1
    i_channel = tl.program_id(0) % N_BLOCKS * C
    # Rows and columns of the same tokens run side by side, so that they share reads of the map.
    path = tl.program_id(0) // N_BLOCKS % 2
    i_first = tl.program_id(0) // (2 * N_BLOCKS) * n_loops
    weight_0, bias_0 = step_weights(p_dt_weight, p_dt_bias, i_channel, path, D, R, BLOCK_R, V, PRECISION)
    weight_1, bias_1 = step_weights(p_dt_weight, p_dt_bias, i_channel, path + 2, D, R, BLOCK_R, V, PRECISION)
    m_first = tl.arange(0, Q) == 0
    for i_sequence in range(i_first, tl.minimum(i_first + n_loops, batch * n_segments)):
        o_pixel, m_token = segment_tokens(i_sequence, n_segments, path == 1, height, width, T, Q)
        rows = load_tile(p_rows, o_pixel, m_token, i_channel, stride_pixel, D, V).to(tl.float32)
        for d in tl.static_range(2):
            i_direction, i_slot = path + 2 * d, 2 * path + d
            low_rank = load_low_rank(p_projected, o_pixel, i_slot, K, R, BLOCK_R)
            if d == 0:
                raw = raw_steps(low_rank, weight_0, bias_0, WIDTH, PRECISION)
            else:
                raw = raw_steps(low_rank, weight_1, bias_1, WIDTH, PRECISION)
            v = softplus_log2(raw, PRECISE)
            steps = tl.sum(v, axis=0)
            p_token = p_projected + i_slot * K + (R + N * ADJOINT) + o_pixel.to(tl.int64) * (4 * K)
            i_summary = (i_sequence // n_segments * 4 + i_direction) * n_segments + i_sequence % n_segments
            for n in range(N):
                rate = load_rate(p_rate, i_channel, i_direction, n, D, N, Q, V)
                b_weight = tl.load(p_token + n).to(tl.float32)
                decay = tl.exp2(v * -rate[None, :, :])
                if ADJOINT:
                    state = end_flow(decay, rows * b_weight[:, :, None], d == 1)
                else:
                    state = end_state(decay, rows * v * (b_weight * LN_2)[:, :, None], d == 1)
                # Adjoint scans run against the direction.
                state, _, _ = scan_groups(tl.exp2(steps * -rate), state, (d == 1) != ADJOINT)
                store_row(p_state, state, m_first, i_summary * N + n, i_channel, D, V)
            steps = tl.broadcast_to(tl.sum(steps, axis=0)[None, :], steps.shape)
            store_row(p_steps, steps, m_first, i_summary, i_channel, D, V)


@triton.jit
def _load_part(
    p_state, p_steps, i_part, i_first, n_part, n_segments, o_channel, m_channel, is_reverse, stride, D, S: tl.constexpr
):
    """Segments (S, P, C) ``i_first`` on of every part, in scan order: end states, sums of steps, numbers, mask."""
    i_inside = i_first + tl.arange(0, S)
    i_order = i_part[None, :] * n_part + i_inside[:, None]
    m_order = (i_inside < n_part)[:, None] & (i_order >= 0) & (i_order < n_segments)
    i_segment = tl.where(is_reverse, n_segments - 1 - i_order, i_order)
    mask = m_order[:, :, None] & m_channel[None, None, :]
    # As for tiles, the hints keep the scanned axis in the registers of a lane.
    p_local = p_state + i_segment[:, :, None] * stride + o_channel[None, None, :]
    p_step = p_steps + i_segment[:, :, None] * D + o_channel[None, None, :]
    local = tl.load(tl.max_contiguous(p_local, [1, 2, 4]), mask=mask, other=0.0)
    steps = tl.load(tl.max_contiguous(p_step, [1, 2, 4]), mask=mask, other=0.0)
    return local, steps, i_order, mask


@triton.jit(do_not_specialize=["n_segments", "n_part"])
def selective_scan_2d_carry_kernel(
    p_state,
    p_steps,
    p_entering,
    p_rate,
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
    i_direction = i_sequence % 4
    is_reverse = (i_direction >= 2) != ADJOINT
    rate = tl.load(p_rate + (i_direction * N + i_state) * D + o_channel, mask=m_channel, other=0.0).to(tl.float32)
    if N == 1:
        rate = tl.exp2(rate * LOG2_E)
    p_state += i_sequence * n_segments * (N * D) + i_state * D
    p_entering += i_sequence * n_segments * (N * D) + i_state * D
    p_steps += i_sequence * n_segments * D
    i_part = tl.arange(0, P)

    # Each part looks at the one before it, so that the scan over parts gives what enters, not what leaves.
    state = tl.zeros((P, C), tl.float32)
    total = tl.zeros((P, C), tl.float32)
    for i_first in range(0, n_part, S):
        local, steps, i_order, mask = _load_part(
            p_state, p_steps, i_part - 1, i_first, n_part, n_segments, o_channel, m_channel, is_reverse, N * D, D, S
        )
        leaving, _inflow = scan_states(tl.exp2(steps * -rate[None, None, :]), local, state, False)
        state = row(leaving, S - 1)
        total += tl.sum(steps, axis=0)
    _, state = tl.associative_scan((tl.exp2(total * -rate[None, :]), state), 0, chain)
    i_start = i_part * n_part
    i_segment = tl.where(is_reverse, n_segments - 1 - i_start, i_start)
    m_part = (i_start < n_segments)[:, None] & m_channel[None, :]
    tl.store(p_entering + i_segment[:, None] * (N * D) + o_channel[None, :], state, mask=m_part)

    for i_first in range(0, n_part, S):
        local, steps, i_order, mask = _load_part(
            p_state, p_steps, i_part, i_first, n_part, n_segments, o_channel, m_channel, is_reverse, N * D, D, S
        )
        leaving, _inflow = scan_states(tl.exp2(steps * -rate[None, None, :]), local, state, False)
        state = row(leaving, S - 1)
        # What leaves a segment enters the next one; the first of a part has been written above.
        i_next = tl.where(is_reverse, n_segments - 2 - i_order, i_order + 1)
        m_next = (i_first + tl.arange(0, S) + 1 < n_part)[:, None] & (i_order + 1 < n_segments)
        p_next = p_entering + i_next[:, :, None] * (N * D) + o_channel[None, None, :]
        tl.store(tl.max_contiguous(p_next, [1, 2, 4]), leaving, mask=mask & m_next[:, :, None])
