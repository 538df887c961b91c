"""Vim's inner block, Triton forward pass: the scans of both directions, their sum and the gate.

A program owns a block of channels of one sequence and walks its tiles, first of the backward direction, whose sum of
states it leaves in a float32 scratch, then of the forward direction, adding, gating and rounding once. Sequences with
few rows are cut into segments: a first launch leaves each segment's state from zero and its sum of step sizes, from
which every program of the second launch computes the state that enters its segment.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import RUN_TIME_SIZES, Launch
from .triton_project import project
from .triton_tile import (
    load_rows,
    load_step_sizes,
    load_vector,
    load_weight,
    load_weights,
    scan_rows,
    silu,
    tile_tokens,
)


@triton.jit
def carry_in(
    p_summary, p_step, p_rate, p_carry, i_segment, n_segments, o_channel, m_channel, channels, REVERSE, N: tl.constexpr
):
    """Leave at ``p_carry`` (N, E) the state that reaches a segment from those before it in scan order."""
    n_before = tl.where(REVERSE, n_segments - 1 - i_segment, i_segment)
    for n in range(N):
        rate = tl.load(p_rate + n * channels + o_channel, mask=m_channel, other=0.0)
        state = tl.zeros(rate.shape, tl.float32)
        for j in range(n_before):
            i_other = tl.where(REVERSE, n_segments - 1 - j, j)
            steps = tl.load(p_step + i_other * channels + o_channel, mask=m_channel, other=0.0)
            local = tl.load(p_summary + (i_other * N + n) * channels + o_channel, mask=m_channel, other=0.0)
            state = local + tl.exp2(steps * rate) * state
        tl.store(p_carry + n * channels + o_channel, state, mask=m_channel)


@triton.jit
def _walk(
    p_u,
    p_z,
    p_projected,
    p_rate,
    p_dt_weight,
    p_dt_bias,
    p_skip,
    p_border,
    p_summary,
    p_step,
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
    stride_row,
    stride_z_token,
    zero,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr,
    SEGMENTED: tl.constexpr,
    KEEP: tl.constexpr,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One direction of one segment; pointers are at the batch element (and direction)."""
    i_row = tl.arange(0, T)
    o_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C) + zero
    m_channel = o_channel < channels
    o_rank = tl.arange(0, BLOCK_R)
    m_rank = o_rank < rank
    weight = load_weight(p_dt_weight, o_channel, m_channel, o_rank, m_rank, rank)
    bias = load_vector(p_dt_bias, o_channel, m_channel)
    skip = load_vector(p_skip, o_channel, m_channel)
    n_own = tl.minimum(n_tiles, n_all - i_segment * n_tiles)
    i_first = n_all - i_segment * n_tiles - n_own if REVERSE else i_segment * n_tiles
    stride_state = N * channels
    if SUMMARY:
        p_slot = p_summary + i_segment * stride_state
    elif KEEP:
        p_slot = p_border + (i_first.to(tl.int64) - 1) * stride_state
    else:
        p_slot = p_border + i_segment * stride_state
    if SEGMENTED and not SUMMARY and i_first > 0:
        carry_in(p_summary, p_step, p_rate, p_slot, i_segment, n_segments, o_channel, m_channel, channels, REVERSE, N)
        tl.debug_barrier()
    steps = tl.zeros(bias.shape, tl.float32)
    for i in range(n_own):
        o_scan, o_token = tile_tokens(i_first + i, n_all, REVERSE, T)
        m_token = o_token < length
        o_row = tl.minimum(o_token, length - 1)
        _, dt = load_step_sizes(p_projected, weight, bias, o_scan, o_rank, m_rank, stride_row, PRECISION)
        u = load_rows(p_u, o_token, o_channel, m_channel, channels)
        dt_u = dt * u
        y = skip[None, :] * u
        m_enter = m_channel & ((i > 0) | (i_first > 0)) if not SUMMARY else m_channel & (i > 0)
        m_leave = m_channel & ((i + 1 < n_own) | SUMMARY)
        stride_slot = stride_state if KEEP and not SUMMARY else 0
        m_last = (i_row[:, None] == T - 1) & m_leave[None, :]
        for n in range(N):
            rate = tl.load(p_rate + n * channels + o_channel, mask=m_channel, other=0.0)
            enter = tl.load(p_slot + n * channels + o_channel, mask=m_enter, other=0.0)
            B, C = load_weights(p_projected, n, o_scan, rank, stride_row, N)
            decay = tl.exp2(dt * rate[None, :])
            value = dt_u * B[:, None]
            value = tl.where(i_row[:, None] == 0, value + decay * enter[None, :], value)
            states = scan_rows(decay, value)
            if not SUMMARY:
                y += states * C[:, None]
            p_leave = p_slot + stride_slot + n * channels + o_channel
            tl.store(tl.broadcast_to(p_leave[None, :], states.shape), states, mask=m_last)
        p_slot += stride_slot
        tl.debug_barrier()  # states stored above are loaded for the next tile, perhaps by other threads
        if SUMMARY:
            steps += tl.sum(dt, axis=0)
        else:
            m_tile = m_token[:, None] & m_channel[None, :]
            m_padded = m_channel[None, :]
            o_tile = o_token[:, None] * channels + o_channel[None, :]
            if ADD:
                y += load_rows(p_sum, o_token, o_channel, m_channel, channels)
            if GATE:
                if KEEP:
                    tl.store(p_y + o_tile, y.to(p_y.dtype.element_ty), mask=m_padded)
                z = load_rows(p_z, o_row, o_channel, m_channel, stride_z_token)
                y *= scale * silu(z)
                tl.store(p_out + o_tile, y.to(p_out.dtype.element_ty), mask=m_tile)
            else:
                tl.store(p_sum + o_tile, y, mask=m_padded)
    if SUMMARY:
        tl.store(p_step + i_segment * channels + o_channel, steps, mask=m_channel)


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def bidirectional_selective_scan_fwd_kernel_scan(
    p_u,
    p_z,
    p_projected,
    p_rate,
    p_border,
    p_summary,
    p_step,
    p_sum,
    p_y,
    p_out,
    p_dt_weight,
    p_dt_bias,
    p_skip,
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
    stride_z_batch,
    stride_z_token,
    zero,
    N: tl.constexpr,
    TWO: tl.constexpr,
    SUMMARY: tl.constexpr,
    SEGMENTED: tl.constexpr,
    KEEP: tl.constexpr,
    T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Result (B, L, E) and entering states of all tiles (K, B, slots, N, E); or only the segments' summaries."""
    i_segment = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    n_batch = tl.num_programs(2)
    p_z += i_batch * stride_z_batch
    p_sum += i_batch * n_all * T * channels
    p_y += i_batch * n_all * T * channels
    p_out += i_batch * length * channels
    if TWO:
        i_other = n_batch + i_batch
        _walk(
            p_u + i_other * n_all * T * channels,
            p_z,
            p_projected + i_other * (rank + 2 * N) * stride_row,
            p_rate + N * channels,
            p_dt_weight_b,
            p_dt_bias_b,
            p_skip_b,
            p_border + i_other * n_slots * N * channels,
            p_summary + i_other * n_segments * N * channels,
            p_step + i_other * n_segments * channels,
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
            stride_row,
            stride_z_token,
            zero,
            N,
            True,
            SUMMARY,
            SEGMENTED,
            KEEP,
            False,
            False,
            T,
            BLOCK_C,
            BLOCK_R,
            PRECISION,
        )
        tl.debug_barrier()  # sums stored above are read below, perhaps by other threads
    _walk(
        p_u + i_batch * n_all * T * channels,
        p_z,
        p_projected + i_batch * (rank + 2 * N) * stride_row,
        p_rate,
        p_dt_weight,
        p_dt_bias,
        p_skip,
        p_border + i_batch * n_slots * N * channels,
        p_summary + i_batch * n_segments * N * channels,
        p_step + i_batch * n_segments * channels,
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
        stride_row,
        stride_z_token,
        zero,
        N,
        False,
        SUMMARY,
        SEGMENTED,
        KEEP,
        TWO,
        True,
        T,
        BLOCK_C,
        BLOCK_R,
        PRECISION,
    )


def bidirectional_forward(
    xz: Tensor, parameters: list[Tensor], scale: float, out_dtype: torch.dtype, borders, projected, rates, y
) -> Tensor:
    """Result (B, L, E); fills the others, what the backward pass needs, unless they are empty."""
    launch = Launch(xz, parameters)
    keep = projected.numel() > 0
    if not keep:
        borders, projected, rates = launch.scratch()
    u = project(launch, projected, rates)
    out = xz.new_empty(launch.batch, launch.length, launch.channels, dtype=out_dtype)
    sums = out if launch.directions == 1 else launch.empty(launch.batch, launch.padded, launch.channels)
    summary, steps = launch.summaries()
    tensors = (u, launch.z, projected, rates, borders, summary, steps, sums, y, out, *launch.step_parameters)
    constants = dict(launch.constants, TWO=launch.directions == 2, KEEP=keep, SEGMENTED=launch.segments > 1)
    slots = launch.tiles - 1 if keep else launch.segments
    arguments = (*tensors, scale, *launch.sizes, slots, *launch.strides)
    if launch.segments > 1:
        bidirectional_selective_scan_fwd_kernel_scan[launch.grid](*arguments, SUMMARY=True, **constants)
    bidirectional_selective_scan_fwd_kernel_scan[launch.grid](*arguments, SUMMARY=False, **constants)
    return out
