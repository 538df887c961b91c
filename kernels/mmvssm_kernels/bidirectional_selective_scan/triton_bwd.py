"""Vim's inner block, Triton backward pass: the adjoint scans of both directions.

A program owns a block of channels of one direction and a segment of one sequence, and walks its tiles from the last to
the first, each in groups of four tokens. The state that the forward pass kept for the tile is walked through it once to
find those that enter the groups; then, from the last group to the first, states and decays of four tokens are computed
again and stay in registers while the gradients walk back over them. What has to be added across programs is left as
partial sums, added in a fixed order: two runs agree bit for bit.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..selective_scan.triton_tile import detach_layout
from ..triton_scan import LN_2, sigmoid, softplus
from .op import bidirectional_selective_scan_op
from .triton_carry import carry
from .triton_launch import RUN_TIME_SIZES, Launch, adjacent_channels
from .triton_reduce import finish, project_backward
from .triton_tile import (
    block_channels,
    convolve,
    in_lanes,
    lane_pointers,
    load_rows,
    load_step_weight,
    load_vector,
    load_weights,
    of_channels,
    of_lanes,
    of_states,
    raw_step_sizes,
    scan_segment,
    silu,
    split_both_dot,
    split_dot,
    state_axes,
    state_pointers,
    state_rates,
    store_input_sums,
    store_weight_sums,
    tile_tokens,
)

# Registers of a thread that let 12 programs run on a multiprocessor, programs that fill a large GPU once, channels of a
# lane, and lanes that share a channel's states.
_MAX_REGISTERS = 168
_ENOUGH_PROGRAMS = 12 * 132
_OWN_CHANNELS = 2
_STATE_LANES = 4


@triton.jit
def _forward(state, rate, p_dt, p_u, p_B, o_local, o_state, N: tl.constexpr):
    """Step size and input (CR, NL, CL) of a token, its decays, and the state behind it."""
    NL: tl.constexpr = o_state.shape[2]
    dt = tl.load(lane_pointers(p_dt, o_local, NL))
    dt_u = dt * tl.load(lane_pointers(p_u, o_local, NL))
    decay = tl.exp2(of_lanes(dt) * rate)
    return dt, dt_u, decay, decay * state + of_lanes(dt_u) * of_states(load_weights(p_B, o_state, N))


@triton.jit
def _walk_group(state, rate, p_dt, p_u, p_B, o_local, o_state, C: tl.constexpr, ROW: tl.constexpr, N: tl.constexpr):
    """State behind four tokens."""
    for k in tl.static_range(4):
        _, _, _, state = _forward(state, rate, p_dt + k * C, p_u + k * C, p_B + k * ROW, o_local, o_state, N)
    return state


@triton.jit
def _backward(flow, dA, before, state, decay, dt, dt_u, rate, p_w, p_B, o_local, o_state, N: tl.constexpr):
    """Over one token: flow that leaves it, sum of gradients of the decay rates, and a lane's shares of four sums.

    ``before`` and ``state`` are the states in front of and behind the token, ``flow`` is what reaches the latter from
    the next one. The sums are those over channels of dB and dC, shares (NR, NG, NL, CL, 2), and those over states of
    ``grad B`` and ``flow before rate``, shares (CR, NL, CL, 2).
    """
    w = tl.load(lane_pointers(p_w, o_local, o_state.shape[2]))
    B = load_weights(p_B, o_state, N)
    C = load_weights(p_B + N, o_state, N)
    grad = flow + of_lanes(w) * of_states(C)
    flow = decay * grad
    through = flow * before
    dA += through * of_lanes(dt)
    of_weights = tl.join(tl.sum(grad * of_lanes(dt_u), axis=2), tl.sum(state * of_lanes(w), axis=2))
    of_inputs = tl.join(in_lanes(grad * of_states(B)), in_lanes(through * rate))
    return flow, dA, of_weights, of_inputs


@triton.jit
def _summarize(flow, rate, p_dt, p_w, p_C, o_local, o_state, N: tl.constexpr):
    """Flow that leaves a token."""
    NL: tl.constexpr = o_state.shape[2]
    w = tl.load(lane_pointers(p_w, o_local, NL))
    dt = tl.load(lane_pointers(p_dt, o_local, NL))
    return tl.exp2(of_lanes(dt) * rate) * (flow + of_lanes(w) * of_states(load_weights(p_C, o_state, N)))


@triton.jit
def _fold_rows(tile):
    """Sums (8, C) of every eighth row of (T, C), which the same lane holds."""
    return tl.sum(tl.reshape(tile, (tile.shape[0] // 8, 8, tile.shape[1])), axis=0)


@triton.jit
def _walk(
    p_xz,
    p_dout,
    p_projected,
    p_taps,
    p_border,
    p_summary,
    p_step,
    p_scratch,
    p_enter,
    p_y,
    p_du,
    p_dxz,
    p_dprojected,
    p_partial,
    p_dt_weight,
    p_dt_bias,
    p_A_log,
    p_skip,
    scale,
    length,
    channels: tl.constexpr,
    rank,
    n_all,
    n_tiles,
    n_segments,
    stride_x_batch,
    stride_x_token,
    stride_dout_batch,
    stride_dout_token,
    n_partial,
    N: tl.constexpr,
    W: tl.constexpr,
    RANK: tl.constexpr,
    K: tl.constexpr,
    REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr,
    SEGMENTED: tl.constexpr,
    T: tl.constexpr,
    NR: tl.constexpr,
    NG: tl.constexpr,
    CR: tl.constexpr,
    NL: tl.constexpr,
    CL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The programs of one direction."""
    C: tl.constexpr = CR * CL
    ROW: tl.constexpr = RANK + 2 * N
    i_block = tl.program_id(0)
    i_segment = tl.program_id(1) // K
    i_direction = 1 if REVERSE else 0
    i_batch = tl.program_id(2).to(tl.int64)
    n_batch = tl.num_programs(2)
    i_sequence = i_direction * n_batch + i_batch
    i_program = (i_sequence * n_segments + i_segment) * tl.num_programs(0) + i_block
    p_x = p_xz + i_batch * stride_x_batch
    p_z = p_x + channels
    p_dout += i_batch * stride_dout_batch
    p_y += i_batch * n_all * T * channels
    p_dz = p_dxz + i_batch * length * 2 * channels + channels
    p_du += i_sequence * n_all * T * channels
    p_projected += i_sequence * n_all * T * ROW
    # Rows of the backward direction are written from the last to the first.
    STEP: tl.constexpr = -ROW if REVERSE else ROW
    p_dprojected += (i_block.to(tl.int64) * K * n_batch + i_sequence) * n_all * T * ROW
    if REVERSE:
        p_dprojected += (n_all * T - 1) * ROW
    p_taps += i_direction * (W + 1) * channels
    p_border += i_sequence * (n_all - 1) * N * channels
    p_summary += i_sequence * n_segments * N * channels
    p_step += i_sequence * n_segments * channels
    p_partial += ((i_batch * n_segments + i_segment) * K + i_direction) * n_partial * channels
    p_dt = p_scratch + i_program * (6 * T * C)
    p_u = p_dt + T * C
    p_w = p_u + T * C
    p_q = p_w + T * C
    p_r = p_q + T * C
    p_slope = p_r + T * C
    p_enter += i_program * (T // 4 * N * C)

    o_channel, m_channel = block_channels(i_block, channels, C)
    o_tile = tl.arange(0, T)[:, None] * C + tl.max_contiguous(tl.arange(0, C), 4)[None, :]
    o_state, o_local = state_axes(NR, NG, CR, NL, CL)
    o_owned = i_block * C + o_local
    m_owned = (o_owned < channels) | (channels % C == 0)
    m_exists = of_states((o_state < N) | (NR * NG * NL == N))
    m_states = of_channels(m_owned) & m_exists
    rate = state_rates(p_A_log, o_state, o_owned, m_states, N)
    weight = load_step_weight(p_dt_weight, o_channel, m_channel, rank, BLOCK_R, p_xz.dtype.element_ty)
    bias = load_vector(p_dt_bias, o_channel, m_channel)
    skip = load_vector(p_skip, o_channel, m_channel)
    i_first, n_own, i_scan = scan_segment(i_segment, n_segments, n_tiles, n_all, REVERSE)
    i_back = n_segments - 1 - i_scan
    flow = tl.zeros(rate.shape, tl.float32)
    if SEGMENTED and not SUMMARY:
        # What the segment behind this one in scan order hands on.
        p_flow = state_pointers(p_summary + (i_back - 1) * N * channels, o_state, o_owned, N)
        flow = tl.load(p_flow, mask=m_states & (i_back > 0), other=0.0)
    dA = tl.zeros(rate.shape, tl.float32)
    steps = tl.zeros((C,), tl.float32)
    dbias = tl.zeros((8, C), tl.float32)
    dskip = tl.zeros((8, C), tl.float32)
    dweight = tl.zeros((C, BLOCK_R), tl.float32)
    for i in range(n_own):
        i_tile = i_first + n_own - 1 - i
        o_scan, o_token = tile_tokens(i_tile, n_all, T, REVERSE)
        m_token = o_token < length
        low_rank, raw = raw_step_sizes(p_projected, weight, bias, o_scan, rank, ROW, BLOCK_R, PRECISION)
        raw = tl.reshape(detach_layout(raw[None, :, :]), raw.shape)  # leaves the product's layout once, not per result
        dt = softplus(raw)
        tl.store(p_dt + o_tile, dt)
        z = load_rows(p_z, o_token, m_token, o_channel, m_channel, stride_x_token)
        dout = scale * load_rows(p_dout, o_token, m_token, o_channel, m_channel, stride_dout_token)
        gate = sigmoid(z)
        w = dout * z * gate
        tl.store(p_w + o_tile, w)
        if SUMMARY:
            steps += tl.sum(dt, axis=0)
        else:
            if not REVERSE:
                y = load_rows(p_y, o_token, m_token, o_channel, m_channel, channels)
                dz = dout * y * gate * (1.0 + z * (1.0 - gate))
                p_tile = p_dz + o_token[:, None] * (2 * channels) + o_channel[None, :]
                tl.store(p_tile, dz.to(p_dz.dtype.element_ty), mask=m_token[:, None] & m_channel[None, :])
            conv = convolve(p_x, p_taps, o_token, length, o_channel, m_channel, channels, stride_x_token, REVERSE, W)
            u = silu(conv)
            dskip += _fold_rows(u * w)
            tl.store(p_u + o_tile, u)
            tl.store(p_slope + o_tile, sigmoid(raw))
        tl.debug_barrier()  # other lanes read what is stored above, here and below
        p_B = p_projected + i_tile * T * ROW + RANK
        if SUMMARY:
            for j in range(0, T, 4):
                k = T - 1 - j
                p_C = p_B + N + k * ROW
                p_t = p_dt + k * C
                p_v = p_w + k * C
                flow = _summarize(flow, rate, p_t, p_v, p_C, o_local, o_state, N)
                flow = _summarize(flow, rate, p_t - C, p_v - C, p_C - ROW, o_local, o_state, N)
                flow = _summarize(flow, rate, p_t - 2 * C, p_v - 2 * C, p_C - 2 * ROW, o_local, o_state, N)
                flow = _summarize(flow, rate, p_t - 3 * C, p_v - 3 * C, p_C - 3 * ROW, o_local, o_state, N)
            tl.debug_barrier()
        else:
            p_kept = state_pointers(p_border + (i_tile.to(tl.int64) - 1) * N * channels, o_state, o_owned, N)
            state = tl.load(p_kept, mask=m_states & (i_tile > 0), other=0.0)
            tl.store(state_pointers(p_enter, o_state, o_local, N), state, mask=m_exists)
            for j in range(0, T - 4, 4):
                state = _walk_group(state, rate, p_dt + j * C, p_u + j * C, p_B + j * ROW, o_local, o_state, C, ROW, N)
                tl.store(state_pointers(p_enter + (j // 4 + 1) * (N * C), o_state, o_local, N), state, mask=m_exists)
            p_dB = p_dprojected + i_tile * T * STEP + RANK
            for i_group in range(T // 4):
                j = T - 4 - 4 * i_group
                p_t = p_dt + j * C
                p_v = p_u + j * C
                p_b = p_B + j * ROW
                p_g = p_dB + j * STEP
                h0 = tl.load(state_pointers(p_enter + j // 4 * (N * C), o_state, o_local, N), mask=m_exists, other=0.0)
                dt0, v0, a0, h1 = _forward(h0, rate, p_t, p_v, p_b, o_local, o_state, N)
                dt1, v1, a1, h2 = _forward(h1, rate, p_t + C, p_v + C, p_b + ROW, o_local, o_state, N)
                p_a = p_w + j * C
                dt2, v2, a2, h3 = _forward(h2, rate, p_t + 2 * C, p_v + 2 * C, p_b + 2 * ROW, o_local, o_state, N)
                dt3, v3, a3, h4 = _forward(h3, rate, p_t + 3 * C, p_v + 3 * C, p_b + 3 * ROW, o_local, o_state, N)
                flow, dA, s3, r3 = _backward(
                    flow, dA, h3, h4, a3, dt3, v3, rate, p_a + 3 * C, p_b + 3 * ROW, o_local, o_state, N
                )
                flow, dA, s2, r2 = _backward(
                    flow, dA, h2, h3, a2, dt2, v2, rate, p_a + 2 * C, p_b + 2 * ROW, o_local, o_state, N
                )
                flow, dA, s1, r1 = _backward(
                    flow, dA, h1, h2, a1, dt1, v1, rate, p_a + C, p_b + ROW, o_local, o_state, N
                )
                flow, dA, s0, r0 = _backward(flow, dA, h0, h1, a0, dt0, v0, rate, p_a, p_b, o_local, o_state, N)
                store_weight_sums(p_g, s0, s1, s2, s3, STEP, N)
                store_input_sums(p_q + j * C, r0, r1, r2, r3, T * C)
            tl.debug_barrier()
            q = tl.load(p_q + o_tile)
            draw = (tl.load(p_u + o_tile) * q + LN_2 * tl.load(p_r + o_tile)) * tl.load(p_slope + o_tile)
            tl.store(p_r + o_tile, draw)
            du = tl.load(p_dt + o_tile) * q + skip[None, :] * tl.load(p_w + o_tile)
            p_tile = p_du + o_token[:, None] * channels + o_channel[None, :]
            tl.store(p_tile, du.to(p_du.dtype.element_ty), mask=m_channel[None, :])
            dbias += _fold_rows(draw)
            tl.debug_barrier()
            # Loaded again for the products: the compiler would compute it once more in the layout of their operands.
            draw = tl.load(p_r + o_tile)
            o_rank = tl.arange(0, BLOCK_R)
            dlow_rank = split_dot(draw, tl.trans(weight), tl.zeros((T, BLOCK_R), tl.float32), PRECISION)
            p_low = p_dprojected + o_scan[:, None] * STEP + o_rank[None, :]
            tl.store(p_low, dlow_rank, mask=(o_rank < rank)[None, :])
            dweight = split_both_dot(tl.trans(draw), low_rank, dweight, weight.dtype, PRECISION)
    if SUMMARY:
        tl.store(state_pointers(p_summary + i_back * N * channels, o_state, o_owned, N), flow, mask=m_states)
        tl.store(p_step + i_back * channels + o_channel, steps, mask=m_channel)
    else:
        # A = -exp(A_log), so the gradient of A_log is A times that of A.
        p_dA = p_partial + of_states(o_state) * channels + of_channels(o_owned)
        tl.store(p_dA, dA * (rate * LN_2), mask=m_states)
        p_partial += N * channels + o_channel
        o_rank = tl.arange(0, BLOCK_R)
        m_weight = (o_rank < rank)[None, :] & m_channel[:, None]
        tl.store(p_partial[:, None] + o_rank[None, :] * channels, dweight, mask=m_weight)
        tl.store(p_partial + rank * channels, tl.sum(dbias, axis=0), mask=m_channel)
        tl.store(p_partial + (rank + 1) * channels, tl.sum(dskip, axis=0), mask=m_channel)


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def bidirectional_selective_scan_bwd_kernel_scan(
    p_xz,
    p_dout,
    p_projected,
    p_taps,
    p_border,
    p_summary,
    p_step,
    p_scratch,
    p_enter,
    p_y,
    p_du,
    p_dxz,
    p_dprojected,
    p_partial,
    p_dt_weight,
    p_dt_bias,
    p_A_log,
    p_skip,
    p_dt_weight_b,
    p_dt_bias_b,
    p_A_log_b,
    p_skip_b,
    scale,
    length,
    channels: tl.constexpr,
    rank,
    n_all,
    n_tiles,
    n_segments,
    stride_x_batch,
    stride_x_token,
    stride_dout_batch,
    stride_dout_token,
    n_partial,
    N: tl.constexpr,
    W: tl.constexpr,
    RANK: tl.constexpr,
    K: tl.constexpr,
    SUMMARY: tl.constexpr,
    SEGMENTED: tl.constexpr,
    T: tl.constexpr,
    NR: tl.constexpr,
    NG: tl.constexpr,
    CR: tl.constexpr,
    NL: tl.constexpr,
    CL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients up to those of u; or only what each segment's adjoint scan hands on.

    Writes du (K, B, L, E), the gate's half of dxz (B, L, 2E), dprojected (channel blocks, K, B, L, row), and of every
    program's partial sums (B S, K, n_partial, E) the rows of A_log, dt_proj_weight, dt_proj_bias and D.
    """
    if tl.program_id(1) % K == 0:
        _walk(
            p_xz,
            p_dout,
            p_projected,
            p_taps,
            p_border,
            p_summary,
            p_step,
            p_scratch,
            p_enter,
            p_y,
            p_du,
            p_dxz,
            p_dprojected,
            p_partial,
            p_dt_weight,
            p_dt_bias,
            p_A_log,
            p_skip,
            scale,
            length,
            channels,
            rank,
            n_all,
            n_tiles,
            n_segments,
            stride_x_batch,
            stride_x_token,
            stride_dout_batch,
            stride_dout_token,
            n_partial,
            N,
            W,
            RANK,
            K,
            False,
            SUMMARY,
            SEGMENTED,
            T,
            NR,
            NG,
            CR,
            NL,
            CL,
            BLOCK_R,
            PRECISION,
        )
    else:
        _walk(
            p_xz,
            p_dout,
            p_projected,
            p_taps,
            p_border,
            p_summary,
            p_step,
            p_scratch,
            p_enter,
            p_y,
            p_du,
            p_dxz,
            p_dprojected,
            p_partial,
            p_dt_weight_b,
            p_dt_bias_b,
            p_A_log_b,
            p_skip_b,
            scale,
            length,
            channels,
            rank,
            n_all,
            n_tiles,
            n_segments,
            stride_x_batch,
            stride_x_token,
            stride_dout_batch,
            stride_dout_token,
            n_partial,
            N,
            W,
            RANK,
            K,
            True,
            SUMMARY,
            SEGMENTED,
            T,
            NR,
            NG,
            CR,
            NL,
            CL,
            BLOCK_R,
            PRECISION,
        )


def bidirectional_backward(
    dout: Tensor, xz: Tensor, parameters: list[Tensor], scale: float, borders, projected, taps, sums
) -> tuple[Tensor, Tensor]:
    """Gradient of ``xz`` (B, L, 2E), and those of all parameters, flat and in float32."""
    if projected.numel() == 0:
        arguments = (xz, parameters, scale, True, xz.dtype, "triton")
        _, borders, projected, taps, sums = bidirectional_selective_scan_op(*arguments)
    launch = Launch(xz, parameters)
    dout = adjacent_channels(dout)
    batch, length, channels = launch.batch, launch.length, launch.channels
    sequences = (launch.directions, batch)
    grid, n_tiles, segments, constants = launch.plan(
        _OWN_CHANNELS, _STATE_LANES, _MAX_REGISTERS, _ENOUGH_PROGRAMS, launch.directions
    )
    summary, steps = launch.summaries(segments)
    block, tile = constants["CR"] * constants["CL"], constants["T"]
    programs = grid[0] * grid[1] * grid[2]
    scratch = launch.empty(programs, 6, tile, block)
    enter = launch.empty(programs, tile // 4, block, launch.state)
    # In float32: roundings of du and of the low-rank values are what small models' gradients suffer from.
    du = launch.empty(*sequences, launch.padded, channels)
    dxz = launch.empty(batch, length, 2 * channels, dtype=xz.dtype)
    dprojected = launch.empty(grid[0], *sequences, launch.padded, launch.row)
    partial = launch.empty(batch * segments, launch.directions, launch.state + launch.rank + 2, channels)
    members = [p[3:] for p in launch.parameters]
    tensors = (launch.xz, dout, projected, taps, borders, summary, steps, scratch, enter, sums, du, dxz, dprojected)
    sizes = (launch.length, launch.channels, launch.rank, launch.tiles, n_tiles, segments)
    arguments = (*tensors, partial, *members[0], *members[-1], scale, *sizes)
    arguments += (*launch.xz.stride()[:2], *dout.stride()[:2], partial.shape[2])
    constants |= dict(
        K=launch.directions,
        SEGMENTED=segments > 1,
        W=launch.width,
        RANK=launch.row - 2 * launch.state,
        BLOCK_R=max(16, triton.next_power_of_2(launch.rank)),
        PRECISION=launch.precision,
    )
    if segments > 1:
        bidirectional_selective_scan_bwd_kernel_scan[grid](*arguments, SUMMARY=True, **constants)
        carry(launch, summary, steps)
    bidirectional_selective_scan_bwd_kernel_scan[grid](*arguments, SUMMARY=False, **constants)
    dprojected = dprojected.sum(0) if grid[0] > 1 else dprojected[0]
    return dxz, finish(launch, partial, *project_backward(launch, dprojected, du, dxz, taps))
