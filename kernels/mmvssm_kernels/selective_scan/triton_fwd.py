"""One-direction selective scan, Triton forward pass.

A program owns a block of channels of one group and a segment of tokens, and walks the segment tile by tile. Sequences
with few rows are cut into several segments; a first launch then leaves each segment's state from zero and its sum of
step sizes, from which every program of the second launch computes the state that enters it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_scan import LOG2_E, carry_in, softplus, tile_states
from .triton_launch import Launch

RUN_TIME_SIZES = ["stride_channel", "length", "n_tiles", "n_segments"]


@triton.jit
def tile_tokens(i_tile, n_tiles, i_segment, REVERSE: tl.constexpr, T: tl.constexpr):
    """Tokens (T) of a segment's ``i_tile``-th tile, both in scan order."""
    if REVERSE:
        return (i_segment * n_tiles + n_tiles - i_tile) * T - 1 - tl.arange(0, T)
    else:
        return (i_segment * n_tiles + i_tile) * T + tl.arange(0, T)


@triton.jit
def load_step_sizes(p_delta, bias, o_token, m_tile, stride_token, o_row, SOFTPLUS: tl.constexpr):
    """Step sizes (T, C) of a tile, zero where masked."""
    dt = tl.load(p_delta + o_token[:, None] * stride_token + o_row[None, :], mask=m_tile, other=0.0).to(tl.float32)
    dt += bias[None, :]
    if SOFTPLUS:
        dt = softplus(dt)
    return tl.where(m_tile, dt, 0.0)


@triton.jit
def load_tile(p_row, o_token, m_tile, stride_token, o_row):
    """Tile (T, C) of a row tensor in float32."""
    return tl.load(p_row + o_token[:, None] * stride_token + o_row[None, :], mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def load_vector(p_vector, o_channel, m_channel):
    """Optional per-channel values (C) in float32, zero if there are none."""
    if p_vector is None:
        return tl.zeros(o_channel.shape, tl.float32)
    else:
        return tl.load(p_vector + o_channel, mask=m_channel, other=0.0).to(tl.float32)


@triton.jit
def channels_of(i_program, channels, n_groups, BLOCK_C: tl.constexpr):
    """Group, block in the group, channels (C) and mask of a program; blocks do not cross groups."""
    group_channels = channels // n_groups
    n_blocks = tl.cdiv(group_channels, BLOCK_C)
    i_group = i_program // n_blocks
    i_block = i_program % n_blocks
    o_in_group = i_block * BLOCK_C + tl.arange(0, BLOCK_C)
    return i_group, i_block, i_group * group_channels + o_in_group, o_in_group < group_channels


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
    length,
    channels,
    n_groups,
    n_tiles,
    n_segments,
    stride_u_batch,
    stride_u_token,
    stride_delta_batch,
    stride_delta_token,
    stride_z_batch,
    stride_z_token,
    stride_channel,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr,
    T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Output (B, L, D) and last state (B, D, N), or only the segments' summaries (B, S, [N,] D)."""
    i_segment = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    i_group, _, o_channel, m_channel = channels_of(tl.program_id(0), channels, n_groups, BLOCK_C)
    o_row = o_channel * stride_channel
    i_state = tl.arange(0, BLOCK_N)
    m_state = i_state < N
    m_state_channel = m_state[:, None] & m_channel[None, :]
    o_state = i_state[:, None] * channels + o_channel[None, :]
    p_u += i_batch * stride_u_batch
    p_delta += i_batch * stride_delta_batch
    stride_weight = n_groups * N
    o_weight = i_batch * length * stride_weight + i_group * N
    p_state += i_batch * n_segments * N * channels
    p_step += i_batch * n_segments * channels
    rate = (
        tl.load(p_A + o_channel[None, :] * N + i_state[:, None], mask=m_state_channel, other=0.0).to(tl.float32)
        * LOG2_E
    )
    bias = load_vector(p_bias, o_channel, m_channel)
    skip = load_vector(p_skip, o_channel, m_channel)
    if not SUMMARY:
        state = carry_in(
            p_state,
            p_step,
            rate,
            i_segment,
            n_segments,
            o_state,
            m_state_channel,
            o_channel,
            m_channel,
            N * channels,
            channels,
            not REVERSE,
        )
    else:
        state = tl.zeros(rate.shape, tl.float32)
    steps = tl.zeros(bias.shape, tl.float32)
    for i in range(n_tiles):
        o_token = tile_tokens(i, n_tiles, i_segment, REVERSE, T)
        m_token = o_token < length
        m_tile = m_token[:, None] & m_channel[None, :]
        dt = load_step_sizes(p_delta, bias, o_token, m_tile, stride_delta_token, o_row, SOFTPLUS)
        u = load_tile(p_u, o_token, m_tile, stride_u_token, o_row)
        o_tile_weight = o_weight + o_token[:, None] * stride_weight + i_state[None, :]
        m_weight = m_token[:, None] & m_state[None, :]
        B = tl.load(p_B + o_tile_weight, mask=m_weight, other=0.0).to(tl.float32)
        states, state = tile_states(dt, u, B, rate, state, tl.arange(0, T))
        if SUMMARY:
            steps += tl.sum(dt, axis=0)
        else:
            C = tl.load(p_C + o_tile_weight, mask=m_weight, other=0.0).to(tl.float32)
            y = tl.sum(states * C[:, :, None], axis=1) + skip[None, :] * u
            if p_z is not None:
                z = load_tile(p_z + i_batch * stride_z_batch, o_token, m_tile, stride_z_token, o_row)
                y *= z * tl.sigmoid(z)
            p_out = p_y + (i_batch * length + o_token[:, None]) * channels + o_channel[None, :]
            tl.store(p_out, y.to(p_y.dtype.element_ty), mask=m_tile)
    if SUMMARY:
        tl.store(p_state + i_segment * N * channels + o_state, state, mask=m_state_channel)
        tl.store(p_step + i_segment * channels + o_channel, steps, mask=m_channel)
    elif i_segment == (0 if REVERSE else n_segments - 1):
        p_last += i_batch * channels * N
        tl.store(p_last + o_channel[None, :] * N + i_state[:, None], state, mask=m_state_channel)


def summarise(launch: Launch, y: Tensor, last: Tensor) -> None:
    """Fill the states and sums of step sizes of all segments; ``y`` and ``last`` are not touched."""
    arguments = (*launch.tensors, launch.states, launch.steps, y, last, *launch.sizes)
    selective_scan_fwd_kernel[launch.grid](*arguments, SUMMARY=True, **launch.constants)


def selective_scan_forward(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, out_dtype
) -> tuple[Tensor, Tensor]:
    """Output (B, D, L), channels adjacent in memory, and last state (B, D, N); arguments as the public function's."""
    launch = Launch(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    batch, channels, length = u.shape
    y = u.new_empty(batch, length, channels, dtype=out_dtype)
    last = u.new_empty(batch, channels, launch.state, dtype=torch.float32)
    if launch.segments > 1:
        summarise(launch, y, last)
    arguments = (*launch.tensors, launch.states, launch.steps, y, last, *launch.sizes)
    selective_scan_fwd_kernel[launch.grid](*arguments, SUMMARY=False, **launch.constants)
    return y.transpose(1, 2), last
