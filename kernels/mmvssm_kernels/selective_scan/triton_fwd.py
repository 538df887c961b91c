"""One-direction selective scan, Triton forward pass.

A program owns a block of channels of one group and a segment of tokens, and walks the segment tile by tile. Sequences
with few rows are cut into several segments: a first launch leaves each segment's state from zero and its sum of step
sizes, a second one makes of them the states that enter the segments, and the third walks. For the backward pass the
states that enter every ``KEEP``-th token are kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv
from ..triton_scan import sigmoid
from . import op, triton_launch
from .triton_launch import RUN_TIME_SIZES, Launch
from .triton_tile import (
    channels_of,
    detach_layout,
    last_row,
    load_rate,
    load_tile,
    load_vector,
    scan_rows,
    step_sizes,
    tile_tokens,
)


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def selective_scan_fwd_kernel(
    p_u,
    p_delta,
    p_z,
    p_A,
    p_B,
    p_C,
    p_skip,
    p_bias,
    p_state,
    p_step,
    p_y,
    p_last,
    p_border,
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
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr,
    SEGMENTED: tl.constexpr,
    KEEP: tl.constexpr,
    T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Output (B, L, D), last state (B, D, N) and borders (B, K, N, D), or summaries (B, S, N, D) and (B, S, D)."""
    i_segment = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    i_group, _, o_channel, m_channel = channels_of(tl.program_id(0), channels, n_groups, zero, BLOCK_C)
    i_state = tl.arange(0, BLOCK_N)
    m_state = i_state < N
    m_state_channel = m_state[:, None] & m_channel[None, :]
    o_state = i_state[:, None] * channels + o_channel[None, :]
    stride_state = N * channels
    p_u += i_batch * stride_u_batch
    p_delta += i_batch * stride_delta_batch
    p_B += i_batch * stride_B_batch + i_group * stride_B_group
    p_C += i_batch * stride_C_batch + i_group * stride_C_group
    p_state += (i_batch * n_segments + i_segment) * stride_state
    rate = load_rate(p_A, o_channel, m_state_channel, N, BLOCK_N)
    bias = load_vector(p_bias, o_channel, m_channel)
    skip = load_vector(p_skip, o_channel, m_channel)
    state = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if SEGMENTED and not SUMMARY:
        # What the segment before this one handed on.
        state = tl.load(p_state - stride_state + o_state, mask=m_state_channel & (i_segment > 0), other=0.0)
    steps = tl.zeros((T, BLOCK_C), tl.float32)
    n_all = tl.cdiv(length, T)
    i_first = i_segment * n_tiles
    i_end = tl.minimum(i_first + n_tiles, n_all)
    # Loads are one tile ahead of their use.
    o_token, m_token = tile_tokens(i_first, length, T, REVERSE)
    delta = load_tile(p_delta, o_token, m_token, stride_delta_token, o_channel, m_channel, stride_delta_channel)
    u = load_tile(p_u, o_token, m_token, stride_u_token, o_channel, m_channel, stride_u_channel)
    B = load_tile(p_B, o_token, m_token, stride_B_token, i_state, m_state, stride_B_state)
    if not SUMMARY:
        C = load_tile(p_C, o_token, m_token, stride_C_token, i_state, m_state, stride_C_state)
        if p_z is not None:
            p_z += i_batch * stride_z_batch
            z = load_tile(p_z, o_token, m_token, stride_z_token, o_channel, m_channel, stride_z_channel)
    for i in range(i_first, i_end):
        o_now, m_now = tile_tokens(i, length, T, REVERSE)
        dt = step_sizes(delta, bias, m_now, SOFTPLUS)
        u_now = u.to(tl.float32)
        B_now = detach_layout(B.to(tl.float32))
        o_token, m_token = tile_tokens(i + 1, length, T, REVERSE)
        delta = load_tile(p_delta, o_token, m_token, stride_delta_token, o_channel, m_channel, stride_delta_channel)
        u = load_tile(p_u, o_token, m_token, stride_u_token, o_channel, m_channel, stride_u_channel)
        B = load_tile(p_B, o_token, m_token, stride_B_token, i_state, m_state, stride_B_state)
        if SUMMARY:
            steps += dt
        else:
            C_now = detach_layout(C.to(tl.float32))
            C = load_tile(p_C, o_token, m_token, stride_C_token, i_state, m_state, stride_C_state)
            if p_z is not None:
                z_now = z.to(tl.float32)
                z = load_tile(p_z, o_token, m_token, stride_z_token, o_channel, m_channel, stride_z_channel)
            if KEEP > 0:  # noqa: SIM102 (known when the kernel is compiled)
                if (i * T) % KEEP == 0 and i > 0:
                    i_border = i_batch * ((length - 1) // KEEP) + i * T // KEEP - 1
                    tl.store(p_border + i_border * stride_state + o_state, state, mask=m_state_channel)
        decay = tl.exp2(dt[:, None, :] * rate)
        states = scan_rows(decay, (dt * u_now)[:, None, :] * B_now[:, :, None], state)
        state = last_row(states)
        if not SUMMARY:
            y = tl.sum(states * C_now[:, :, None], axis=1) + skip[None, :] * u_now
            if p_z is not None:
                y *= z_now * sigmoid(z_now)
            p_out = p_y + (i_batch * length + o_now[:, None]) * channels + o_channel[None, :]
            tl.store(p_out, y.to(p_y.dtype.element_ty), mask=m_now[:, None] & m_channel[None, :])
    if SUMMARY:
        tl.store(p_state + o_state, state, mask=m_state_channel)
        p_step += (i_batch * n_segments + i_segment) * channels + o_channel
        tl.store(p_step, tl.sum(steps, axis=0), mask=m_channel)
    elif i_segment == n_segments - 1:
        p_last += i_batch * channels * N
        tl.store(p_last + o_channel[None, :] * N + i_state[:, None], state, mask=m_state_channel)


@triton.jit(do_not_specialize=["channels", "n_segments", "zero"])
def selective_scan_segments_kernel(
    p_state,
    p_step,
    p_A,
    channels,
    n_segments,
    zero,
    N: tl.constexpr,
    BACKWARDS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of what each segment reaches from zero (B, S, N, D) makes, in place, what it hands on to the next one.

    With ``BACKWARDS`` from the last segment to the first. A program follows one state of a block of channels.
    """
    n = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    o_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C) + zero
    m_channel = o_channel < channels
    p_state += (i_batch * n_segments * N + n) * channels
    p_step += i_batch * n_segments * channels
    rate = load_rate(p_A + n, o_channel, m_channel[None, :], N, 1)
    state = tl.zeros((1, BLOCK_C), tl.float32)
    for i in range(0, n_segments, T):
        i_segment = i + tl.arange(0, T)
        m_tile = (i_segment < n_segments)[:, None] & m_channel[None, :]
        if BACKWARDS:
            i_segment = n_segments - 1 - i_segment
        steps = tl.load(p_step + i_segment[:, None] * channels + o_channel[None, :], mask=m_tile, other=0.0)
        p_tile = p_state + i_segment[:, None] * N * channels + o_channel[None, :]
        value = tl.load(p_tile, mask=m_tile, other=0.0)[:, None, :]
        decay = tl.exp2(steps[:, None, :] * rate)
        states = scan_rows(decay, value, state)
        state = last_row(states)
        tl.store(p_tile, tl.reshape(states, (T, BLOCK_C)), mask=m_tile)


def scan_segments(launch: Launch, state: Tensor, step: Tensor, backwards: bool) -> None:
    """Run :func:`selective_scan_segments_kernel`."""
    block = 32
    grid = (cdiv(launch.channels, block), launch.state, launch.batch)
    selective_scan_segments_kernel[grid](
        state, step, launch.A, launch.channels, launch.segments, 0, launch.state, backwards, 8, block, num_warps=1
    )


def selective_scan_forward(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, out_dtype, borders
) -> tuple[Tensor, Tensor]:
    """Output (B, D, L), channels adjacent in memory, and last state (B, D, N); fills ``borders`` unless it is empty.

    Other arguments as the public function's.
    """
    launch = Launch(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, triton_launch.forward_form)
    batch, channels, length = u.shape
    y = u.new_empty(batch, length, channels, dtype=out_dtype)
    last = u.new_empty(batch, channels, launch.state, dtype=torch.float32)
    state, step = launch.summaries()
    arguments = (*launch.tensors, state, step, y, last, borders, *launch.sizes)
    keep = op.KEEP if borders.numel() else 0
    if launch.segments > 1:
        selective_scan_fwd_kernel[launch.grid](*arguments, SUMMARY=True, KEEP=0, **launch.constants)
        scan_segments(launch, state, step, backwards=False)
    selective_scan_fwd_kernel[launch.grid](*arguments, SUMMARY=False, KEEP=keep, **launch.constants)
    return y.transpose(1, 2), last
