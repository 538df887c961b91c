"""One-direction selective scan, Triton backward pass.

A program owns a block of channels of one group and a segment of tokens. It walks the segment twice: first in scan
order, leaving the state that enters every tile; then backwards, recomputing the states of a tile and running the
adjoint scan over it. Sums over channels and programs are left as partial sums that torch adds in a fixed order: two
runs agree bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_scan import LOG2_E, carry_in, softplus_slope, tile_adjoint, tile_gradients, tile_states
from .triton_fwd import RUN_TIME_SIZES, channels_of, load_step_sizes, load_tile, load_vector, summarise, tile_tokens
from .triton_launch import Launch, token_major


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
    p_state,
    p_step,
    p_dout,
    p_dlast,
    p_flow,
    p_border,
    p_du,
    p_ddelta,
    p_dz,
    p_dB,
    p_dC,
    p_dA,
    p_dbias,
    p_dskip,
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
    stride_dout_batch,
    stride_dout_token,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr,
    T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """All gradients, or only the flow that each segment's adjoint scan hands on (B, S, N, D)."""
    i_segment = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    i_group, i_block, o_channel, m_channel = channels_of(tl.program_id(0), channels, n_groups, BLOCK_C)
    o_row = o_channel * stride_channel
    i_in_tile = tl.arange(0, T)
    i_state = tl.arange(0, BLOCK_N)
    m_state = i_state < N
    m_state_channel = m_state[:, None] & m_channel[None, :]
    o_state = i_state[:, None] * channels + o_channel[None, :]
    p_u += i_batch * stride_u_batch
    p_delta += i_batch * stride_delta_batch
    p_dout += i_batch * stride_dout_batch
    stride_weight = n_groups * N
    o_weight = i_batch * length * stride_weight + i_group * N
    # Every block of channels has its own copy of the gradients of B and C, summed afterwards.
    o_dweight = i_block.to(tl.int64) * tl.num_programs(2) * length * stride_weight + o_weight
    p_state += i_batch * n_segments * N * channels
    p_step += i_batch * n_segments * channels
    p_flow += i_batch * n_segments * N * channels
    p_border += (i_batch * n_segments + i_segment) * n_tiles * N * channels + o_state
    rate = (
        tl.load(p_A + o_channel[None, :] * N + i_state[:, None], mask=m_state_channel, other=0.0).to(tl.float32)
        * LOG2_E
    )
    bias = load_vector(p_bias, o_channel, m_channel)
    skip = load_vector(p_skip, o_channel, m_channel)
    flow = tl.zeros(rate.shape, tl.float32)
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
            REVERSE,
        )
        for i in range(n_tiles):
            o_token = tile_tokens(i, n_tiles, i_segment, REVERSE, T)
            m_token = o_token < length
            m_tile = m_token[:, None] & m_channel[None, :]
            dt = load_step_sizes(p_delta, bias, o_token, m_tile, stride_delta_token, o_row, SOFTPLUS)
            u = load_tile(p_u, o_token, m_tile, stride_u_token, o_row)
            B = tl.load(
                p_B + o_weight + o_token[:, None] * stride_weight + i_state[None, :],
                mask=m_token[:, None] & m_state[None, :],
                other=0.0,
            ).to(tl.float32)
            tl.store(p_border + i * N * channels, state, mask=m_state_channel)
            _, state = tile_states(dt, u, B, rate, state, i_in_tile)
        tl.debug_barrier()  # the states stored above are read below, perhaps by other threads
        # Loaded again: Triton 3.7 fails to compile when values derived from one load serve two loops.
        rate = (
            tl.load(p_A + o_channel[None, :] * N + i_state[:, None], mask=m_state_channel, other=0.0).to(tl.float32)
            * LOG2_E
        )
        bias = load_vector(p_bias, o_channel, m_channel)
    if p_dlast is not None:
        m_last = m_state_channel & (i_segment == (0 if REVERSE else n_segments - 1))
        flow += tl.load(
            p_dlast + i_batch * channels * N + o_channel[None, :] * N + i_state[:, None], mask=m_last, other=0.0
        )
    dA = tl.zeros(rate.shape, tl.float32)
    dbias = tl.zeros(bias.shape, tl.float32)
    dskip = tl.zeros(bias.shape, tl.float32)
    for i in range(n_tiles):
        i_tile = n_tiles - 1 - i
        o_token = tile_tokens(i_tile, n_tiles, i_segment, REVERSE, T)
        m_token = o_token < length
        m_tile = m_token[:, None] & m_channel[None, :]
        dt = load_step_sizes(p_delta, bias, o_token, m_tile, stride_delta_token, o_row, SOFTPLUS)
        dout = load_tile(p_dout, o_token, m_tile, stride_dout_token, o_row)
        dy = dout
        if p_z is not None:
            z = load_tile(p_z + i_batch * stride_z_batch, o_token, m_tile, stride_z_token, o_row)
            sigmoid = tl.sigmoid(z)
            dy = dout * z * sigmoid
        o_tile_weight = o_token[:, None] * stride_weight + i_state[None, :]
        m_weight = m_token[:, None] & m_state[None, :]
        C = tl.load(p_C + o_weight + o_tile_weight, mask=m_weight, other=0.0).to(tl.float32)
        grad, flow = tile_adjoint(dt, C, dy, rate, flow, i_in_tile)
        if not SUMMARY:
            u = load_tile(p_u, o_token, m_tile, stride_u_token, o_row)
            B = tl.load(p_B + o_weight + o_tile_weight, mask=m_weight, other=0.0).to(tl.float32)
            state = tl.load(p_border + i_tile * N * channels, mask=m_state_channel, other=0.0)
            states, tile_dA, dB, dC, ddt, dinput = tile_gradients(dt, u, B, dy, rate, state, grad, i_in_tile)
            if SOFTPLUS:
                ddt *= softplus_slope(dt)
            ddt = tl.where(m_tile, ddt, 0.0)
            dA += tile_dA
            dbias += tl.sum(ddt, axis=0)
            dskip += tl.sum(u * dy, axis=0)
            o_out = (i_batch * length + o_token[:, None]) * channels + o_channel[None, :]
            tl.store(p_du + o_out, (dt * dinput + skip[None, :] * dy).to(p_du.dtype.element_ty), mask=m_tile)
            tl.store(p_ddelta + o_out, ddt.to(p_ddelta.dtype.element_ty), mask=m_tile)
            if p_z is not None:
                y = tl.sum(states * C[:, :, None], axis=1) + skip[None, :] * u
                dz = dout * y * sigmoid * (1.0 + z * (1.0 - sigmoid))
                tl.store(p_dz + o_out, dz.to(p_dz.dtype.element_ty), mask=m_tile)
            tl.store(p_dB + o_dweight + o_tile_weight, dB, mask=m_weight)
            tl.store(p_dC + o_dweight + o_tile_weight, dC, mask=m_weight)
    if SUMMARY:
        tl.store(p_flow + i_segment * N * channels + o_state, flow, mask=m_state_channel)
    else:
        i_partial = i_batch * n_segments + i_segment
        tl.store(p_dA + i_partial * N * channels + o_state, dA, mask=m_state_channel)
        tl.store(p_dbias + i_partial * channels + o_channel, dbias, mask=m_channel)
        tl.store(p_dskip + i_partial * channels + o_channel, dskip, mask=m_channel)


