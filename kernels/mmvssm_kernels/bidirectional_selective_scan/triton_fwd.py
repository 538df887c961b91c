"""Vim's inner block, Triton forward pass: the scans of both directions, their sum and the gate.

A program owns a block of channels of one sequence and walks its tokens, first of the backward direction, whose result
it leaves in a float32 scratch, then of the forward direction, adding, gating and rounding once. Sequences with few
channels are cut into segments: a first launch leaves each segment's state from zero and its sum of step sizes, from
which every program of the second launch computes the state that enters its segment.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_scan import softplus
from .triton_launch import RUN_TIME_SIZES, Launch
from .triton_project import project
from .triton_tile import (
    block_channels,
    carry_in,
    convolve,
    load_rows,
    load_step_weight,
    load_vector,
    load_weights,
    of_channels,
    of_states,
    over_states,
    raw_step_sizes,
    silu,
    state_axes,
    state_pointers,
    state_rates,
    store_of_channels,
    tile_tokens,
)

# Registers of a thread that let 25 programs run on a multiprocessor, and programs that keep a large GPU busy.
_MAX_REGISTERS = 80
_ENOUGH_PROGRAMS = 2640


@triton.jit
def _token(
    state, rate, skip, p_dt, p_u, p_row, o_local, o_state, RANK: tl.constexpr, N: tl.constexpr, SUMMARY: tl.constexpr
):
    """State behind one token, and its result (CR, CL)."""
    dt = tl.load(p_dt + o_local)
    u = tl.load(p_u + o_local)
    B = load_weights(p_row + RANK, o_state, N)
    state = tl.exp2(of_channels(dt) * rate) * state + of_channels(dt * u) * of_states(B)
    if SUMMARY:
        return state, u
    else:
        C = load_weights(p_row + RANK + N, o_state, N)
        return state, over_states(state * of_states(C)) + skip * u


@triton.jit
def _walk(
    p_x,
    p_z,
    p_projected,
    p_taps,
    p_dt_weight,
    p_dt_bias,
    p_A_log,
    p_skip,
    p_border,
    p_summary,
    p_step,
    p_scratch,
    p_sum,
    p_y,
    p_out,
    scale,
    i_segment,
    length,
    channels: tl.constexpr,
    rank,
    n_all,
    n_tiles,
    n_segments,
    stride_x_token,
    N: tl.constexpr,
    W: tl.constexpr,
    RANK: tl.constexpr,
    REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr,
    SEGMENTED: tl.constexpr,
    KEEP: tl.constexpr,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    T: tl.constexpr,
    NR: tl.constexpr,
    CR: tl.constexpr,
    NL: tl.constexpr,
    CL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One direction of one segment; pointers are at the batch element (and direction)."""
    C: tl.constexpr = CR * CL
    ROW: tl.constexpr = RANK + 2 * N
    o_row = tl.arange(0, T)
    o_channel, m_channel = block_channels(tl.program_id(0), channels, C)
    o_state, o_local = state_axes(NR, CR, NL, CL)
    o_owned = tl.program_id(0) * C + o_local
    m_owned = (o_owned < channels) | (channels % C == 0)
    m_states = of_channels(m_owned) & of_states((o_state < N) | (NR * NL == N))
    rate = state_rates(p_A_log, o_state, o_owned, m_states, N)
    skip = load_vector(p_skip, o_owned, m_owned)
    o_tile = o_row[:, None] * C + tl.max_contiguous(tl.arange(0, C), 4)[None, :]
    weight = load_step_weight(p_dt_weight, o_channel, m_channel, rank, BLOCK_R, p_x.dtype.element_ty)
    bias = load_vector(p_dt_bias, o_channel, m_channel)
    p_dt = p_scratch
    p_u = p_scratch + T * C
    n_own = tl.minimum(n_tiles, n_all - i_segment * n_tiles)
    i_first = n_all - i_segment * n_tiles - n_own if REVERSE else i_segment * n_tiles
    state = tl.zeros(rate.shape, tl.float32)
    if SEGMENTED and not SUMMARY:
        state = carry_in(
            p_summary, p_step, rate, i_segment, n_segments, o_state, o_owned, m_states, m_owned, channels, N, REVERSE
        )
    steps = tl.zeros((C,), tl.float32)
    for i in range(n_own):
        i_tile = i_first + i
        o_scan, o_token = tile_tokens(i_tile, n_all, T, REVERSE)
        m_token = o_token < length
        _, raw = raw_step_sizes(p_projected, weight, bias, o_scan, rank, ROW, BLOCK_R, PRECISION)
        dt = softplus(raw)
        conv = convolve(p_x, p_taps, o_token, length, o_channel, m_channel, channels, stride_x_token, REVERSE, W)
        u = silu(conv)
        tl.store(p_dt + o_tile, dt)
        tl.store(p_u + o_tile, u)
        tl.debug_barrier()  # other lanes read what is stored above, here and below
        if KEEP and not SUMMARY:
            p_enter = state_pointers(p_border + (i_tile.to(tl.int64) - 1) * N * channels, o_state, o_owned, N)
            tl.store(p_enter, state, mask=m_states & (i_tile > 0))
        for j in range(0, T, 4):
            p_t = p_dt + j * C
            p_v = p_u + j * C
            p_row = p_projected + (i_tile * T + j) * ROW
            state, y0 = _token(state, rate, skip, p_t, p_v, p_row, o_local, o_state, RANK, N, SUMMARY)
            state, y1 = _token(state, rate, skip, p_t + C, p_v + C, p_row + ROW, o_local, o_state, RANK, N, SUMMARY)
            state, y2 = _token(
                state, rate, skip, p_t + 2 * C, p_v + 2 * C, p_row + 2 * ROW, o_local, o_state, RANK, N, SUMMARY
            )
            state, y3 = _token(
                state, rate, skip, p_t + 3 * C, p_v + 3 * C, p_row + 3 * ROW, o_local, o_state, RANK, N, SUMMARY
            )
            if not SUMMARY:
                # Stores come last: loads do not move across them. The inputs are not needed any more.
                store_of_channels(p_v, y0, CR, CL)
                store_of_channels(p_v + C, y1, CR, CL)
                store_of_channels(p_v + 2 * C, y2, CR, CL)
                store_of_channels(p_v + 3 * C, y3, CR, CL)
        tl.debug_barrier()
        if SUMMARY:
            steps += tl.sum(dt, axis=0)
        else:
            y = tl.load(p_u + o_tile)
            o_dense = o_token[:, None] * channels + o_channel[None, :]
            m_padded = m_channel[None, :]
            m_tile = m_token[:, None] & m_channel[None, :]
            if ADD:
                y += tl.load(p_sum + o_dense, mask=m_padded, other=0.0)
            if GATE:
                if KEEP:
                    tl.store(p_y + o_dense, y.to(p_y.dtype.element_ty), mask=m_padded)
                y *= scale * silu(load_rows(p_z, o_token, m_token, o_channel, m_channel, stride_x_token))
                tl.store(p_out + o_dense, y.to(p_out.dtype.element_ty), mask=m_tile)
            else:
                tl.store(p_sum + o_dense, y, mask=m_padded)
    if SUMMARY:
        p_local = state_pointers(p_summary + i_segment * N * channels, o_state, o_owned, N)
        tl.store(p_local, state, mask=m_states)
        tl.store(p_step + i_segment * channels + o_channel, steps, mask=m_channel)


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def bidirectional_selective_scan_fwd_kernel_scan(
    p_xz,
    p_projected,
    p_taps,
    p_border,
    p_summary,
    p_step,
    p_scratch,
    p_sum,
    p_y,
    p_out,
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
    N: tl.constexpr,
    W: tl.constexpr,
    RANK: tl.constexpr,
    TWO: tl.constexpr,
    SUMMARY: tl.constexpr,
    SEGMENTED: tl.constexpr,
    KEEP: tl.constexpr,
    T: tl.constexpr,
    NR: tl.constexpr,
    CR: tl.constexpr,
    NL: tl.constexpr,
    CL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Result (B, L, E) and entering states of all tiles (K, B, tiles - 1, E, N); or only the segments' summaries."""
    i_segment = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    n_batch = tl.num_programs(2)
    i_program = (i_batch * n_segments + i_segment) * tl.num_programs(0) + tl.program_id(0)
    p_scratch += i_program * (2 * T * CR * CL)
    p_xz += i_batch * stride_x_batch
    p_z = p_xz + channels
    p_sum += i_batch * n_all * T * channels
    p_y += i_batch * n_all * T * channels
    p_out += i_batch * length * channels
    if TWO:
        i_other = n_batch + i_batch
        _walk(
            p_xz,
            p_z,
            p_projected + i_other * n_all * T * (RANK + 2 * N),
            p_taps + (W + 1) * channels,
            p_dt_weight_b,
            p_dt_bias_b,
            p_A_log_b,
            p_skip_b,
            p_border + i_other * (n_all - 1) * N * channels,
            p_summary + i_other * n_segments * N * channels,
            p_step + i_other * n_segments * channels,
            p_scratch,
            p_sum,
            p_y,
            p_out,
            scale,
            i_segment,
            length,
            channels,
            rank,
            n_all,
            n_tiles,
            n_segments,
            stride_x_token,
            N,
            W,
            RANK,
            True,
            SUMMARY,
            SEGMENTED,
            KEEP,
            False,
            False,
            T,
            NR,
            CR,
            NL,
            CL,
            BLOCK_R,
            PRECISION,
        )
        tl.debug_barrier()  # sums stored above are read below, perhaps by other lanes
    _walk(
        p_xz,
        p_z,
        p_projected + i_batch * n_all * T * (RANK + 2 * N),
        p_taps,
        p_dt_weight,
        p_dt_bias,
        p_A_log,
        p_skip,
        p_border + i_batch * (n_all - 1) * N * channels,
        p_summary + i_batch * n_segments * N * channels,
        p_step + i_batch * n_segments * channels,
        p_scratch,
        p_sum,
        p_y,
        p_out,
        scale,
        i_segment,
        length,
        channels,
        rank,
        n_all,
        n_tiles,
        n_segments,
        stride_x_token,
        N,
        W,
        RANK,
        False,
        SUMMARY,
        SEGMENTED,
        KEEP,
        TWO,
        True,
        T,
        NR,
        CR,
        NL,
        CL,
        BLOCK_R,
        PRECISION,
    )


def bidirectional_forward(
    xz: Tensor, parameters: list[Tensor], scale: float, out_dtype: torch.dtype, borders, projected, taps, y
) -> Tensor:
    """Result (B, L, E); fills the others, what the backward pass needs, unless they are empty."""
    launch = Launch(xz, parameters)
    keep = projected.numel() > 0
    if not keep:
        projected = launch.empty(launch.directions, launch.batch, launch.padded, launch.row)
        taps = launch.empty(launch.directions, launch.width + 1, launch.channels)
    project(launch, projected, taps)
    out = xz.new_empty(launch.batch, launch.length, launch.channels, dtype=out_dtype)
    sums = out if launch.directions == 1 else launch.empty(launch.batch, launch.padded, launch.channels)
    grid, n_tiles, segments, constants = launch.plan(_MAX_REGISTERS, _ENOUGH_PROGRAMS)
    summary, steps = launch.summaries(segments)
    scratch = launch.empty(grid[0] * grid[1] * grid[2], 2, constants["T"], constants["CR"] * constants["CL"])
    members = [[p[i] for i in (3, 4, 5, 6)] for p in launch.parameters]
    tensors = (launch.xz, projected, taps, borders, summary, steps, scratch, sums, y, out, *members[0], *members[-1])
    sizes = (launch.length, launch.channels, launch.rank, launch.tiles, n_tiles, segments)
    arguments = (*tensors, scale, *sizes, *launch.xz.stride()[:2])
    constants |= dict(TWO=launch.directions == 2, KEEP=keep, SEGMENTED=segments > 1)
    if segments > 1:
        bidirectional_selective_scan_fwd_kernel_scan[grid](*arguments, SUMMARY=True, **constants)
    bidirectional_selective_scan_fwd_kernel_scan[grid](*arguments, SUMMARY=False, **constants)
    return out
