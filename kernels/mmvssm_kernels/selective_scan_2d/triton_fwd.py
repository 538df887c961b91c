"""Four-direction selective scan, Triton forward pass.

A program owns a block of channels and a segment of tokens and walks the segment tile by tile, once in each direction.
It adds the directions of a pair (forward and backward along the same path) into its own rows of the result, so that
nothing is added atomically. Long sequences with few rows are cut into several segments; a first kernel then leaves each
segment's state from zero and its sum of step sizes, from which every program computes the state that enters it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_scan import carry_in, tile_states
from .triton_launch import Launch
from .triton_tile import load_parameters, load_step_sizes, tile_pixels


@triton.jit
def _walk_segment(
    p_x,
    p_projected,
    p_dt_weight,
    p_dt_bias,
    p_A_log,
    p_skip,
    p_state,
    p_step,
    p_y,
    i_segment,
    i_batch,
    o_channel,
    m_channel,
    height,
    width,
    channels,
    rank,
    n_tiles,
    n_segments,
    stride_x_pixel,
    stride_x_channel,
    i_direction,
    accumulate,
    N: tl.constexpr,
    SUMMARY: tl.constexpr,
    NARROW: tl.constexpr,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    is_reverse = i_direction >= 2
    i_in_tile = tl.arange(0, T)
    o_rank = tl.arange(0, BLOCK_R)
    m_rank = o_rank < rank
    i_state = tl.arange(0, BLOCK_N)
    m_state = i_state < N
    m_state_channel = m_state[:, None] & m_channel[None, :]
    weight, bias, rate = load_parameters(
        p_dt_weight,
        p_dt_bias,
        p_A_log,
        o_channel,
        m_channel,
        o_rank,
        m_rank,
        i_state,
        m_state,
        channels,
        rank,
        i_direction,
        N,
    )
    # Summaries are (batch, direction, segment, [state,] channel).
    i_sequence = (i_batch * 4 + i_direction) * n_segments
    o_state = i_state[:, None] * channels + o_channel[None, :]
    p_state += i_sequence * N * channels
    p_step += i_sequence * channels
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
            not is_reverse,
        )
    else:
        state = tl.zeros(rate.shape, tl.float32)
    if not SUMMARY:
        skip = tl.load(p_skip + i_direction * channels + o_channel, mask=m_channel, other=0.0).to(tl.float32)
    stride_projected = 4 * (rank + 2 * N)
    p_projected += i_batch * height * width * stride_projected + i_direction * (rank + 2 * N)
    steps = tl.zeros(bias.shape, tl.float32)
    for i in range(n_tiles):
        o_pixel, m_token = tile_pixels(i, n_tiles, i_segment, height, width, i_direction, NARROW, T)
        m_tile = m_token[:, None] & m_channel[None, :]
        dt = load_step_sizes(p_projected, o_pixel, m_token, o_rank, m_rank, weight, bias, stride_projected, PRECISION)
        u = tl.load(
            p_x + o_pixel[:, None] * stride_x_pixel + o_channel[None, :] * stride_x_channel, mask=m_tile, other=0.0
        ).to(tl.float32)
        p_B = p_projected + rank + o_pixel[:, None] * stride_projected + i_state[None, :]
        m_B = m_token[:, None] & m_state[None, :]
        B = tl.load(p_B, mask=m_B, other=0.0).to(tl.float32)  # (T, N)
        states, state = tile_states(dt, u, B, rate, state, i_in_tile)
        if SUMMARY:
            steps += tl.sum(dt, axis=0)
        else:
            C = tl.load(p_B + N, mask=m_B, other=0.0).to(tl.float32)
            y = tl.sum(states * C[:, :, None], axis=1) + skip[None, :] * u
            p_out = p_y + o_pixel[:, None] * channels + o_channel[None, :]
            y += tl.load(p_out, mask=m_tile & accumulate, other=0.0)
            tl.store(p_out, y, mask=m_tile)
    if SUMMARY:
        tl.store(p_state + i_segment * N * channels + o_state, state, mask=m_state_channel)
        tl.store(p_step + i_segment * channels + o_channel, steps, mask=m_channel)


@triton.jit(do_not_specialize=["stride_x_channel", "height", "width", "n_tiles", "n_segments", "first", "count"])
def selective_scan_2d_fwd_kernel(
    p_x,
    p_projected,
    p_dt_weight,
    p_dt_bias,
    p_A_log,
    p_skip,
    p_state,
    p_step,
    p_y,
    height,
    width,
    channels,
    rank,
    n_tiles,
    n_segments,
    stride_x_batch,
    stride_x_pixel,
    stride_x_channel,
    first,
    count,
    N: tl.constexpr,
    SUMMARY: tl.constexpr,
    NARROW: tl.constexpr,
    T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y (B, L, D) of ``count`` directions in the order 0, 2, 1, 3 from ``first`` on; or the segments' summaries."""
    i_segment = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    o_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_channel = o_channel < channels
    p_x += i_batch * stride_x_batch
    p_y += i_batch * height * width * channels
    for q in range(count):
        tl.debug_barrier()  # rows stored by other threads of this program are read below
        _walk_segment(
            p_x,
            p_projected,
            p_dt_weight,
            p_dt_bias,
            p_A_log,
            p_skip,
            p_state,
            p_step,
            p_y,
            i_segment,
            i_batch,
            o_channel,
            m_channel,
            height,
            width,
            channels,
            rank,
            n_tiles,
            n_segments,
            stride_x_pixel,
            stride_x_channel,
            first + q // 2 + 2 * (q % 2),
            q + first > 0,
            N,
            SUMMARY,
            NARROW,
            T,
            BLOCK_N,
            BLOCK_R,
            PRECISION,
        )


def selective_scan_2d_forward(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, out_dtype) -> Tensor:
    """Result (B, D, H, W) in channel-last memory; arguments as :func:`mmvssm_kernels.selective_scan_2d`."""
    launch = Launch(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    y = x.new_empty(launch.batch, launch.height, launch.width, launch.channels, dtype=torch.float32)
    arguments = (*launch.tensors, launch.states, launch.steps, y, *launch.sizes)
    if launch.segments > 1:
        selective_scan_2d_fwd_kernel[launch.grid](*arguments, first=0, count=4, SUMMARY=True, **launch.constants)
        for first in (0, 1):
            selective_scan_2d_fwd_kernel[launch.grid](
                *arguments, first=first, count=2, SUMMARY=False, **launch.constants
            )
    else:
        selective_scan_2d_fwd_kernel[launch.grid](*arguments, first=0, count=4, SUMMARY=False, **launch.constants)
    return y.to(out_dtype).permute(0, 3, 1, 2)
