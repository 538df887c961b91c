"""Four-direction selective scan, Triton backward pass.

A program owns a block of channels and a segment of tokens, as in the forward pass. For each direction it walks its
segment twice: first in scan order, leaving the state that enters every tile; then backwards, recomputing the states of
a tile and running the adjoint scan over it. Sums over channels and over programs are left as partial sums and added by
torch in a fixed order, so that two runs agree bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_scan import LN_2, carry_in, softplus_slope, tile_adjoint, tile_gradients, tile_states
from .triton_fwd import selective_scan_2d_fwd_kernel
from .triton_launch import Launch
from .triton_tile import load_parameters, load_step_sizes, tile_pixels


@triton.jit
def _walk_segment(
    p_x,
    p_dy,
    p_projected,
    p_dt_weight,
    p_dt_bias,
    p_A_log,
    p_skip,
    p_state,
    p_step,
    p_flow,
    p_border,
    p_du,
    p_dprojected,
    p_dA,
    p_dweight,
    p_dbias,
    p_dskip,
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
    i_sequence = (i_batch * 4 + i_direction) * n_segments
    o_state = i_state[:, None] * channels + o_channel[None, :]
    p_flow += i_sequence * N * channels
    stride_projected = 4 * (rank + 2 * N)
    o_direction = i_direction * (rank + 2 * N)
    p_projected += i_batch * height * width * stride_projected + o_direction
    p_dprojected += i_batch * height * width * stride_projected + o_direction
    p_border += (i_batch * n_segments + i_segment) * n_tiles * N * channels + o_state
    flow = tl.zeros(rate.shape, tl.float32)
    if not SUMMARY:
        p_state += i_sequence * N * channels
        p_step += i_sequence * channels
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
        flow = carry_in(
            p_flow,
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
            is_reverse,
        )
        for i in range(n_tiles):
            o_pixel, m_token = tile_pixels(i, n_tiles, i_segment, height, width, i_direction, NARROW, T)
            dt = load_step_sizes(
                p_projected, o_pixel, m_token, o_rank, m_rank, weight, bias, stride_projected, PRECISION
            )
            u = tl.load(
                p_x + o_pixel[:, None] * stride_x_pixel + o_channel[None, :] * stride_x_channel,
                mask=m_token[:, None] & m_channel[None, :],
                other=0.0,
            ).to(tl.float32)
            B = tl.load(
                p_projected + rank + o_pixel[:, None] * stride_projected + i_state[None, :],
                mask=m_token[:, None] & m_state[None, :],
                other=0.0,
            ).to(tl.float32)
            tl.store(p_border + i * N * channels, state, mask=m_state_channel)
            _, state = tile_states(dt, u, B, rate, state, i_in_tile)
        tl.debug_barrier()  # the states stored above are read below, perhaps by other threads
        # Loaded again: Triton 3.7 fails to compile when values derived from one load serve two loops.
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
        skip = tl.load(p_skip + i_direction * channels + o_channel, mask=m_channel, other=0.0).to(tl.float32)
    dA = tl.zeros(rate.shape, tl.float32)
    dweight = tl.zeros(weight.shape, tl.float32)
    dbias = tl.zeros(bias.shape, tl.float32)
    dskip = tl.zeros(bias.shape, tl.float32)
    for i in range(n_tiles):
        i_tile = n_tiles - 1 - i
        o_pixel, m_token = tile_pixels(i_tile, n_tiles, i_segment, height, width, i_direction, NARROW, T)
        m_tile = m_token[:, None] & m_channel[None, :]
        dt = load_step_sizes(p_projected, o_pixel, m_token, o_rank, m_rank, weight, bias, stride_projected, PRECISION)
        o_tile = o_pixel[:, None] * channels + o_channel[None, :]
        dy = tl.load(p_dy + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        o_B = rank + o_pixel[:, None] * stride_projected + i_state[None, :]
        m_B = m_token[:, None] & m_state[None, :]
        C = tl.load(p_projected + o_B + N, mask=m_B, other=0.0).to(tl.float32)
        grad, flow = tile_adjoint(dt, C, dy, rate, flow, i_in_tile)
        if not SUMMARY:
            u = tl.load(
                p_x + o_pixel[:, None] * stride_x_pixel + o_channel[None, :] * stride_x_channel, mask=m_tile, other=0.0
            ).to(tl.float32)
            B = tl.load(p_projected + o_B, mask=m_B, other=0.0).to(tl.float32)
            state = tl.load(p_border + i_tile * N * channels, mask=m_state_channel, other=0.0)
            _, tile_dA, dB, dC, ddt, dinput = tile_gradients(dt, u, B, dy, rate, state, grad, i_in_tile)
            dA += tile_dA
            draw = ddt * softplus_slope(dt)
            du = dt * dinput + skip[None, :] * dy
            low_rank = tl.load(
                p_projected + o_pixel[:, None] * stride_projected + o_rank[None, :],
                mask=m_token[:, None] & m_rank[None, :],
                other=0.0,
            ).to(tl.float32)
            dlow_rank = tl.dot(draw, tl.trans(weight.to(tl.float32)), input_precision=PRECISION)
            dweight += tl.dot(tl.trans(low_rank), draw, input_precision=PRECISION)
            dbias += tl.sum(draw, axis=0)
            dskip += tl.sum(u * dy, axis=0)
            du += tl.load(p_du + o_tile, mask=m_tile & accumulate, other=0.0)
            tl.store(p_du + o_tile, du, mask=m_tile)
            tl.store(
                p_dprojected + o_pixel[:, None] * stride_projected + o_rank[None, :],
                dlow_rank,
                mask=m_token[:, None] & m_rank[None, :],
            )
            tl.store(p_dprojected + o_B, dB, mask=m_B)
            tl.store(p_dprojected + o_B + N, dC, mask=m_B)
    if SUMMARY:
        tl.store(p_flow + i_segment * N * channels + o_state, flow, mask=m_state_channel)
    else:
        # Partial sums are (batch, segment, direction, ...); A_log = log(-A), so dA_log = A dA.
        i_partial = (i_batch * n_segments + i_segment) * 4 + i_direction
        tl.store(p_dA + i_partial * N * channels + o_state, dA * rate * LN_2, mask=m_state_channel)
        tl.store(
            p_dweight + i_partial * rank * channels + o_rank[:, None] * channels + o_channel[None, :],
            dweight,
            mask=m_rank[:, None] & m_channel[None, :],
        )
        tl.store(p_dbias + i_partial * channels + o_channel, dbias, mask=m_channel)
        tl.store(p_dskip + i_partial * channels + o_channel, dskip, mask=m_channel)


@triton.jit(do_not_specialize=["stride_x_channel", "height", "width", "n_tiles", "n_segments", "first", "count"])
def selective_scan_2d_bwd_kernel(
    p_x,
    p_projected,
    p_dt_weight,
    p_dt_bias,
    p_A_log,
    p_skip,
    p_state,
    p_step,
    p_dy,
    p_flow,
    p_border,
    p_du,
    p_dprojected,
    p_dA,
    p_dweight,
    p_dbias,
    p_dskip,
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
    """``count`` directions in the order 0, 2, 1, 3 from ``first`` on; or what the segments' adjoint scans hand on."""
    i_block = tl.program_id(0)
    i_segment = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    o_channel = i_block * BLOCK_C + tl.arange(0, BLOCK_C)
    m_channel = o_channel < channels
    o_map = i_batch * height * width * channels
    p_x += i_batch * stride_x_batch
    p_dy += o_map
    p_du += o_map
    # Every block of channels has its own copy of the projections' gradients, summed afterwards.
    p_dprojected += i_block.to(tl.int64) * tl.num_programs(2) * height * width * 4 * (rank + 2 * N)
    for q in range(count):
        tl.debug_barrier()  # rows stored by other threads of this program are read below
        _walk_segment(
            p_x,
            p_dy,
            p_projected,
            p_dt_weight,
            p_dt_bias,
            p_A_log,
            p_skip,
            p_state,
            p_step,
            p_flow,
            p_border,
            p_du,
            p_dprojected,
            p_dA,
            p_dweight,
            p_dbias,
            p_dskip,
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


def selective_scan_2d_backward(dy, x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D) -> tuple[Tensor, ...]:
    """Gradients of all arguments of :func:`mmvssm_kernels.selective_scan_2d`; that of x in channel-last memory."""
    launch = Launch(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, states_per_warp=2)
    batch, channels, segments, blocks = launch.batch, launch.channels, launch.segments, launch.grid[0]

    def empty(*shape):
        return x.new_empty(shape, dtype=torch.float32)

    dy = dy.permute(0, 2, 3, 1).contiguous()
    flows = torch.empty_like(launch.states)
    borders = empty(batch, segments * launch.tiles_per_segment, launch.state, channels)
    du = empty(batch, launch.height * launch.width, channels)
    dprojected = empty(blocks, *launch.projected.shape)
    partial = [empty(batch * segments, 4, size, channels) for size in (launch.state, launch.rank, 1, 1)]
    tensors = (*launch.tensors, launch.states, launch.steps, dy, flows, borders, du, dprojected, *partial)
    arguments = (*tensors, *launch.sizes)
    if segments > 1:
        forward = (*launch.tensors, launch.states, launch.steps, du, *launch.sizes)
        selective_scan_2d_fwd_kernel[launch.grid](*forward, first=0, count=4, SUMMARY=True, **launch.constants)
        selective_scan_2d_bwd_kernel[launch.grid](*arguments, first=0, count=4, SUMMARY=True, **launch.constants)
    for first, count in ((0, 4),) if segments == 1 else ((0, 2), (1, 2)):
        selective_scan_2d_bwd_kernel[launch.grid](
            *arguments, first=first, count=count, SUMMARY=False, **launch.constants
        )
    dprojected = dprojected.sum(0).flatten(0, 1)
    weight = x_proj_weight.flatten(0, 1).float()
    dx = torch.addmm(du.flatten(0, 1), dprojected, weight).to(x.dtype)
    dx_weight = dprojected.T @ launch.flat.flatten(0, 1).float()
    dA_log, dweight, dbias, dskip = (t.sum(0) for t in partial)  # (4, N, D), (4, R, D), (4, 1, D), (4, 1, D)
    gradients = (
        dx_weight.view(x_proj_weight.shape),
        dweight.transpose(1, 2),
        dbias.view(dt_proj_bias.shape),
        dA_log.transpose(1, 2).reshape(A_log.shape),
        dskip.view(D.shape),
    )
    parameters = (x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    dx = dx.view(batch, launch.height, launch.width, channels).permute(0, 3, 1, 2)
    return dx, *(g.to(p.dtype).contiguous() for g, p in zip(gradients, parameters, strict=True))
