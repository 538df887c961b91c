"""Vim's inner block, Triton backward pass: the adjoint scans of both directions.

A program owns a block of channels and a segment of one sequence, as in the forward pass, and walks each direction's
tiles from the last to the first, starting each from the state that the forward pass kept. It recomputes the convolved
inputs, the states and the sum before the gate; sums over channels go through the matrix unit. What has to be added
across programs is left as partial sums, added in a fixed order: two runs agree bit for bit.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..triton_scan import LN_2, softplus_slope
from .op import bidirectional_selective_scan_op
from .triton_fwd import carry_in
from .triton_launch import RUN_TIME_SIZES, Launch, adjacent_channels, register_limit
from .triton_reduce import finish, project_backward
from .triton_tile import (
    convolve_tile,
    load_inputs,
    load_rows,
    load_step_sizes,
    load_vector,
    load_weight,
    load_weights,
    previous_rows,
    reverse_rows,
    scan_rows,
    sigmoid,
    silu,
    tile_tokens,
)


@triton.jit
def _walk(
    p_xz,
    p_dout,
    p_projected,
    p_rate,
    p_border,
    p_summary,
    p_step,
    p_flow,
    p_y,
    p_du,
    p_dxz,
    p_dprojected,
    p_partial,
    p_conv_weight,
    p_conv_bias,
    p_dt_weight,
    p_dt_bias,
    p_skip,
    scale,
    length,
    channels: tl.constexpr,
    rank,
    n_all,
    n_tiles,
    n_segments,
    n_slots,
    stride_row,
    stride_x_batch,
    stride_x_token,
    zero,
    stride_dout_batch,
    stride_dout_token,
    n_partial,
    N: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr,
    SEGMENTED: tl.constexpr,
    T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The programs of one direction."""
    o_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C) + zero
    m_channel = o_channel < channels
    i_segment = tl.program_id(1) // K
    i_direction = 1 if REVERSE else 0
    i_batch = tl.program_id(2).to(tl.int64)
    i_sequence = i_direction * tl.num_programs(2) + i_batch
    rows = rank + 2 * N
    stride_state = N * channels
    p_x = p_xz + i_batch * stride_x_batch
    p_z = p_x + channels
    p_dout += i_batch * stride_dout_batch
    p_y += i_batch * stride_row * channels
    p_dz = p_dxz + i_batch * length * 2 * channels + channels
    p_du += i_sequence * stride_row * channels
    p_projected += i_sequence * rows * stride_row
    p_dprojected += (tl.program_id(0).to(tl.int64) * K * tl.num_programs(2) + i_sequence) * stride_row * rows
    p_rate += i_direction * stride_state
    p_border += i_sequence * n_slots * stride_state
    p_summary += i_sequence * n_segments * stride_state
    p_step += i_sequence * n_segments * channels
    p_flow += i_sequence * n_segments * stride_state
    p_partial += ((i_batch * n_segments + i_segment) * K + i_direction) * n_partial * channels
    i_row = tl.arange(0, T)
    o_rank = tl.arange(0, BLOCK_R)
    m_rank = o_rank < rank
    o_state = tl.arange(0, BLOCK_N)
    m_state = o_state < N
    weight = load_weight(p_dt_weight, o_channel, m_channel, o_rank, m_rank, rank)
    bias = load_vector(p_dt_bias, o_channel, m_channel)
    skip = load_vector(p_skip, o_channel, m_channel)
    n_own = tl.minimum(n_tiles, n_all - i_segment * n_tiles)
    i_first = n_all - i_segment * n_tiles - n_own if REVERSE else i_segment * n_tiles
    p_slot = p_flow + i_segment * stride_state
    if SUMMARY:
        p_slot = p_summary + i_segment * stride_state
    elif SEGMENTED:
        carry_in(
            p_summary, p_step, p_rate, p_slot, i_segment, n_segments, o_channel, m_channel, channels, not REVERSE, N
        )
        tl.debug_barrier()
    steps = tl.zeros(bias.shape, tl.float32)
    dbias = tl.zeros(bias.shape, tl.float32)
    dskip = tl.zeros(bias.shape, tl.float32)
    dweight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    ones = tl.full((BLOCK_C, BLOCK_N), 1.0, tl.float32)
    for i in range(n_own):
        i_tile = i_first + n_own - 1 - i
        o_scan, o_token = tile_tokens(i_tile, n_all, REVERSE, T)
        m_token = o_token < length
        m_tile = m_token[:, None] & m_channel[None, :]
        o_row = tl.minimum(o_token, length - 1)
        low_rank, dt = load_step_sizes(p_projected, weight, bias, o_scan, o_rank, m_rank, stride_row, PRECISION)
        z = load_rows(p_z, o_row, o_channel, m_channel, stride_x_token)
        dout = scale * load_rows(p_dout, o_row, o_channel, m_channel, stride_dout_token)
        gate = sigmoid(z)
        dy = dout * z * gate
        # The flow that enters the last tile of a segment: from the segments behind it, or none.
        m_flow = m_channel & ((i > 0) | (SEGMENTED and not SUMMARY))
        m_first = (i_row[:, None] == 0) & m_channel[None, :]
        if not SUMMARY:
            if not REVERSE:
                y = load_rows(p_y, o_token, o_channel, m_channel, channels)
                dz = dout * y * gate * (1.0 + z * (1.0 - gate))
                p_tile = p_dz + o_token[:, None] * (2 * channels) + o_channel[None, :]
                tl.store(p_tile, dz.to(p_dz.dtype.element_ty), mask=m_tile)
            x = load_inputs(p_x, i_tile, n_all, length, o_channel, m_channel, stride_x_token, REVERSE, T)
            conv = convolve_tile(
                x,
                p_x,
                p_conv_weight,
                p_conv_bias,
                i_tile,
                n_all,
                length,
                o_channel,
                m_channel,
                stride_x_token,
                i_row,
                REVERSE,
                W,
                T,
            )
            # Rounded as in the forward pass. Left where du will go, so that it takes no registers in the loop below.
            o_tile = o_token[:, None] * channels + o_channel[None, :]
            u = silu(conv).to(p_du.dtype.element_ty)
            tl.store(p_du + o_tile, u, mask=m_channel[None, :])
            u = u.to(tl.float32)
            dskip += tl.sum(tl.where(m_token[:, None], u * dy, 0.0), axis=0)
            dt_u = dt * u
            dinput = tl.zeros(dt.shape, tl.float32)
            drate = tl.zeros(dt.shape, tl.float32)
            dB = tl.zeros((T, BLOCK_N), tl.float32)
            dC = tl.zeros((T, BLOCK_N), tl.float32)
            p_enter = p_border + (i_tile.to(tl.int64) - 1) * stride_state
            m_enter = m_channel & (i_tile > 0)
        for n in range(N):
            rate = tl.load(p_rate + n * channels + o_channel, mask=m_channel, other=0.0)
            flow_in = tl.load(p_slot + n * channels + o_channel, mask=m_flow, other=0.0)
            B, C = load_weights(p_projected, n, o_scan, rank, stride_row, N)
            decay = tl.exp2(dt * rate[None, :])
            # The gradient of a state and what flows from it to the state before, decay * grad, from the last row up.
            upwards = reverse_rows(dy * C[:, None])
            upwards = tl.where(i_row[:, None] == 0, upwards + flow_in[None, :], upwards)
            following = previous_rows(reverse_rows(decay), flow_in[None, :], i_row)
            grad = reverse_rows(scan_rows(following, upwards))
            flow = decay * grad
            tl.store(tl.broadcast_to((p_slot + n * channels + o_channel)[None, :], flow.shape), flow, mask=m_first)
            if not SUMMARY:
                enter = tl.load(p_enter + n * channels + o_channel, mask=m_enter, other=0.0)
                value = dt_u * B[:, None]
                value = tl.where(i_row[:, None] == 0, value + decay * enter[None, :], value)
                states = scan_rows(decay, value)
                dinput += grad * B[:, None]
                through = flow * previous_rows(states, enter[None, :], i_row)
                drate += through * rate[None, :]
                # A = -exp(A_log), so the gradient of A_log is A times that of A.
                p_dA = p_partial + n * channels + o_channel
                dA = tl.load(p_dA, mask=m_channel & (i > 0), other=0.0)
                dA += tl.sum(dt * through, axis=0) * (rate * LN_2)
                tl.store(p_dA, dA, mask=m_channel)
                # Every column of a product with ones is the sum over channels.
                is_n = (o_state == n)[None, :]
                dB = tl.where(is_n, tl.dot(grad * dt_u, ones, input_precision=PRECISION), dB)
                dC = tl.where(is_n, tl.dot(states * dy, ones, input_precision=PRECISION), dC)
        if SUMMARY:
            steps += tl.sum(dt, axis=0)
        else:
            tl.debug_barrier()  # u stored above is read here, perhaps by other threads
            u = load_rows(p_du, o_token, o_channel, m_channel, channels)
            draw = (u * dinput + LN_2 * drate) * softplus_slope(dt)
            dbias += tl.sum(draw, axis=0)
            tl.store(
                p_du + o_tile, (dt * dinput + skip[None, :] * dy).to(p_du.dtype.element_ty), mask=m_channel[None, :]
            )
            dlow_rank = tl.dot(draw, tl.trans(weight), input_precision=PRECISION)
            dweight += tl.dot(tl.trans(low_rank), draw, input_precision=PRECISION)
            p_row = p_dprojected + o_token[:, None] * (rank + 2 * N)
            tl.store(p_row + o_rank[None, :], dlow_rank, mask=m_rank[None, :])
            tl.store(p_row + rank + o_state[None, :], dB, mask=m_state[None, :])
            tl.store(p_row + rank + N + o_state[None, :], dC, mask=m_state[None, :])
        tl.debug_barrier()  # flows and gradients of A stored above are loaded for the next tile
    if SUMMARY:
        tl.store(p_step + i_segment * channels + o_channel, steps, mask=m_channel)
    else:
        p_partial += stride_state + o_channel
        tl.store(p_partial[None, :] + o_rank[:, None] * channels, dweight, mask=m_rank[:, None] & m_channel[None, :])
        tl.store(p_partial + rank * channels, dbias, mask=m_channel)
        tl.store(p_partial + (rank + 1) * channels, dskip, mask=m_channel)


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def bidirectional_selective_scan_bwd_kernel_scan(
    p_xz,
    p_dout,
    p_projected,
    p_rate,
    p_border,
    p_summary,
    p_step,
    p_flow,
    p_y,
    p_du,
    p_dxz,
    p_dprojected,
    p_partial,
    p_conv_weight,
    p_conv_bias,
    p_dt_weight,
    p_dt_bias,
    p_skip,
    p_conv_weight_b,
    p_conv_bias_b,
    p_dt_weight_b,
    p_dt_bias_b,
    p_skip_b,
    scale,
    length,
    channels: tl.constexpr,
    rank,
    n_all,
    n_tiles,
    n_segments,
    n_slots,
    stride_row,
    stride_x_batch,
    stride_x_token,
    zero,
    stride_dout_batch,
    stride_dout_token,
    n_partial,
    N: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    SUMMARY: tl.constexpr,
    SEGMENTED: tl.constexpr,
    T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients up to those of u; or only what each segment's adjoint scan hands on.

    Writes du (K, B, L, E), the gate's half of dxz (B, L, 2E), dprojected (channel blocks, K, B, L, R + 2N), and of
    every program's partial sums (B S, K, n_partial, E) the rows of A_log, dt_proj_weight, dt_proj_bias and D.
    """
    if tl.program_id(1) % K == 0:
        _walk(
            p_xz,
            p_dout,
            p_projected,
            p_rate,
            p_border,
            p_summary,
            p_step,
            p_flow,
            p_y,
            p_du,
            p_dxz,
            p_dprojected,
            p_partial,
            p_conv_weight,
            p_conv_bias,
            p_dt_weight,
            p_dt_bias,
            p_skip,
            scale,
            length,
            channels,
            rank,
            n_all,
            n_tiles,
            n_segments,
            n_slots,
            stride_row,
            stride_x_batch,
            stride_x_token,
            zero,
            stride_dout_batch,
            stride_dout_token,
            n_partial,
            N,
            W,
            K,
            False,
            SUMMARY,
            SEGMENTED,
            T,
            BLOCK_C,
            BLOCK_R,
            BLOCK_N,
            PRECISION,
        )
    else:
        _walk(
            p_xz,
            p_dout,
            p_projected,
            p_rate,
            p_border,
            p_summary,
            p_step,
            p_flow,
            p_y,
            p_du,
            p_dxz,
            p_dprojected,
            p_partial,
            p_conv_weight_b,
            p_conv_bias_b,
            p_dt_weight_b,
            p_dt_bias_b,
            p_skip_b,
            scale,
            length,
            channels,
            rank,
            n_all,
            n_tiles,
            n_segments,
            n_slots,
            stride_row,
            stride_x_batch,
            stride_x_token,
            zero,
            stride_dout_batch,
            stride_dout_token,
            n_partial,
            N,
            W,
            K,
            True,
            SUMMARY,
            SEGMENTED,
            T,
            BLOCK_C,
            BLOCK_R,
            BLOCK_N,
            PRECISION,
        )


def bidirectional_backward(
    dout: Tensor, xz: Tensor, parameters: list[Tensor], scale: float, borders, projected, rates, sums
) -> tuple[Tensor, Tensor]:
    """Gradient of ``xz`` (B, L, 2E), and those of all parameters, flat and in float32."""
    if projected.numel() == 0:
        arguments = (xz, parameters, scale, True, xz.dtype, "triton")
        _, borders, projected, rates, sums = bidirectional_selective_scan_op(*arguments)
    launch = Launch(xz, parameters)
    dout = adjacent_channels(dout)
    batch, length, channels, state = launch.batch, launch.length, launch.channels, launch.state
    sequences = (launch.directions, batch)
    summary, steps = launch.summaries()
    flows = launch.empty(*sequences, launch.segments, state, channels)
    du = launch.empty(*sequences, launch.padded, channels, dtype=xz.dtype)
    dxz = launch.empty(batch, length, 2 * channels, dtype=xz.dtype)
    dprojected = launch.empty(launch.grid[0], *sequences, launch.padded, launch.rows)
    partial = launch.empty(batch * launch.segments, launch.directions, launch.partial_rows, channels)
    members = [[p[i] for i in (0, 1, 3, 4, 6)] for p in launch.parameters]
    tensors = (launch.xz, dout, projected, rates, borders, summary, steps, flows, sums, du, dxz, dprojected, partial)
    arguments = (*tensors, *members[0], *members[-1], scale, *launch.sizes, launch.tiles - 1, *launch.strides)
    arguments += (*dout.stride()[:2], launch.partial_rows)
    block_state = max(16, triton.next_power_of_2(state))
    # Ten warps of this many registers fit on a multiprocessor; with fewer the loop over states would spill.
    constants = launch.constants | dict(
        **register_limit(200),
        K=launch.directions,
        W=launch.width,
        BLOCK_N=block_state,
        SEGMENTED=launch.segments > 1,
        num_stages=1,
    )
    grid = (launch.grid[0], launch.segments * launch.directions, batch)
    if launch.segments > 1:
        bidirectional_selective_scan_bwd_kernel_scan[grid](*arguments, SUMMARY=True, **constants)
    bidirectional_selective_scan_bwd_kernel_scan[grid](*arguments, SUMMARY=False, **constants)
    dprojected = dprojected.sum(0) if launch.grid[0] > 1 else dprojected[0]
    project_backward(launch, dprojected, du, dxz, partial)
    return dxz, finish(launch, partial)
