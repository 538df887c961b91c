"""Four-direction selective scan, Triton backward pass.

1. Projections as in the forward pass, which left the states that enter the segments.
2. What enters the segments in the adjoint scans, which run against the directions (``triton_states.py``).
3. The kernel below walks each segment once along each direction to lay down the state that enters every tile, and once
   back, recomputing a tile's states and collecting all gradients. Those of x and of the projections go to the program's
   own pixels; those of the parameters are partial sums per program. Nothing is added atomically.
4. Matrix products carry the gradients of the projections to x and to the projection weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import Launch, pixel_stride, pixel_uniform
from .triton_tile import (
    LN_2,
    direction_geometry,
    load_low_rank,
    load_step_weights,
    next_tile,
    raw_steps,
    scan_adjoint,
    scan_states,
    scan_states_and_inflow,
    softplus_log2,
    tile_pointers,
    tile_tokens,
)


@triton.jit(do_not_specialize=["batch", "height", "width", "n_tiles", "n_segments", "first", "count"])
def selective_scan_2d_bwd_kernel(
    p_x,
    p_dy,
    p_projected,
    p_dt_weight,
    p_dt_bias,
    p_rate,
    p_skip,
    p_entering,
    p_flow_entering,
    p_border,
    p_flow,
    p_sum,
    p_dx,
    p_dprojected,
    p_dweight,
    p_drate,
    p_dskip,
    batch,
    height,
    width,
    n_tiles,
    n_segments,
    first,
    count,
    stride_batch,
    stride_dy_batch,
    stride_pixel: tl.constexpr,
    stride_dy_pixel: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    FULL: tl.constexpr,
    T: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients from ``count`` directions in the order 0, 2, 1, 3 from the ``first`` on.

    p_sum (batch, H, W, D) float32 adds up the gradient of x, whose last direction goes to p_dx; p_dprojected is
    (channel blocks, batch, H, W, 4, R + 2N); p_dweight (programs, 4, R + 1, D) has the gradient of the bias in its last
    row; p_drate is (sequences, 4, N, D), of A_log; p_dskip (programs, 4, D). p_border (sequences, tiles, N, D) and
    p_flow (sequences, N, D) are working memory; the threads that write a number are those that read it.
    """
    K: tl.constexpr = R + 2 * N
    N_BLOCKS: tl.constexpr = (D + C - 1) // C
    i_block = tl.program_id(0) % N_BLOCKS
    i_group = tl.program_id(0) // N_BLOCKS
    o_channel = i_block * C + tl.arange(0, C)
    m_channel = o_channel < D
    i_sequence = i_group * Q + tl.arange(0, Q)
    m_sequence = i_sequence < batch * n_segments
    m_state = m_sequence[:, None] & m_channel[None, :]
    i_batch = (i_sequence // n_segments).to(tl.int64)
    i_segment = i_sequence % n_segments
    o_rank = tl.arange(0, BLOCK_R)
    m_rank = o_rank < R
    p_x += i_batch * stride_batch
    p_dy += i_batch * stride_dy_batch
    p_sum += i_batch * height * width * D
    p_dx += i_batch * height * width * D
    p_border += i_sequence[:, None].to(tl.int64) * n_tiles * (N * D) + o_channel[None, :]
    p_flow += i_sequence[:, None].to(tl.int64) * (N * D) + o_channel[None, :]
    p_drate += i_sequence[:, None].to(tl.int64) * (4 * N * D) + o_channel[None, :]
    for i in range(first, first + count):
        i_direction = i // 2 + 2 * (i % 2)
        is_reverse = i % 2 == 1
        step = tl.where(is_reverse, -1, 1)
        n_outer, n_inner, n_tiles_inner, stride_outer, stride_inner = direction_geometry(i >= 2, height, width, T)
        o_direction = i_batch * height * width * (4 * K) + i_direction * K
        p_direction = p_projected + o_direction
        p_ddirection = p_dprojected + tl.cast(i_block, tl.int64) * batch * height * width * (4 * K) + o_direction
        o_entering = ((i_batch * 4 + i_direction) * n_segments + i_segment)[:, None] * (N * D) + o_channel[None, :]
        i_tile = i_segment * n_tiles + tl.where(is_reverse, n_tiles - 1, 0)
        i_outer, i_inner = i_tile // n_tiles_inner, i_tile % n_tiles_inner

        # Along the direction: the state that enters each tile.
        weight, bias = load_step_weights(p_dt_weight, p_dt_bias, o_channel, m_channel, i_direction, D, R, BLOCK_R)
        for n in range(N):
            entering = tl.load(p_entering + o_entering + n * D, mask=m_state & (n_segments > 1), other=0.0)
            tl.store(p_border + n * D, entering, mask=m_state)
        # One state stays in registers; several are read back from where they were laid down.
        state = tl.load(p_entering + o_entering, mask=m_state & (n_segments > 1), other=0.0)
        rate = tl.load(p_rate + i_direction * (N * D) + o_channel, mask=m_channel, other=0.0)
        o_pixel, m_token = tile_tokens(
            i_outer, i_inner, m_sequence, is_reverse, n_outer, n_inner, stride_outer, stride_inner, T, FULL
        )
        low_rank = load_low_rank(p_direction, o_pixel, m_token, 4 * K, R, BLOCK_R)
        m_tile = m_token[:, :, None] & m_channel[None, None, :]
        x = tl.load(tile_pointers(p_x, o_pixel, o_channel, stride_pixel, V), mask=m_tile, other=0.0)
        for j in range(n_tiles - 1):
            raw = raw_steps(low_rank, weight, bias, T, PRECISION)
            p_B = p_direction[None, :] + o_pixel * (4 * K) + R
            b_B = tl.load(p_B, mask=m_token, other=0.0)
            # The next tile's inputs are fetched before this one is computed. They come after the matrix product, since
            # Triton gives a conflict of layouts to the later of the two, and scans want the layout of the loads.
            i_outer, i_inner = next_tile(i_outer, i_inner, n_tiles_inner, step)
            o_pixel, m_next = tile_tokens(
                i_outer, i_inner, m_sequence, is_reverse, n_outer, n_inner, stride_outer, stride_inner, T, FULL
            )
            low_rank = load_low_rank(p_direction, o_pixel, m_next, 4 * K, R, BLOCK_R)
            m_tile = m_next[:, :, None] & m_channel[None, None, :]
            x_next = tl.load(tile_pointers(p_x, o_pixel, o_channel, stride_pixel, V), mask=m_tile, other=0.0)
            v = softplus_log2(raw)
            if not FULL:
                v = tl.where(m_token[:, :, None], v, 0.0)
            x = x.to(tl.float32) * v
            for n in range(N):
                p_state = p_border + j * (N * D) + n * D
                if N > 1:
                    rate = tl.load(p_rate + (i_direction * N + n) * D + o_channel, mask=m_channel, other=0.0)
                    state = tl.load(p_state, mask=m_state, other=0.0)
                    b_B = tl.load(p_B + n, mask=m_token, other=0.0)
                decay = tl.exp2(v * -rate[None, None, :])
                _, state = scan_states(decay, x * (b_B * LN_2)[:, :, None], state)
                tl.store(p_state + N * D, state, mask=m_state)
            m_token, x = m_next, x_next
        tl.debug_barrier()  # states and sums may be read by other threads of this program than wrote them

        # Against the direction: the gradients of each tile. Loaded again, because Triton 3.7 fails to compile when
        # values derived from one load serve two loops.
        weight, bias = load_step_weights(p_dt_weight, p_dt_bias, o_channel, m_channel, i_direction, D, R, BLOCK_R)
        skip = tl.load(p_skip + i_direction * D + o_channel, mask=m_channel, other=0.0).to(tl.float32)
        rate = tl.load(p_rate + i_direction * (N * D) + o_channel, mask=m_channel, other=0.0)
        flow = tl.load(p_flow_entering + o_entering, mask=m_state & (n_segments > 1), other=0.0)
        drate = tl.zeros((Q, C), tl.float32)
        dskip = tl.zeros((Q, C), tl.float32)
        dweight = tl.zeros((BLOCK_R, C), tl.float32)
        # The position, too, is computed again, for the same reason on AMD GPUs.
        i_tile = i_segment * n_tiles + tl.where(is_reverse, 0, n_tiles - 1)
        i_outer, i_inner = i_tile // n_tiles_inner, i_tile % n_tiles_inner
        o_pixel, m_token = tile_tokens(
            i_outer, i_inner, m_sequence, is_reverse, n_outer, n_inner, stride_outer, stride_inner, T, FULL
        )
        low_rank = load_low_rank(p_direction, o_pixel, m_token, 4 * K, R, BLOCK_R)
        for j in range(n_tiles - 1, -1, -1):
            raw = raw_steps(low_rank, weight, bias, T, PRECISION)
            # Only the low-rank steps come a tile ahead: there are no registers for more.
            i_outer, i_inner = next_tile(i_outer, i_inner, n_tiles_inner, tl.where(j > 0, -step, 0))
            o_next, m_next = tile_tokens(
                i_outer, i_inner, m_sequence, is_reverse, n_outer, n_inner, stride_outer, stride_inner, T, FULL
            )
            low_next = load_low_rank(p_direction, o_next, m_next, 4 * K, R, BLOCK_R)
            m_tile = m_token[:, :, None] & m_channel[None, None, :]
            b_x = tl.load(tile_pointers(p_x, o_pixel, o_channel, stride_pixel, V), mask=m_tile, other=0.0)
            b_dy = tl.load(tile_pointers(p_dy, o_pixel, o_channel, stride_dy_pixel, V), mask=m_tile, other=0.0)
            o_B = o_pixel * (4 * K) + R
            b_B = tl.load(p_direction[None, :] + o_B, mask=m_token, other=0.0)
            b_C = tl.load(p_direction[None, :] + o_B + N, mask=m_token, other=0.0)
            state = tl.load(p_border + j * (N * D), mask=m_state, other=0.0)
            v = softplus_log2(raw)
            if not FULL:
                v = tl.where(m_token[:, :, None], v, 0.0)
            u, dy = b_x.to(tl.float32), b_dy.to(tl.float32)
            dskip += tl.sum(u * dy, axis=0)
            # Loaded before anything is stored, because no load may overtake a store.
            p_out = tile_pointers(p_sum, o_pixel, o_channel, D, V)
            dx = tl.load(p_out, mask=m_tile & (i > 0), other=0.0)
            uv = u * v
            dinput = tl.zeros((T, Q, C), tl.float32)
            ddecay = tl.zeros((T, Q, C), tl.float32)
            for n in range(N):
                if N > 1:
                    rate = tl.load(p_rate + (i_direction * N + n) * D + o_channel, mask=m_channel, other=0.0)
                    is_start = j == n_tiles - 1
                    flow = tl.load(p_flow + n * D, mask=m_state & (not is_start), other=0.0)
                    m_entering = m_state & is_start & (n_segments > 1)
                    flow += tl.load(p_flow_entering + o_entering + n * D, mask=m_entering, other=0.0)
                    state = tl.load(p_border + j * (N * D) + n * D, mask=m_state, other=0.0)
                    b_B = tl.load(p_direction[None, :] + o_B + n, mask=m_token, other=0.0)
                    b_C = tl.load(p_direction[None, :] + o_B + N + n, mask=m_token, other=0.0)
                decay = tl.exp2(v * -rate[None, None, :])
                states, inflow = scan_states_and_inflow(decay, uv * (b_B * LN_2)[:, :, None], state)
                dC = tl.sum(states * dy, axis=2)
                grad, flow = scan_adjoint(decay, dy * b_C[:, :, None], flow)
                dB = tl.sum(grad * uv, axis=2) * LN_2
                dinput += grad * b_B[:, :, None]
                inflow *= grad
                ddecay += inflow * rate[None, None, :]
                sum_rate = tl.sum(inflow * v, axis=0)
                tl.store(p_ddirection[None, :] + o_B + n, dB, mask=m_token)
                tl.store(p_ddirection[None, :] + o_B + N + n, dC, mask=m_token)
                if N > 1:
                    tl.store(p_flow + n * D, flow, mask=m_state)
                    p_sum_rate = p_drate + (i_direction * N + n) * D
                    sum_rate = tl.load(p_sum_rate, mask=m_state & (not is_start), other=0.0) - sum_rate * rate * LN_2
                    tl.store(p_sum_rate, sum_rate, mask=m_state)
                else:
                    drate += sum_rate
            dx = dx + skip[None, None, :] * dy
            dx = dx + (v * LN_2) * dinput
            if i == 3:
                tl.store(tile_pointers(p_dx, o_pixel, o_channel, D, V), dx, mask=m_tile)
            else:
                tl.store(p_out, dx, mask=m_tile)
            # The derivative of softplus is its input over its output, both as exponents: nothing cancels.
            draw = (u * dinput - ddecay) * tl.exp2(raw - v)
            if not FULL:
                draw = tl.where(m_token[:, :, None], draw, 0.0)
            draw = tl.reshape(draw, (T * Q, C))
            dlow_rank = tl.dot(draw, tl.trans(weight), input_precision=PRECISION) * LN_2
            p_dlow = p_ddirection[None, :, None] + o_pixel[:, :, None] * (4 * K) + o_rank[None, None, :]
            m_dlow = m_token[:, :, None] & m_rank[None, None, :]
            tl.store(p_dlow, tl.reshape(dlow_rank, (T, Q, BLOCK_R)), mask=m_dlow)
            # A column of ones beside the low-rank steps makes the gradient of the bias.
            low_rank = tl.where((o_rank == R)[None, :], 1.0, low_rank)
            dweight += tl.dot(tl.trans(low_rank), draw, input_precision=PRECISION)
            o_pixel, m_token, low_rank = o_next, m_next, low_next
        if N == 1:
            tl.store(p_drate + i_direction * D, -drate * rate * LN_2, mask=m_state)
        i_partial = tl.cast(i_group, tl.int64) * 4 + i_direction
        tl.store(p_dskip + i_partial * D + o_channel, tl.sum(dskip, axis=0), mask=m_channel)
        o_dweight = (i_partial * (R + 1) + o_rank[:, None]) * D + o_channel[None, :]
        tl.store(p_dweight + o_dweight, dweight, mask=(o_rank <= R)[:, None] & m_channel[None, :])


def selective_scan_2d_backward(
    dy, entering, x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D
) -> tuple[Tensor, ...]:
    """Gradients of x (channel-last memory) and of the five parameters, in their dtypes.

    ``entering`` is what the forward pass returned beside its result.
    """
    launch = Launch(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    dy = pixel_uniform(dy)
    batch, channels, rank, state = launch.batch, launch.channels, launch.rank, launch.state
    flows = launch.entering_states(dy, adjoint=True)

    def buffer(*shape, dtype=torch.float32):
        return x.new_empty(*shape, dtype=dtype)

    border = buffer(launch.sequences, launch.tiles, state, channels)
    dx = buffer(batch, launch.height, launch.width, channels, dtype=x.dtype)
    total = dx if x.dtype == torch.float32 else torch.empty_like(dx, dtype=torch.float32)
    dprojected = buffer(launch.blocks, *launch.projected.shape)
    dweight = buffer(launch.groups, 4, rank + 1, channels)
    drate = buffer(launch.sequences, 4, state, channels)
    dskip = buffer(launch.groups, 4, channels)
    tensors = (launch.x, dy, launch.projected, *launch.step_weights, launch.rates, launch.skip, entering, flows)
    outputs = (border, launch.walk_states(), total, dx, dprojected, dweight, drate, dskip)
    for first, count in launch.pairs:
        selective_scan_2d_bwd_kernel[launch.grid](
            *tensors,
            *outputs,
            *launch.sizes,
            first,
            count,
            launch.x.stride(0),
            dy.stride(0),
            pixel_stride(launch.x),
            pixel_stride(dy),
            **launch.constants,
        )
    dprojected = (dprojected[0] if launch.blocks == 1 else dprojected.sum(0)).to(x.dtype)
    weight = x_proj_weight.flatten(0, 1).to(x.dtype)
    dx = torch.addmm(dx.flatten(0, 2), dprojected, weight).view(dx.shape).permute(0, 3, 1, 2)
    dx_weight = dprojected.T @ launch.flat
    dweight = dweight.sum(0)
    gradients = (
        dx_weight.view(x_proj_weight.shape),
        dweight[:, :rank].transpose(1, 2),
        dweight[:, rank],
        drate.sum(0).transpose(1, 2).reshape(A_log.shape),
        dskip.sum(0).view(D.shape),
    )
    parameters = (x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    return dx, *(g.to(p.dtype).contiguous() for g, p in zip(gradients, parameters, strict=True))
