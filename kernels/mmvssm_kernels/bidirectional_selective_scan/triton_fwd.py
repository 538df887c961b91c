"""Vim's inner block, Triton forward pass: the scans of both directions, their sum and the gate.

A program owns a block of channels of one sequence and walks its tokens, first of the backward direction, whose result
takes the place of its inputs, then of the forward direction, adding and gating. Sequences with few
channels are cut into segments: a first launch leaves each segment's state from zero and its sum of step sizes, a second
one makes of them the states that enter the segments, and the third walks.

Eight tokens are walked at a time. Their inputs come through shared memory, copied two steps ahead (``num_stages`` of
the loops): loads ahead into registers would share the few scoreboards of a warp with loads from the cache, and be
waited for with those.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..selective_scan.triton_tile import detach_layout
from .triton_carry import carry
from .triton_launch import RUN_TIME_SIZES, Launch, register_limit
from .triton_project import project
from .triton_tile import (
    load_of_channels,
    of_channels,
    of_states,
    products_in_lanes,
    scan_segment,
    silu,
    state_axes,
    state_pointers,
    state_rates,
    store_of_channels,
)

# Registers of a thread, and programs that run side by side on a large GPU with them. For summaries of at most 16 states
# in a lane fewer registers suffice, so that those of both directions run at once.
_MAX_REGISTERS = 168
_ENOUGH_PROGRAMS = 12 * 132
_SUMMARY_REGISTERS = 80
# Steps of eight tokens whose inputs are in shared memory or on their way, channels of a lane, and lanes that share a
# channel's states.
_STAGES: tl.constexpr = tl.constexpr(3)
_OWN_CHANNELS = 2
_STATE_LANES = 2


@triton.jit
def _load_values(p_rows, step, o_channel, m_channel, CR: tl.constexpr):
    """Per-channel values (CR, CL, 2, 2) of the first and of the last four tokens of a step; rows are ``step`` apart."""
    o_row = tl.arange(0, 8)[:, None] * step
    tile = tl.load(p_rows + o_row + o_channel[None, :], mask=m_channel[None, :], other=0.0)
    return tl.split(tl.permute(tl.reshape(tile, (2, 2, 2, o_channel.shape[0] // CR, CR)), (4, 3, 1, 2, 0)))


@triton.jit
def _load_weights(p_groups, S: tl.constexpr, NR: tl.constexpr, NG: tl.constexpr, NL: tl.constexpr, BOTH: tl.constexpr):
    """B and C (NR, NG, NL, 2, 2) of the first four tokens, then of the last; B in place of C unless ``BOTH``.

    In memory NR neighbouring states each of four tokens follow each other.
    """
    if BOTH:
        weights = tl.load(p_groups + tl.arange(0, 16 * S))
        weights = tl.permute(tl.reshape(weights, (2, 2, NG, NL, 2, 2, NR)), (6, 2, 3, 4, 5, 1, 0))
        first, last = tl.split(weights)
        B_first, C_first = tl.split(first)
        B_last, C_last = tl.split(last)
        return B_first, C_first, B_last, C_last
    else:
        o_weight = tl.arange(0, 8 * S)
        weights = tl.load(p_groups + o_weight // (4 * S) * (8 * S) + o_weight % (4 * S))
        first, last = tl.split(tl.permute(tl.reshape(weights, (2, NG, NL, 2, 2, NR)), (5, 1, 2, 3, 4, 0)))
        return first, first, last, last


@triton.jit
def _of_tokens(tile):
    """Of values (..., 2, 2) of four tokens, those of each."""
    even, odd = tl.split(tile)
    token0, token2 = tl.split(even)
    token1, token3 = tl.split(odd)
    return token0, token1, token2, token3


@triton.jit
def _token(state, rate, skip, dt, u, B, C, N: tl.constexpr, SUMMARY: tl.constexpr):
    """State behind one token, and its result (CR, CL), or its step size for summaries."""
    dt = dt.to(tl.float32)
    u = u.to(tl.float32)
    state = tl.exp2(of_channels(dt) * rate) * state + of_channels(dt * u) * of_states(B)
    if SUMMARY:
        return state, dt
    else:
        # With a lane's states on one axis their sum is one chain of multiply-adds. Every lane of a channel adds its
        # share of what goes past the state.
        OWN: tl.constexpr = state.shape[0] * state.shape[1]
        products = products_in_lanes(state * of_states(C), N)
        shares = tl.reshape(products, (OWN, skip.shape[0], skip.shape[1], skip.shape[2]))
        return state, tl.sum(tl.sum(shares, axis=0) + skip * u[:, None, :], axis=1)


@triton.jit
def _four_tokens(state, rate, skip, dt, u, B, C, N: tl.constexpr, SUMMARY: tl.constexpr):
    """The same for four tokens."""
    dt0, dt1, dt2, dt3 = _of_tokens(dt)
    u0, u1, u2, u3 = _of_tokens(u)
    B0, B1, B2, B3 = _of_tokens(B)
    C0, C1, C2, C3 = _of_tokens(C)
    state, y0 = _token(state, rate, skip, dt0, u0, B0, C0, N, SUMMARY)
    state, y1 = _token(state, rate, skip, dt1, u1, B1, C1, N, SUMMARY)
    state, y2 = _token(state, rate, skip, dt2, u2, B2, C2, N, SUMMARY)
    state, y3 = _token(state, rate, skip, dt3, u3, B3, C3, N, SUMMARY)
    return state, y0, y1, y2, y3


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

    Without ``GATE`` results take the place of u. Steps of padding are left out.
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
    steps = tl.zeros((CR, CL), tl.float32)
    STEP: tl.constexpr = -channels if REVERSE else channels
    # Steps of the padding come first in the backward direction, and last in the other.
    if REVERSE:
        i_start = tl.where(i_first == 0, (n_all * T - length) // 8, 0)
        n_steps = n_own * (T // 8)
    else:
        i_start = 0
        n_steps = tl.minimum(n_own * (T // 8), (length - i_first * T + 7) // 8)
    o_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_channel = (o_channel < channels) | (channels % BLOCK_C == 0)
    for i in tl.range(i_start, n_steps, num_stages=_STAGES):
        i_scan_token = i_first * T + i * 8
        o_token = n_all * T - 1 - i_scan_token if REVERSE else i_scan_token
        if KEEP and not SUMMARY:
            i_tile = i_first + i // (T // 8)
            if (i % (T // 8) == 0) & (i_tile > 0):
                p_kept = state_pointers(p_border + (i_tile.to(tl.int64) - 1) * N * channels, o_state, o_owned, N)
                tl.store(p_kept, state, mask=m_states)
        dt_first, dt_last = _load_values(p_dt + o_token * channels, STEP, o_channel, m_channel, CR)
        u_first, u_last = _load_values(p_u + o_token * channels, STEP, o_channel, m_channel, CR)
        p_groups = p_weights + i_scan_token * (2 * S)
        B_first, C_first, B_last, C_last = _load_weights(p_groups, S, NR, NG, NL, not SUMMARY)
        if GATE and not SUMMARY:
            o_row = i_scan_token + tl.arange(0, 8)
            o_dense = o_row[:, None] * channels + o_channel[None, :]
            m_tile = (o_row < length)[:, None] & m_channel[None, :]
            z = tl.load(p_z + o_row[:, None] * stride_z_token + o_channel[None, :], mask=m_tile, other=0.0)
            if ADD:
                other = tl.load(p_other + o_dense, mask=m_channel[None, :], other=0.0)
        state, y0, y1, y2, y3 = _four_tokens(state, rate, skip, dt_first, u_first, B_first, C_first, N, SUMMARY)
        state, y4, y5, y6, y7 = _four_tokens(state, rate, skip, dt_last, u_last, B_last, C_last, N, SUMMARY)
        if SUMMARY:
            steps += ((y0 + y1) + (y2 + y3)) + ((y4 + y5) + (y6 + y7))
        elif GATE:
            y = tl.join(_rows_of_tokens(y0, y1, y2, y3), _rows_of_tokens(y4, y5, y6, y7))
            y = tl.reshape(tl.permute(y, (2, 0, 1)), (8, BLOCK_C))
            # Detached, or every lane of a channel would compute the gate.
            y = tl.reshape(detach_layout(y[None]), (8, BLOCK_C))
            if ADD:
                y += other.to(tl.float32)
            if KEEP:
                tl.store(p_y + o_dense, y.to(p_y.dtype.element_ty), mask=m_channel[None, :])
            y *= scale * silu(z.to(tl.float32))
            tl.store(p_out + o_dense, y.to(p_out.dtype.element_ty), mask=m_tile)
        else:
            p_to = p_u + o_token * channels
            store_of_channels(p_to, y0[:, None, :], o_owned, m_owned, NL)
            store_of_channels(p_to + STEP, y1[:, None, :], o_owned, m_owned, NL)
            store_of_channels(p_to + 2 * STEP, y2[:, None, :], o_owned, m_owned, NL)
            store_of_channels(p_to + 3 * STEP, y3[:, None, :], o_owned, m_owned, NL)
            store_of_channels(p_to + 4 * STEP, y4[:, None, :], o_owned, m_owned, NL)
            store_of_channels(p_to + 5 * STEP, y5[:, None, :], o_owned, m_owned, NL)
            store_of_channels(p_to + 6 * STEP, y6[:, None, :], o_owned, m_owned, NL)
            store_of_channels(p_to + 7 * STEP, y7[:, None, :], o_owned, m_owned, NL)
    if SUMMARY:
        tl.store(state_pointers(p_summary + i_scan * N * channels, o_state, o_owned, N), state, mask=m_states)
        store_of_channels(p_step + i_scan * channels, steps[:, None, :], o_owned, m_owned, NL)


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
    kernel = bidirectional_selective_scan_fwd_kernel_scan
    if segments > 1:
        summary_grid = (grid[0], grid[1] * launch.directions, grid[2])
        few = constants["NR"] * constants["NG"] * constants["CR"] <= 16
        summary_constants = constants | (register_limit(_SUMMARY_REGISTERS) if few else {})
        kernel[summary_grid](*arguments, SUMMARY=True, KEEP=False, **summary_constants)
        carry(launch, summary, steps)
    kernel[grid](*arguments, SUMMARY=False, KEEP=keep, **constants)
    return out
