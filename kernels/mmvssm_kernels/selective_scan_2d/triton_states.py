"""States at the borders of segments, so that segments can be walked in parallel.

1. :func:`selective_scan_2d_states_kernel` walks every segment of every direction from a zero state and leaves the
   state it ends with and the sum of its step sizes; for the adjoint scan it does the same in the opposite order.
2. :func:`selective_scan_2d_carry_kernel` turns them into the states that enter the segments.
"""

import triton
import triton.language as tl

from .triton_tile import (
    LN_2,
    LOG2_E,
    chain,
    direction_geometry,
    load_low_rank,
    load_rate,
    load_tile,
    next_tile,
    raw_steps,
    row,
    scan_states,
    set_row,
    softplus_log2,
    step_weights,
    store_rows,
    store_states,
    tile_tokens,
)


@triton.jit(do_not_specialize=["batch", "height", "width", "n_tiles", "n_segments"])
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
    n_tiles,
    n_segments,
    stride_pixel: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
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
    K: tl.constexpr = R + 2 * N
    C: tl.constexpr = 4 * V
    N_BLOCKS: tl.constexpr = (D + C - 1) // C
    WIDTH: tl.constexpr = 2 if p_dt_weight.dtype.element_ty.primitive_bitwidth == 16 else 1
    i_channel = tl.program_id(0) % N_BLOCKS * C
    # Directions of the same tokens run side by side, so that they share reads of the map.
    i_direction = tl.program_id(0) // N_BLOCKS % 4
    i_sequence = tl.program_id(0) // (4 * N_BLOCKS) * Q + tl.arange(0, Q)
    m_sequence = i_sequence < batch * n_segments
    i_sequence = tl.minimum(i_sequence, batch * n_segments - 1)
    m_all = tl.full((T, Q), True, tl.int1)
    i_batch = i_sequence // n_segments
    i_segment = i_sequence % n_segments
    o_image = i_batch * height * width
    o_summary = (i_batch * 4 + i_direction) * n_segments + i_segment

    # Adjoint scans run against the direction.
    is_reverse = (i_direction >= 2) != ADJOINT
    n_outer, n_inner, n_tiles_inner, stride_outer, stride_inner = direction_geometry(
        i_direction % 2 == 1, height, width, T
    )
    weight, bias = step_weights(p_dt_weight, p_dt_bias, i_channel, i_direction, D, R, BLOCK_R, V, PRECISION)
    p_weight = p_projected + i_direction * K + (R + N * ADJOINT)

    i_tile = i_segment * n_tiles + tl.where(is_reverse, n_tiles - 1, 0)
    i_outer, i_inner = i_tile // n_tiles_inner, i_tile % n_tiles_inner
    step = tl.where(is_reverse, -1, 1)
    rate = load_rate(p_rate, m_sequence, i_channel, i_direction, 0, D, N, V)
    state = tl.zeros((triton.next_power_of_2(N), Q, C), tl.float32)
    steps = tl.zeros((Q, C), tl.float32)
    o_pixel, m_token = tile_tokens(
        o_image, i_outer, i_inner, m_sequence, is_reverse, n_outer, n_inner, stride_outer, stride_inner, T
    )
    low_rank = load_low_rank(p_projected, o_pixel, i_direction, K, R, BLOCK_R)
    rows = load_tile(p_rows, o_pixel, m_all, i_channel, stride_pixel, D, V)
    for j in range(n_tiles):
        raw = raw_steps(low_rank, m_token, weight, bias, WIDTH, PRECISION)
        p_token = p_weight + o_pixel.to(tl.int64) * (4 * K)
        m_now, rows_now = m_token, rows.to(tl.float32)
        # The next tile's inputs are fetched before this one is computed.
        i_outer, i_inner = next_tile(i_outer, i_inner, n_tiles_inner, tl.where(j + 1 < n_tiles, step, 0))
        o_pixel, m_token = tile_tokens(
            o_image, i_outer, i_inner, m_sequence, is_reverse, n_outer, n_inner, stride_outer, stride_inner, T
        )
        low_rank = load_low_rank(p_projected, o_pixel, i_direction, K, R, BLOCK_R)
        rows = load_tile(p_rows, o_pixel, m_all, i_channel, stride_pixel, D, V)
        v = softplus_log2(raw, PRECISE)
        steps += tl.sum(v, axis=0)
        if not ADJOINT:
            rows_now *= v
        for n in tl.static_range(N):
            if N > 1:
                rate = load_rate(p_rate, m_sequence, i_channel, i_direction, n, D, N, V)
            # Masked tokens make no step, but their gradient must not enter.
            b_weight = tl.load(p_token + n, mask=m_now, other=0.0) if ADJOINT else tl.load(p_token + n)
            decay = tl.exp2(v * -rate[None, :, :])
            value = rows_now * (b_weight if ADJOINT else b_weight * LN_2)[:, :, None]
            if ADJOINT:
                value *= decay
            _, last = scan_states(decay, value, row(state, n))
            state = set_row(state, last, n)
    store_states(p_state, state, o_summary * N, m_sequence, i_channel, D, N, V)
    store_rows(p_steps, steps, o_summary, m_sequence, i_channel, D, D, V)


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
        local, steps, _, _ = _load_part(
            p_state, p_steps, i_part - 1, i_first, n_part, n_segments, o_channel, m_channel, is_reverse, N * D, D, S
        )
        _, state = scan_states(tl.exp2(steps * -rate[None, None, :]), local, state)
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
        leaving, state = scan_states(tl.exp2(steps * -rate[None, None, :]), local, state)
        # What leaves a segment enters the next one; the first of a part has been written above.
        i_next = tl.where(is_reverse, n_segments - 2 - i_order, i_order + 1)
        m_next = (i_first + tl.arange(0, S) + 1 < n_part)[:, None] & (i_order + 1 < n_segments)
        p_next = p_entering + i_next[:, :, None] * (N * D) + o_channel[None, None, :]
        tl.store(tl.max_contiguous(p_next, [1, 2, 4]), leaving, mask=mask & m_next[:, :, None])
