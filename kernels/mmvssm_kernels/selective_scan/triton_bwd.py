"""One-direction selective scan, Triton backward pass.

A program owns a block of channels of one group and a segment of tokens, which it walks from the last tile to the first:
adjoint scan, states computed again from those that the forward pass kept, gradients. Sequences that are cut into
segments take two launches more, as in the forward pass: what flows out of each segment's adjoint scan when nothing
flows in, and what therefore flows into each. What has to be added across programs is left as partial sums, which the
last launch adds in a fixed order: two runs agree bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv
from ..triton_scan import LN_2, sigmoid, softplus_slope
from . import op, triton_launch
from .triton_fwd import scan_segments
from .triton_launch import RUN_TIME_SIZES, Launch
from .triton_tile import (
    channels_of,
    last_row,
    load_rate,
    load_tile,
    load_vector,
    load_weights,
    previous_rows,
    reverse_rows,
    scan_rows,
    step_sizes,
    sum_over_channels,
    sums_over_states,
    tile_tokens,
)


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def selective_scan_bwd_kernel(
    p_u,
    p_delta,
    p_z,
    p_A,
    p_B,
    p_C,
    p_skip,
    p_bias,
    p_flow,
    p_step,
    p_dout,
    p_dlast,
    p_border,
    p_du,
    p_ddelta,
    p_dz,
    p_dweights,
    p_dvectors,
    length,
    channels,
    n_groups,
    n_tiles,
    n_segments,
    zero,
    stride_u_batch,
    stride_u_channel,
    stride_u_token,
    stride_delta_batch,
    stride_delta_channel,
    stride_delta_token,
    stride_z_batch,
    stride_z_channel,
    stride_z_token,
    stride_B_batch,
    stride_B_group,
    stride_B_state,
    stride_B_token,
    stride_C_batch,
    stride_C_group,
    stride_C_state,
    stride_C_token,
    stride_dout_batch,
    stride_dout_channel,
    stride_dout_token,
    n_blocks,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr,
    SEGMENTED: tl.constexpr,
    KEEP: tl.constexpr,
    T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MATRIX_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients, or only the flow (B, S, N, D) out of each segment and its sum of step sizes (B, S, D).

    Partial sums of dB and dC are (2, blocks, B, L, G, N), those of dA, dD and the bias (B, S, N + 2, D).
    """
    i_segment = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    i_group, i_block, o_channel, m_channel = channels_of(tl.program_id(0), channels, n_groups, zero, BLOCK_C)
    i_state = tl.arange(0, BLOCK_N)
    m_state = i_state < N
    m_state_channel = m_state[:, None] & m_channel[None, :]
    o_state = i_state[:, None] * channels + o_channel[None, :]
    stride_state = N * channels
    p_u += i_batch * stride_u_batch
    p_delta += i_batch * stride_delta_batch
    p_dout += i_batch * stride_dout_batch
    p_B += i_batch * stride_B_batch + i_group * stride_B_group
    p_C += i_batch * stride_C_batch + i_group * stride_C_group
    p_flow += (i_batch * n_segments + i_segment) * stride_state
    p_border += i_batch * ((length - 1) // KEEP) * stride_state + o_state
    rate = load_rate(p_A, o_channel, m_state_channel, N, BLOCK_N)
    bias = load_vector(p_bias, o_channel, m_channel)
    skip = load_vector(p_skip, o_channel, m_channel)
    is_last = i_segment == n_segments - 1
    flow = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if SEGMENTED and not SUMMARY:
        # What the segment behind this one handed on.
        flow = tl.load(p_flow + stride_state + o_state, mask=m_state_channel & (not is_last), other=0.0)
    if p_dlast is not None:
        p_dlast += i_batch * channels * N + o_channel[None, :] * N + i_state[:, None]
        flow += tl.load(p_dlast, mask=m_state_channel & is_last, other=0.0)
    steps = tl.zeros((T, BLOCK_C), tl.float32)
    dbias = tl.zeros((T, BLOCK_C), tl.float32)
    dskip = tl.zeros((T, BLOCK_C), tl.float32)
    dA = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    n_all = tl.cdiv(length, T)
    i_first = i_segment * n_tiles
    i_end = tl.minimum(i_first + n_tiles, n_all)
    stride_weight = n_groups * N
    # Every block of channels has its own copy of the gradients of B and C.
    n_copy = tl.num_programs(2).to(tl.int64) * length * stride_weight
    o_weights = i_block * n_copy + i_batch * length * stride_weight + i_group * N
    for i in range(i_first, i_end):
        i_tile = i_first + i_end - 1 - i
        o_token, m_token = tile_tokens(i_tile, length, T, REVERSE)
        m_tile = m_token[:, None] & m_channel[None, :]
        delta = load_tile(p_delta, o_token, m_token, stride_delta_token, o_channel, m_channel, stride_delta_channel)
        dout = load_tile(p_dout, o_token, m_token, stride_dout_token, o_channel, m_channel, stride_dout_channel)
        C = load_weights(p_C, o_token, m_token, stride_C_token, i_state, m_state, stride_C_state)
        if p_z is not None:
            p_z_batch = p_z + i_batch * stride_z_batch
            z = load_tile(p_z_batch, o_token, m_token, stride_z_token, o_channel, m_channel, stride_z_channel)
        if not SUMMARY:
            u = load_tile(p_u, o_token, m_token, stride_u_token, o_channel, m_channel, stride_u_channel).to(tl.float32)
            B = load_weights(p_B, o_token, m_token, stride_B_token, i_state, m_state, stride_B_state)
            # The state that enters the tile: from the last one kept, over the tiles between.
            i_border = i_tile * T // KEEP
            p_state = p_border + (i_border - 1).to(tl.int64) * stride_state
            state = tl.load(p_state, mask=m_state_channel & (i_border > 0), other=0.0)
            for i_before in range(i_border * KEEP // T, i_tile):
                o_before, m_before = tile_tokens(i_before, length, T, REVERSE)
                delta_before = load_tile(
                    p_delta, o_before, m_before, stride_delta_token, o_channel, m_channel, stride_delta_channel
                )
                u_before = load_tile(p_u, o_before, m_before, stride_u_token, o_channel, m_channel, stride_u_channel)
                B_before = load_weights(p_B, o_before, m_before, stride_B_token, i_state, m_state, stride_B_state)
                dt_before = step_sizes(delta_before, bias, m_before, SOFTPLUS)
                value = (dt_before * u_before.to(tl.float32))[:, None, :] * B_before[:, :, None]
                decay = tl.exp2(dt_before[:, None, :] * rate)
                state = last_row(scan_rows(decay, value, state))
        dt = step_sizes(delta, bias, m_token, SOFTPLUS)
        dy = dout.to(tl.float32)
        if p_z is not None:
            z = z.to(tl.float32)
            gate = sigmoid(z)
            dy *= z * gate
        decay = tl.exp2(dt[:, None, :] * rate)
        # Gradients of the states, G[t] = C[t] dy[t] + decay[t + 1] G[t + 1], from the last row up; and what flows from
        # the first row to the tile before, decay * G.
        upwards = reverse_rows(decay)
        grad = scan_rows(previous_rows(upwards, 1.0), reverse_rows(dy[:, None, :] * C[:, :, None]), flow)
        flow = last_row(upwards) * last_row(grad)
        if SUMMARY:
            steps += dt
        else:
            grad = reverse_rows(grad)
            dt_u = dt * u
            states = scan_rows(decay, dt_u[:, None, :] * B[:, :, None], state)
            through = decay * grad * previous_rows(states, state[None, :, :])
            dinput, drate, y = sums_over_states(grad * B[:, :, None], through * rate, states * C[:, :, None])
            dA += tl.sum(through * dt[:, None, :], axis=0)
            ddt = u * dinput + LN_2 * drate
            if SOFTPLUS:
                ddt *= softplus_slope(dt)
            ddt = tl.where(m_tile, ddt, 0.0)
            dbias += ddt
            dskip += u * dy
            o_out = (i_batch * length + o_token[:, None]) * channels + o_channel[None, :]
            tl.store(p_du + o_out, (dt * dinput + skip[None, :] * dy).to(p_du.dtype.element_ty), mask=m_tile)
            tl.store(p_ddelta + o_out, ddt.to(p_ddelta.dtype.element_ty), mask=m_tile)
            if p_z is not None:
                dz = dout.to(tl.float32) * (y + skip[None, :] * u) * gate * (1.0 + z * (1.0 - gate))
                tl.store(p_dz + o_out, dz.to(p_dz.dtype.element_ty), mask=m_tile)
            p_tile = p_dweights + o_weights + o_token[:, None] * stride_weight + i_state[None, :]
            m_weight = m_token[:, None] & m_state[None, :]
            dB = sum_over_channels(grad * dt_u[:, None, :], MATRIX_UNIT, PRECISION)
            tl.store(p_tile, dB, mask=m_weight)
            dC = sum_over_channels(states * dy[:, None, :], MATRIX_UNIT, PRECISION)
            tl.store(p_tile + n_blocks * n_copy, dC, mask=m_weight)
    if SUMMARY:
        tl.store(p_flow + o_state, flow, mask=m_state_channel)
        p_step += (i_batch * n_segments + i_segment) * channels + o_channel
        tl.store(p_step, tl.sum(steps, axis=0), mask=m_channel)
    else:
        p_dvectors += (i_batch * n_segments + i_segment) * (N + 2) * channels
        tl.store(p_dvectors + o_state, dA, mask=m_state_channel)
        tl.store(p_dvectors + N * channels + o_channel, tl.sum(dskip, axis=0), mask=m_channel)
        tl.store(p_dvectors + (N + 1) * channels + o_channel, tl.sum(dbias, axis=0), mask=m_channel)


@triton.jit(do_not_specialize=["n_copy", "n_blocks", "n_rows", "channels"])
def selective_scan_sums_kernel(
    p_dweights,
    p_dvectors,
    p_dB,
    p_dC,
    p_dA,
    p_dskip,
    p_dbias,
    n_copy,
    n_blocks,
    n_rows,
    channels,
    N: tl.constexpr,
    BLOCK_WEIGHTS: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The partial sums of :func:`selective_scan_bwd_kernel`, added: each program a part of dB, dC or the others."""
    n_weight_programs = tl.cdiv(n_copy, BLOCK_WEIGHTS)
    i_program = tl.program_id(0)
    if i_program < 2 * n_weight_programs:
        is_C = i_program >= n_weight_programs
        i_copy = (i_program - tl.where(is_C, n_weight_programs, 0)).to(tl.int64)
        o_weight = i_copy * BLOCK_WEIGHTS + tl.arange(0, BLOCK_WEIGHTS)
        m_weight = o_weight < n_copy
        p_copy = p_dweights + tl.where(is_C, n_blocks, 0).to(tl.int64) * n_copy + o_weight
        total = tl.zeros((BLOCK_WEIGHTS,), tl.float32)
        for _ in range(n_blocks):
            total += tl.load(p_copy, mask=m_weight, other=0.0)
            p_copy += n_copy
        if is_C:
            tl.store(p_dC + o_weight, total.to(p_dC.dtype.element_ty), mask=m_weight)
        else:
            tl.store(p_dB + o_weight, total.to(p_dB.dtype.element_ty), mask=m_weight)
    else:
        o_value = (i_program - 2 * n_weight_programs) * BLOCK_VECTORS + tl.arange(0, BLOCK_VECTORS)
        n_values = (N + 2) * channels
        i_row = tl.arange(0, ROWS)
        values = tl.zeros((BLOCK_VECTORS,), tl.float32)
        for i in range(0, n_rows, ROWS):
            m_tile = (i + i_row < n_rows)[:, None] & (o_value < n_values)[None, :]
            p_tile = p_dvectors + (i + i_row).to(tl.int64)[:, None] * n_values + o_value[None, :]
            values += tl.sum(tl.load(p_tile, mask=m_tile, other=0.0), axis=0)
        i_kind = o_value // channels
        i_channel = o_value % channels
        tl.store(p_dA + i_channel * N + i_kind, values.to(p_dA.dtype.element_ty), mask=i_kind < N)
        if p_dskip is not None:
            tl.store(p_dskip + i_channel, values.to(p_dskip.dtype.element_ty), mask=i_kind == N)
        if p_dbias is not None:
            tl.store(p_dbias + i_channel, values.to(p_dbias.dtype.element_ty), mask=i_kind == N + 1)


def selective_scan_backward(
    dout, dlast, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, borders
) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias; empty for what is None. Those of B and C are token-major."""
    launch = Launch(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, triton_launch.backward_form)
    batch, channels, length = u.shape
    du, ddelta, dz = (None if t is None else t.new_empty(batch, length, channels) for t in (u, delta, z))
    dB, dC = (t.new_empty(batch, length, launch.groups, launch.state) for t in (B, C))
    dA, dskip, dbias = (
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (A, D, delta_bias)
    )
    dweights = launch.empty(2, launch.blocks, *dB.shape)
    dvectors = launch.empty(batch * launch.segments, launch.state + 2, channels)
    flow, step = launch.summaries()
    dlast = None if dlast is None else dlast.contiguous()
    arguments = (*launch.tensors, flow, step, dout, dlast, borders, du, ddelta, dz, dweights, dvectors, *launch.sizes)
    arguments += (*dout.stride(), launch.blocks)
    constants = dict(KEEP=op.KEEP, **launch.constants, **launch.sum_constants())
    if launch.segments > 1:
        selective_scan_bwd_kernel[launch.grid](*arguments, SUMMARY=True, **constants)
        scan_segments(launch, flow, step, backwards=True)
    selective_scan_bwd_kernel[launch.grid](*arguments, SUMMARY=False, **constants)
    n_copy = dB.numel()
    programs = 2 * cdiv(n_copy, 1024) + cdiv((launch.state + 2) * channels, 64)
    selective_scan_sums_kernel[(programs,)](
        dweights,
        dvectors,
        dB,
        dC,
        dA,
        dskip,
        dbias,
        n_copy,
        launch.blocks,
        batch * launch.segments,
        channels,
        launch.state,
        1024,
        64,
        32,
        num_warps=4,
    )
    return (
        du.transpose(1, 2),
        ddelta.transpose(1, 2),
        dA,
        dB.permute(0, 2, 3, 1),
        dC.permute(0, 2, 3, 1),
        u.new_empty(0) if D is None else dskip,
        u.new_empty(0) if z is None else dz.transpose(1, 2),
        u.new_empty(0) if delta_bias is None else dbias,
    )
