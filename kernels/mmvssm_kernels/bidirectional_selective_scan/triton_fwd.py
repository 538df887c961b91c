"""Vim's inner block, Triton forward pass: the scans of both directions, their sum and the gate.

A program owns a block of channels of one sequence and walks its tokens, first of the backward direction, whose result
takes the place of its inputs, then of the forward direction, adding and gating. Sequences with few
channels are cut into segments: a first launch leaves each segment's state from zero and its sum of step sizes, a second
one makes of them the states that enter the segments, and the third walks.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_carry import carry
from .triton_launch import RUN_TIME_SIZES, Launch
from .triton_project import project
from .triton_tile import (
    in_lanes,
    load_of_channels,
    of_channels,
    of_lanes,
    of_states,
    scan_segment,
    silu,
    state_axes,
    state_pointers,
    state_rates,
    store_of_channels,
)

# Registers of a thread, programs that run side by side on a large GPU with them, channels of a lane,
# and lanes that share a channel's states.
_MAX_REGISTERS = 168
_ENOUGH_PROGRAMS = 12 * 132
_OWN_CHANNELS = 2
_STATE_LANES = 2


@triton.jit
def _load_weights(p_group, o_weight, S: tl.constexpr, SUMMARY: tl.constexpr):
    """B and C (NR, NG, NL) of a token; for summaries, which need no C, B twice."""
    B = tl.load(p_group + o_weight)
    return B, (B if SUMMARY else tl.load(p_group + 4 * S + o_weight))


@triton.jit
def _token(state, rate, skip, dt, u, B, C, N: tl.constexpr, SUMMARY: tl.constexpr):
    """State behind one token, and its result (CR, CL), or its step size (CR, NL, CL) for summaries."""
    dt = dt.to(tl.float32)
    u = u.to(tl.float32)
    state = tl.exp2(of_lanes(dt) * rate) * state + of_lanes(dt * u) * of_states(B)
    if SUMMARY:
        return state, dt
    else:
        # Every lane of a channel adds its share of what goes past the state.
        return state, tl.sum(in_lanes(state * of_states(C), N) + skip * u, axis=1)


@triton.jit
def _load_token(state, rate, skip, dt, u, p_group, o_weight, N: tl.constexpr, S: tl.constexpr, SUMMARY: tl.constexpr):
    """The same with B and C from memory."""
    B, C = _load_weights(p_group, o_weight, S, SUMMARY)
    return _token(state, rate, skip, dt, u, B, C, N, SUMMARY)


@triton.jit
def _rows_of_tokens(y0, y1, y2, y3):
    """Tile (4, C) of the results of four tokens (CR, CL)."""
    y = tl.join(tl.join(y0, y2), tl.join(y1, y3))  # the last axis is the lowest bit of the token
    return tl.reshape(tl.permute(y, (2, 3, 1, 0)), (4, y0.shape[0] * y0.shape[1]))


@triton.jit
def _walk(
    p_u,
    p_dt,
    p_z,
    p_weights,
    p_A_log,
    p_skip,
    p_border,
    p_summary,
    p_step,
    p_other,
    p_y,
    p_out,
    scale,
    i_segment,
    length,
    channels: tl.constexpr,
    n_all,
    n_tiles,
    n_segments,
    stride_z_token,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr,
    SEGMENTED: tl.constexpr,
    KEEP: tl.constexpr,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    T: tl.constexpr,
    NR: tl.constexpr,
    NG: tl.constexpr,
    CR: tl.constexpr,
    NL: tl.constexpr,
    CL: tl.constexpr,
):
    """One direction of one segment; pointers are at the batch element (and direction).

    Without ``GATE`` results take the place of u. Four tokens are walked at a time; groups of padding are left out.
    """
    BLOCK_C: tl.constexpr = CR * CL
    S: tl.constexpr = NR * NG * NL
    o_state, o_local = state_axes(NR, NG, CR, NL, CL)
    o_owned = tl.program_id(0) * BLOCK_C + o_local
    m_owned = (o_owned < channels) | (channels % BLOCK_C == 0)
    m_states = of_channels(m_owned) & of_states((o_state < N) | (NR * NG * NL == N))
    rate = state_rates(p_A_log, o_state, o_owned, m_states, N)
    skip = load_of_channels(p_skip, o_owned, m_owned, NL).to(tl.float32) / NL
    i_first, n_own, i_scan = scan_segment(i_segment, n_segments, n_tiles, n_all, REVERSE)
    state = tl.zeros(rate.shape, tl.float32)
    if SEGMENTED and not SUMMARY:
        # What the segment before this one hands on.
        p_enter = state_pointers(p_summary + (i_scan - 1) * N * channels, o_state, o_owned, N)
        state = tl.load(p_enter, mask=m_states & (i_scan > 0), other=0.0)
    steps = tl.zeros((CR, NL, CL), tl.float32)
    STEP: tl.constexpr = -channels if REVERSE else channels
    # Groups of four tokens; those of the padding come first in the backward direction, and last in the other.
    if REVERSE:
        i_group = tl.where(i_first == 0, (n_all * T - length) // 4, 0)
        n_groups = n_own * (T // 4)
    else:
        i_group = 0
        n_groups = tl.minimum(n_own * (T // 4), (length - i_first * T + 3) // 4)
    i_scan_token = i_first * T + i_group * 4
    o_token = n_all * T - 1 - i_scan_token if REVERSE else i_scan_token
    p_t = p_dt + o_token * channels
    p_v = p_u + o_token * channels
    # Of four tokens, NR states each of the first, second, ... are neighbours.
    o_part = tl.arange(0, NG)[:, None] * NL + tl.arange(0, NL)[None, :]
    o_weight = o_part[None, :, :] * (4 * NR) + tl.arange(0, NR)[:, None, None]
    p_B = p_weights + i_scan_token * (2 * S)
    B, C = _load_weights(p_B, o_weight, S, SUMMARY)
    dt0 = load_of_channels(p_t, o_owned, m_owned, NL)
    u0 = load_of_channels(p_v, o_owned, m_owned, NL)
    dt1 = load_of_channels(p_t + STEP, o_owned, m_owned, NL)
    u1 = load_of_channels(p_v + STEP, o_owned, m_owned, NL)
    dt2 = load_of_channels(p_t + 2 * STEP, o_owned, m_owned, NL)
    u2 = load_of_channels(p_v + 2 * STEP, o_owned, m_owned, NL)
    dt3 = load_of_channels(p_t + 3 * STEP, o_owned, m_owned, NL)
    u3 = load_of_channels(p_v + 3 * STEP, o_owned, m_owned, NL)
    for i in range(i_group, n_groups):
        if KEEP and not SUMMARY:
            i_tile = i_first + i // (T // 4)
            if (i % (T // 4) == 0) & (i_tile > 0):
                p_kept = state_pointers(p_border + (i_tile.to(tl.int64) - 1) * N * channels, o_state, o_owned, N)
                tl.store(p_kept, state, mask=m_states)
        # Step sizes and inputs of the next four tokens are loaded while these are walked.
        ahead = tl.where(i + 1 < n_groups, 4, 0) * STEP
        p_t += ahead
        p_v += ahead
        next_dt0 = load_of_channels(p_t, o_owned, m_owned, NL)
        next_u0 = load_of_channels(p_v, o_owned, m_owned, NL)
        next_dt1 = load_of_channels(p_t + STEP, o_owned, m_owned, NL)
        next_u1 = load_of_channels(p_v + STEP, o_owned, m_owned, NL)
        next_dt2 = load_of_channels(p_t + 2 * STEP, o_owned, m_owned, NL)
        next_u2 = load_of_channels(p_v + 2 * STEP, o_owned, m_owned, NL)
        next_dt3 = load_of_channels(p_t + 3 * STEP, o_owned, m_owned, NL)
        next_u3 = load_of_channels(p_v + 3 * STEP, o_owned, m_owned, NL)
        p_next = p_B + tl.where(i + 1 < n_groups, 8 * S, 0)
        next_B, next_C = _load_weights(p_next, o_weight, S, SUMMARY)
        if GATE and not SUMMARY:
            o_row = (i_first * T + i * 4) + tl.arange(0, 4)
            o_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
            m_padded = ((o_channel < channels) | (channels % BLOCK_C == 0))[None, :]
            o_dense = o_row[:, None] * channels + o_channel[None, :]
            m_tile = (o_row < length)[:, None] & m_padded
            z = tl.load(p_z + o_row[:, None] * stride_z_token + o_channel[None, :], mask=m_tile, other=0.0)
            if ADD:
                other = tl.load(p_other + o_dense, mask=m_padded, other=0.0)
        tl.debug_barrier()  # otherwise the compiler moves the loads above to where their results are used
        state, y0 = _token(state, rate, skip, dt0, u0, B, C, N, SUMMARY)
        state, y1 = _load_token(state, rate, skip, dt1, u1, p_B + NR, o_weight, N, S, SUMMARY)
        state, y2 = _load_token(state, rate, skip, dt2, u2, p_B + 2 * NR, o_weight, N, S, SUMMARY)
        state, y3 = _load_token(state, rate, skip, dt3, u3, p_B + 3 * NR, o_weight, N, S, SUMMARY)
        if SUMMARY:
            steps += (y0 + y1) + (y2 + y3)
        elif GATE:
            y = _rows_of_tokens(y0, y1, y2, y3)
            if ADD:
                y += other.to(tl.float32)
            if KEEP:
                tl.store(p_y + o_dense, y.to(p_y.dtype.element_ty), mask=m_padded)
            y *= scale * silu(z.to(tl.float32))
            tl.store(p_out + o_dense, y.to(p_out.dtype.element_ty), mask=m_tile)
        else:
            p_to = p_u + (n_all * T - 1 - i_first * T - i * 4) * channels
            store_of_channels(p_to, y0[:, None, :], o_owned, m_owned, NL)
            store_of_channels(p_to + STEP, y1[:, None, :], o_owned, m_owned, NL)
            store_of_channels(p_to + 2 * STEP, y2[:, None, :], o_owned, m_owned, NL)
            store_of_channels(p_to + 3 * STEP, y3[:, None, :], o_owned, m_owned, NL)
        p_B = p_next
        B, C = next_B, next_C
        dt0, u0, dt1, u1 = next_dt0, next_u0, next_dt1, next_u1
        dt2, u2, dt3, u3 = next_dt2, next_u2, next_dt3, next_u3
    if SUMMARY:
        tl.store(state_pointers(p_summary + i_scan * N * channels, o_state, o_owned, N), state, mask=m_states)
        store_of_channels(p_step + i_scan * channels, steps, o_owned, m_owned, NL)


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def bidirectional_selective_scan_fwd_kernel_scan(
    p_xz,
    p_u,
    p_u_b,
    p_dt,
    p_weights,
    p_border,
    p_summary,
    p_step,
    p_y,
    p_out,
    p_A_log,
    p_skip,
    p_A_log_b,
    p_skip_b,
    scale,
    length,
    channels: tl.constexpr,
    n_all,
    n_tiles,
    n_segments,
    stride_x_batch,
    stride_x_token,
    N: tl.constexpr,
    TWO: tl.constexpr,
    SUMMARY: tl.constexpr,
    SEGMENTED: tl.constexpr,
    KEEP: tl.constexpr,
    T: tl.constexpr,
    NR: tl.constexpr,
    NG: tl.constexpr,
    CR: tl.constexpr,
    NL: tl.constexpr,
    CL: tl.constexpr,
):
    """Result (B, L, E) and entering states of all tiles (K, B, tiles - 1, E, N); or only the segments' summaries.

    For summaries either direction has programs of its own.
    """
    BOTH: tl.constexpr = TWO and not SUMMARY
    i_segment = tl.program_id(1) % n_segments
    i_batch = tl.program_id(2).to(tl.int64)
    n_batch = tl.num_programs(2)
    p_z = p_xz + i_batch * stride_x_batch + channels
    p_u += i_batch * n_all * T * channels
    p_u_b += i_batch * n_all * T * channels
    p_y += i_batch * n_all * T * channels
    p_out += i_batch * length * channels
    i_other = n_batch + i_batch
    if BOTH or (TWO and tl.program_id(1) >= n_segments):
        _walk(
            p_u_b,
            p_dt + i_other * n_all * T * channels,
            p_z,
            p_weights + i_other * n_all * T * (2 * NR * NG * NL),
            p_A_log_b,
            p_skip_b,
            p_border + i_other * (n_all - 1) * N * channels,
            p_summary + i_other * n_segments * N * channels,
            p_step + i_other * n_segments * channels,
            p_u_b,
            p_y,
            p_out,
            scale,
            i_segment,
            length,
            channels,
            n_all,
            n_tiles,
            n_segments,
            stride_x_token,
            N,
            True,
            SUMMARY,
            SEGMENTED,
            KEEP,
            False,
            False,
            T,
            NR,
            NG,
            CR,
            NL,
            CL,
        )
        tl.debug_barrier()  # results stored above are read below by other lanes
    if BOTH or tl.program_id(1) < n_segments:
        _walk(
            p_u,
            p_dt + i_batch * n_all * T * channels,
            p_z,
            p_weights + i_batch * n_all * T * (2 * NR * NG * NL),
            p_A_log,
            p_skip,
            p_border + i_batch * (n_all - 1) * N * channels,
            p_summary + i_batch * n_segments * N * channels,
            p_step + i_batch * n_segments * channels,
            p_u_b,
            p_y,
            p_out,
            scale,
            i_segment,
            length,
            channels,
            n_all,
            n_tiles,
            n_segments,
            stride_x_token,
            N,
            False,
            SUMMARY,
            SEGMENTED,
            KEEP,
            TWO,
            True,
            T,
            NR,
            NG,
            CR,
            NL,
            CL,
        )


def bidirectional_forward(
    xz: Tensor, parameters: list[Tensor], scale: float, out_dtype: torch.dtype, borders, projected, taps, y
) -> Tensor:
    """Result (B, L, E); fills the others, what the backward pass needs, unless they are empty."""
    launch = Launch(xz, parameters)
    keep = projected.numel() > 0
    if not keep:
        projected, taps = None, launch.empty(launch.directions, launch.width + 1, launch.channels)
    grid, n_tiles, segments, constants = launch.plan(_OWN_CHANNELS, _STATE_LANES, _MAX_REGISTERS, _ENOUGH_PROGRAMS)
    u, dt, weights = project(launch, projected, taps, constants["NR"])
    shape = (launch.batch, launch.length, launch.channels)
    if out_dtype == xz.dtype and (launch.batch == 1 or launch.length == launch.padded):
        out = u[0].view(-1)[: math.prod(shape)].view(shape)  # every token is read before its result is stored
    else:
        out = launch.empty(*shape, dtype=out_dtype)
    summary, steps = launch.summaries(segments)
    members = [[p[i] for i in (5, 6)] for p in launch.parameters]
    tensors = (launch.xz, u[0], u[-1], dt, weights, borders, summary, steps, y, out, *members[0], *members[-1])
    sizes = (launch.length, launch.channels, launch.tiles, n_tiles, segments)
    arguments = (*tensors, scale, *sizes, *launch.xz.stride()[:2])
    constants |= dict(TWO=launch.directions == 2, SEGMENTED=segments > 1)
    if segments > 1:
        summary_grid = (grid[0], grid[1] * launch.directions, grid[2])
        bidirectional_selective_scan_fwd_kernel_scan[summary_grid](*arguments, SUMMARY=True, KEEP=False, **constants)
        carry(launch, summary, steps)
    bidirectional_selective_scan_fwd_kernel_scan[grid](*arguments, SUMMARY=False, KEEP=keep, **constants)
    return out