def selective_scan_backward(
    dout, dlast, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse
) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias; empty for what is None."""
    launch = Launch(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, states_per_warp=2)
    batch, channels, length = u.shape
    dout = token_major(dout)

    def partial(*shape):
        return u.new_empty(shape, dtype=torch.float32)

    du, ddelta, dz = (None if t is None else t.new_empty(batch, length, channels) for t in (u, delta, z))
    flows = torch.empty_like(launch.states)
    borders = partial(batch, launch.segments * launch.tiles_per_segment, launch.state, channels)
    dB, dC = (partial(launch.blocks, batch, length, launch.groups, launch.state) for _ in range(2))
    dA = partial(batch * launch.segments, launch.state, channels)
    dbias, dskip = (partial(batch * launch.segments, channels) for _ in range(2))
    gradients = (du, ddelta, dz, dB, dC, dA, dbias, dskip)
    dlast = None if dlast is None else dlast.contiguous()
    arguments = (*launch.tensors, launch.states, launch.steps, dout, dlast, flows, borders, *gradients, *launch.sizes)
    arguments += (dout.stride(0), dout.stride(2))
    if launch.segments > 1:
        summarise(launch, du, dA)
        selective_scan_bwd_kernel[launch.grid](*arguments, SUMMARY=True, **launch.constants)
    selective_scan_bwd_kernel[launch.grid](*arguments, SUMMARY=False, **launch.constants)
    return (
        du.transpose(1, 2),
        ddelta.transpose(1, 2),
        dA.sum(0).T.to(A.dtype).contiguous(),
        dB.sum(0).permute(0, 2, 3, 1).to(B.dtype).contiguous(),
        dC.sum(0).permute(0, 2, 3, 1).to(C.dtype).contiguous(),
        u.new_empty(0) if D is None else dskip.sum(0).to(D.dtype),
        u.new_empty(0) if z is None else dz.transpose(1, 2),
        u.new_empty(0) if delta_bias is None else dbias.sum(0).to(delta_bias.dtype),
    )
