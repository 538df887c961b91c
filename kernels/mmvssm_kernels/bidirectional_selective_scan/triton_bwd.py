"""Vim's inner block, Triton backward pass: the adjoint scans of both directions.

A program owns a block of channels of one direction and a segment of one sequence, and walks its tiles from the last to
the first, each in groups of four tokens. The state that the forward pass kept for the tile is walked through it once to
find those that enter the groups; then, from the last group to the first, states and decays of four tokens are computed
again and stay in registers while the gradients walk back over them. While a tile is walked, the next one is brought
into the cache. What has to be added across programs is left as partial sums, added in a fixed order: two runs agree bit
for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_scan import LN_2, softplus_slope
from .op import bidirectional_selective_scan_op
from .triton_again import scan_inputs
from .triton_carry import carry
from .triton_launch import RUN_TIME_SIZES, Launch, adjacent_channels
from .triton_reduce import finish, project_backward, sum_blocks
from .triton_tile import (
    in_lanes,
    input_sums,
    lane_pointers,
    load_weights,
    of_channels,
    of_lanes,
    of_states,
    quarter_pointers,
    state_axes,
    state_pointers,
    state_rates,
    store_of_channels,
    store_weight_sums,
)

# Registers of a thread that let 12 programs run on a multiprocessor, programs that fill a large GPU once, channels of a
# lane, and lanes that share a channel's states.
_MAX_REGISTERS = 168
_ENOUGH_PROGRAMS = 12 * 132
_OWN_CHANNELS = 2
_STATE_LANES = 4


@triton.jit
def _load_channels(p_row, o_local, o_state):
    """Per-channel values (CR, NL, CL) of a token in float32."""
    return tl.load(lane_pointers(p_row, o_local, o_state.shape[2], True)).to(tl.float32)


@triton.jit
def _forward(state, rate, p_dt, p_B, o_local, o_state, N: tl.constexpr):
    """Step size and input (CR, NL, CL) of a token, its decays, and the state behind it."""
    dt = _load_channels(p_dt, o_local, o_state)
    dt_u = dt * _load_channels(p_dt + o_local.numel, o_local, o_state)
    decay = tl.exp2(of_lanes(dt) * rate)
    return dt, dt_u, decay, decay * state + of_lanes(dt_u) * of_states(load_weights(p_B, o_state, N))


@triton.jit
def _backward(flow, dA, before, state, decay, dt, dt_u, rate, p_w, p_B, o_local, o_state, N: tl.constexpr):
    """Over one token: flow that leaves it, sum of gradients of the decay rates, and a lane's shares of four sums.

    ``before`` and ``state`` are the states in front of and behind the token, ``flow`` is what reaches the latter from
    the next one. The sums are those over channels of dB and dC, shares (NR, NG, NL, CL, 2), and those over states of
    ``grad B`` and ``flow before rate``, shares (CR, NL, CL).
    """
    w = _load_channels(p_w, o_local, o_state)
    B = load_weights(p_B, o_state, N)
    C = load_weights(p_B + N, o_state, N)
    grad = flow + of_lanes(w) * of_states(C)
    flow = decay * grad
    through = flow * before
    dA += through * of_lanes(dt)
    of_weights = tl.join(tl.sum(grad * of_lanes(dt_u), axis=2), tl.sum(state * of_lanes(w), axis=2))
    return flow, dA, of_weights, in_lanes(grad * of_states(B), N), in_lanes(through * rate, N)


@triton.jit
def _summarize(flow, steps, rate, p_dt, p_w, p_C, o_local, o_state, N: tl.constexpr):
    """Flow that leaves a token, and the sum of step sizes."""
    dt = _load_channels(p_dt, o_local, o_state)
    w = _load_channels(p_w, o_local, o_state)
    flow = tl.exp2(of_lanes(dt) * rate) * (flow + of_lanes(w) * of_states(load_weights(p_C, o_state, N)))
    return flow, steps + dt


@triton.jit
def _touch_rows(p_rows, T: tl.constexpr, C: tl.constexpr):
    """One value of every 32 bytes of a tile of rows."""
    VALUES: tl.constexpr = 256 // p_rows.dtype.element_ty.primitive_bitwidth
    return tl.load(p_rows + tl.arange(0, T * C // VALUES) * VALUES)


@triton.jit
def _touch(
    p_dt,
    p_w,
    p_projected,
    p_border,
    i_tile,
    o_block,
    step_w,
    channels: tl.constexpr,
    N: tl.constexpr,
    ROW: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    NS: tl.constexpr,
    SUMMARY: tl.constexpr,
):
    """Values of a tile from all over memory that is read when it is walked, so that the cache has it by then."""
    # Step sizes and inputs.
    dt = _touch_rows(p_dt + i_tile * T * (2 * C), T, 2 * C)
    w = _touch_rows(p_w + i_tile * T * step_w + (T - 1) * tl.minimum(step_w, 0), T, C)
    o_weight = tl.arange(0, max(1, NS // 4))[None, :] * 8
    p_weights = p_projected + (i_tile * T + tl.arange(0, T))[:, None] * ROW + o_weight
    weights = tl.load(p_weights, mask=tl.broadcast_to(o_weight < 2 * N, p_weights.shape), other=0.0)
    if SUMMARY:
        return dt, w, weights
    else:
        o_state = o_block + tl.arange(0, max(1, NS * C // 8)) * 8
        p_states = p_border + (i_tile.to(tl.int64) - 1) * N * channels + o_state
        states = tl.load(p_states, mask=(o_state < channels * N) & (i_tile > 0), other=0.0)
        return dt, w, weights, states


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def bidirectional_selective_scan_bwd_kernel_scan(
    p_dt,
    p_w,
    p_projected,
    p_border,
    p_summary,
    p_step,
    p_enter,
    p_draw,
    p_dweights,
    p_partial,
    p_A_log,
    p_skip,
    p_A_log_b,
    p_skip_b,
    channels: tl.constexpr,
    n_all,
    n_tiles,
    n_segments,
    N: tl.constexpr,
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
    PRECISION: tl.constexpr,
):
    """Gradients of inputs and step sizes; or only what each segment's adjoint scan hands on.

    Step sizes and inputs (K, B, blocks, padded L, 2, C) get their gradients, those of step sizes before the softplus.
    Every program also leaves dweights (blocks, K, B, padded L, 2N) and of its partial sums (B S, K, N + 1, E) the rows
    of A_log and D.
    """
    C: tl.constexpr = CR * CL
    ROW: tl.constexpr = RANK + 2 * N
    i_block = tl.program_id(0)
    n_blocks = tl.num_programs(0)
    i_segment = tl.program_id(1)
    n_batch = tl.num_programs(2) // K
    i_sequence = tl.program_id(2).to(tl.int64)
    i_batch = i_sequence % n_batch
    is_other = i_sequence >= n_batch
    if K == 2:
        p_A_log = tl.where(is_other, p_A_log_b, p_A_log)
        p_skip = tl.where(is_other, p_skip_b, p_skip)
    i_program = (i_sequence * n_segments + i_segment) * n_blocks + i_block
    # Everything lies in scan order, except the gradient of the results, which both directions share.
    step_w = tl.where(is_other, -C, C)
    p_w += (i_batch * n_blocks + i_block) * n_all * T * C + tl.where(is_other, (n_all * T - 1) * C, 0)
    o_sequence = (i_sequence * n_blocks + i_block) * n_all * T * (2 * C)
    p_dt += o_sequence
    p_draw += o_sequence
    p_projected += i_sequence * n_all * T * ROW + RANK
    p_dweights += (i_block.to(tl.int64) * K * n_batch + i_sequence) * n_all * T * (2 * N)
    p_border += i_sequence * (n_all - 1) * N * channels
    p_summary += i_sequence * n_segments * N * channels
    p_step += i_sequence * n_segments * channels
    p_partial += ((i_batch * n_segments + i_segment) * K + is_other) * (N + 1) * channels
    # States are found at the same places behind the first one of the block. Room for two is for what _touch returns.
    o_block = i_block * C * N
    p_enter += i_program * ((T // 4 - 1) * max(2, N) * C) - o_block

    o_state, o_local = state_axes(NR, NG, CR, NL, CL)
    o_owned = i_block * C + o_local
    m_owned = (o_owned < channels) | (channels % C == 0)
    m_states = of_channels(m_owned) & of_states((o_state < N) | (NR * NG * NL == N))
    rate = state_rates(p_A_log, o_state, o_owned, m_states, N, True)
    i_first = i_segment * n_tiles
    n_own = tl.minimum(n_tiles, n_all - i_first)
    i_back = n_segments - 1 - i_segment
    flow = tl.zeros(rate.shape, tl.float32)
    if SEGMENTED and not SUMMARY:
        # What the segment behind this one in scan order hands on.
        p_flow = state_pointers(p_summary + (i_back - 1) * N * channels, o_state, o_owned, N, True)
        flow = tl.load(p_flow, mask=m_states & (i_back > 0), other=0.0)
    dA = tl.zeros(rate.shape, tl.float32)
    steps = tl.zeros((CR, NL, CL), tl.float32)
    dskip = tl.zeros((CR, CL, 4), tl.float32)
    NS: tl.constexpr = NR * NG * NL
    NARROW: tl.constexpr = p_dt.dtype.element_ty != tl.float32
    i_next = i_first + n_own - 1
    seen = _touch(p_dt, p_w, p_projected, p_border, i_next, o_block, step_w, channels, N, ROW, T, C, NS, SUMMARY)
    for i in range(n_own):
        i_tile = i_first + n_own - 1 - i
        o_tile = i_tile * T * (2 * C)
        p_B = p_projected + i_tile * T * ROW
        i_next = tl.maximum(i_tile - 1, i_first)
        seen = _touch(p_dt, p_w, p_projected, p_border, i_next, o_block, step_w, channels, N, ROW, T, C, NS, SUMMARY)
        if SUMMARY:
            for j in range(0, T, 4):
                k = T - 1 - j
                p_C = p_B + N + k * ROW
                p_t = p_dt + o_tile + k * (2 * C)
                p_v = p_w + (i_tile * T + k) * step_w
                for _ in tl.static_range(4):
                    flow, steps = _summarize(flow, steps, rate, p_t, p_v, p_C, o_local, o_state, N)
                    p_C -= ROW
                    p_t -= 2 * C
                    p_v -= step_w
        else:
            p_kept = p_border + (i_tile.to(tl.int64) - 1) * N * channels
            state = tl.load(state_pointers(p_kept, o_state, o_owned, N, True), mask=m_states & (i_tile > 0), other=0.0)
            for j in range(0, T - 4, 4):
                p_t = p_dt + o_tile + j * (2 * C)
                p_b = p_B + j * ROW
                for _ in tl.static_range(4):
                    _, _, _, state = _forward(state, rate, p_t, p_b, o_local, o_state, N)
                    p_t += 2 * C
                    p_b += ROW
                p_to = state_pointers(p_enter + j // 4 * (N * C), o_state, o_owned, N, True)
                tl.store(p_to, state, mask=m_states)
            for i_group in range(T // 4):
                j = T - 4 - 4 * i_group
                o_group = o_tile + j * (2 * C)
                p_t = p_dt + o_group
                p_a = p_w + (i_tile * T + j + 3) * step_w
                p_b = p_B + j * ROW
                h0 = state
                dt0, v0, a0, h1 = _forward(h0, rate, p_t, p_b, o_local, o_state, N)
                p_t += 2 * C
                p_b += ROW
                dt1, v1, a1, h2 = _forward(h1, rate, p_t, p_b, o_local, o_state, N)
                p_t += 2 * C
                p_b += ROW
                dt2, v2, a2, h3 = _forward(h2, rate, p_t, p_b, o_local, o_state, N)
                p_t += 2 * C
                p_b += ROW
                dt3, v3, a3, h4 = _forward(h3, rate, p_t, p_b, o_local, o_state, N)
                flow, dA, s3, q3, r3 = _backward(flow, dA, h3, h4, a3, dt3, v3, rate, p_a, p_b, o_local, o_state, N)
                p_a -= step_w
                p_b -= ROW
                flow, dA, s2, q2, r2 = _backward(flow, dA, h2, h3, a2, dt2, v2, rate, p_a, p_b, o_local, o_state, N)
                # The state that enters the group before this one is loaded ahead.
                p_from = tl.where(j > 4, p_enter + (j // 4 - 2) * (N * C), p_kept)
                m_from = m_states & ((j > 4) | ((j > 0) & (i_tile > 0)))
                state = tl.load(state_pointers(p_from, o_state, o_owned, N, True), mask=m_from, other=0.0)
                tl.debug_barrier()  # otherwise the compiler moves the load to where its result is used
                p_a -= step_w
                p_b -= ROW
                flow, dA, s1, q1, r1 = _backward(flow, dA, h1, h2, a1, dt1, v1, rate, p_a, p_b, o_local, o_state, N)
                p_a -= step_w
                p_b -= ROW
                flow, dA, s0, q0, r0 = _backward(flow, dA, h0, h1, a0, dt0, v0, rate, p_a, p_b, o_local, o_state, N)
                q = input_sums(q0, q1, q2, q3, NARROW, PRECISION)
                r = input_sums(r0, r1, r2, r3, NARROW, PRECISION)
                dt = tl.load(quarter_pointers(p_dt + o_group, o_local, 2 * C)).to(tl.float32)
                u = tl.load(quarter_pointers(p_dt + o_group + C, o_local, 2 * C)).to(tl.float32)
                w = tl.load(quarter_pointers(p_a, o_local, step_w))
                skip = tl.load(p_skip + o_owned, mask=m_owned, other=0.0).to(tl.float32)[:, :, None]
                dskip += u * w
                draw = (u * q + LN_2 * r) * softplus_slope(dt)
                du = dt * q + skip * w
                tl.store(quarter_pointers(p_draw + o_group, o_local, 2 * C), draw.to(p_draw.dtype.element_ty))
                tl.store(quarter_pointers(p_draw + o_group + C, o_local, 2 * C), du.to(p_draw.dtype.element_ty))
                store_weight_sums(p_dweights + (i_tile * T + j) * (2 * N), s0, s1, s2, s3, 2 * N, N)
    # Otherwise the compiler would leave out the loads. The scratch has no other use any more.
    for k in tl.static_range(len(seen)):
        tl.store(p_enter + o_block + tl.arange(0, seen[k].numel), tl.reshape(seen[k], (seen[k].numel,)).to(tl.float32))
    if SUMMARY:
        p_to = state_pointers(p_summary + i_back * N * channels, o_state, o_owned, N, True)
        tl.store(p_to, flow, mask=m_states)
        store_of_channels(p_step + i_back * channels, steps, o_owned, m_owned, NL, True)
    else:
        # A = -exp(A_log), so the gradient of A_log is A times that of A.
        p_dA = p_partial + of_states(o_state) * channels + of_channels(o_owned)
        tl.store(p_dA, dA * (rate * LN_2), mask=m_states)
        tl.store(p_partial + N * channels + o_owned, tl.sum(dskip, axis=2), mask=m_owned)


def bidirectional_backward(
    dout: Tensor, xz: Tensor, parameters: list[Tensor], scale: float, borders, projected, taps, sums
) -> tuple[Tensor, Tensor]:
    """Gradient of ``xz`` (B, L, 2E), and those of all parameters, flat and in float32."""
    if projected.numel() == 0:
        arguments = (xz, parameters, scale, True, xz.dtype, "triton")
        _, borders, projected, taps, sums = bidirectional_selective_scan_op(*arguments)
    launch = Launch(xz, parameters)
    batch, channels, directions = launch.batch, launch.channels, launch.directions
    dxz = launch.empty(batch, launch.length, 2 * channels, dtype=xz.dtype)
    grid, n_tiles, segments, constants = launch.plan(
        _OWN_CHANNELS, _STATE_LANES, _MAX_REGISTERS, _ENOUGH_PROGRAMS, directions
    )
    grid = (grid[0], segments, batch * directions)
    summary, steps = launch.summaries(segments)
    block, tile = constants["CR"] * constants["CL"], constants["T"]
    inputs, slope, w = scan_inputs(launch, block, adjacent_channels(dout), scale, projected, taps, sums, dxz)
    enter = launch.empty(grid[0] * grid[1] * grid[2], tile // 4 - 1, block, max(2, launch.state))
    gradients = torch.empty_like(inputs)
    dweights = launch.empty(grid[0], directions, batch, launch.padded, 2 * launch.state, dtype=inputs.dtype)
    partial = launch.empty(batch * segments, directions, launch.state + 1, channels)
    members = [p[5:] for p in launch.parameters]
    tensors = (inputs, w, projected, borders, summary, steps, enter, gradients, dweights, partial)
    arguments = (*tensors, *members[0], *members[-1], channels, launch.tiles, n_tiles, segments)
    constants |= dict(
        K=directions,
        SEGMENTED=segments > 1,
        RANK=launch.row - 2 * launch.state,
        PRECISION=launch.precision,
    )
    if segments > 1:
        bidirectional_selective_scan_bwd_kernel_scan[grid](*arguments, SUMMARY=True, **constants)
        carry(launch, summary, steps)
    bidirectional_selective_scan_bwd_kernel_scan[grid](*arguments, SUMMARY=False, **constants)
    dprojected = sum_blocks(launch, dweights, gradients)
    return dxz, finish(
        launch, partial, *project_backward(launch, dprojected, projected, inputs, slope, gradients, dxz, taps)
    )
