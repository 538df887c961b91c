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
    dlow_rank_of,
    load_low_rank,
    load_rate,
    load_rows,
    load_states,
    load_tile,
    next_tile,
    raw_steps,
    round_tf32,
    row,
    scan_adjoint,
    scan_states,
    scan_states_and_inflow,
    set_row,
    softplus_log2,
    step_weights,
    step_weights_back,
    store_low_rank,
    store_states,
    store_tile,
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
    p_sum,
    p_dx,
    p_dprojected,
    p_dparameters,
    batch,
    height,
    width,
    n_tiles,
    n_segments,
    first,
    count,
    stride_pixel: tl.constexpr,
    stride_dy_pixel: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
    Q: tl.constexpr,
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Gradients from ``count`` directions in the order 0, 2, 1, 3 from the ``first`` on.

    p_sum (batch, H, W, D) float32 adds up the gradient of x, whose last direction goes to p_dx; p_dprojected is
    (channel blocks, batch, H, W, 4, R + 2N); p_dparameters (programs, 4, R + 2 + N, D) has rows of the weights and the
    bias of step sizes, of D and of A_log. p_border (sequences, tiles, N, D) is working memory.
    """
    K: tl.constexpr = R + 2 * N
    C: tl.constexpr = 4 * V
    N_BLOCKS: tl.constexpr = (D + C - 1) // C
    WIDTH: tl.constexpr = 2 if p_dt_weight.dtype.element_ty.primitive_bitwidth == 16 else 1
    WIDTH_BACK: tl.constexpr = 2 if p_x.dtype.element_ty.primitive_bitwidth == 16 else 1
    i_block = tl.program_id(0) % N_BLOCKS
    i_group = tl.program_id(0) // N_BLOCKS
    i_channel = i_block * C
    o_channel = i_channel + tl.arange(0, C)
    m_channel = o_channel < D
    i_sequence = i_group * Q + tl.arange(0, Q)
    m_sequence = i_sequence < batch * n_segments
    i_sequence = tl.minimum(i_sequence, batch * n_segments - 1)
    m_all = tl.full((T, Q), True, tl.int1)
    i_batch = i_sequence // n_segments
    i_segment = i_sequence % n_segments
    o_image = i_batch * height * width
    m_entering = m_sequence & (n_segments > 1)
    o_rank = tl.arange(0, BLOCK_R)
    o_border = i_sequence * n_tiles * N
    p_dprojected += tl.cast(i_block, tl.int64) * batch * height * width * (4 * K)
    p_dparameters += tl.cast(i_group, tl.int64) * (4 * (R + 2 + N) * D)
    for i in range(first, first + count):
        i_direction = i // 2 + 2 * (i % 2)
        is_reverse = i % 2 == 1
        step = tl.where(is_reverse, -1, 1)
        n_outer, n_inner, n_tiles_inner, stride_outer, stride_inner = direction_geometry(i >= 2, height, width, T)
        p_B = p_projected + i_direction * K + R
        p_dB = p_dprojected + i_direction * K + R
        o_entering = ((i_batch * 4 + i_direction) * n_segments + i_segment) * N
        i_tile = i_segment * n_tiles + tl.where(is_reverse, n_tiles - 1, 0)
        i_outer, i_inner = i_tile // n_tiles_inner, i_tile % n_tiles_inner

        # Along the direction: the state that enters each tile.
        weight, bias = step_weights(p_dt_weight, p_dt_bias, i_channel, i_direction, D, R, BLOCK_R, V, PRECISION)
        state = load_states(p_entering, o_entering, m_entering, i_channel, D, N, V)
        store_states(p_border, state, o_border, m_sequence, i_channel, D, N, V)
        rate = load_rate(p_rate, m_sequence, i_channel, i_direction, 0, D, N, V)
        o_pixel, m_token = tile_tokens(
            o_image, i_outer, i_inner, m_sequence, is_reverse, n_outer, n_inner, stride_outer, stride_inner, T
        )
        low_rank = load_low_rank(p_projected, o_pixel, i_direction, K, R, BLOCK_R)
        x = load_tile(p_x, o_pixel, m_all, i_channel, stride_pixel, D, V)
        for j in range(n_tiles - 1):
            raw = raw_steps(low_rank, m_token, weight, bias, WIDTH, PRECISION)
            p_token = p_B + o_pixel.to(tl.int64) * (4 * K)
            m_now, x_now = m_token, x.to(tl.float32)
            # The next tile's inputs are fetched before this one is computed.
            i_outer, i_inner = next_tile(i_outer, i_inner, n_tiles_inner, step)
            o_pixel, m_token = tile_tokens(
                o_image, i_outer, i_inner, m_sequence, is_reverse, n_outer, n_inner, stride_outer, stride_inner, T
            )
            low_rank = load_low_rank(p_projected, o_pixel, i_direction, K, R, BLOCK_R)
            x = load_tile(p_x, o_pixel, m_all, i_channel, stride_pixel, D, V)
            v = softplus_log2(raw, PRECISE)
            x_now *= v
            for n in tl.static_range(N):
                if N > 1:
                    rate = load_rate(p_rate, m_sequence, i_channel, i_direction, n, D, N, V)
                b_B = tl.load(p_token + n)
                decay = tl.exp2(v * -rate[None, :, :])
                _, last = scan_states(decay, x_now * (b_B * LN_2)[:, :, None], row(state, n))
                state = set_row(state, last, n)
            store_states(p_border, state, o_border + (j + 1) * N, m_sequence, i_channel, D, N, V)
        tl.debug_barrier()  # states and sums may be read by other threads of this program than wrote them

        # Against the direction: the gradients of each tile. Loaded again, because Triton 3.7 fails to compile when
        # values derived from one load serve two loops.
        weight, bias = step_weights(p_dt_weight, p_dt_bias, i_channel, i_direction, D, R, BLOCK_R, V, PRECISION)
        weight_back = step_weights_back(p_dt_weight, i_channel, i_direction, D, R, BLOCK_R, V, WIDTH_BACK, PRECISION)
        skip = tl.load(p_skip + i_direction * D + o_channel, mask=m_channel, other=0.0).to(tl.float32)
        rate = load_rate(p_rate, m_sequence, i_channel, i_direction, 0, D, N, V)
        flow = load_states(p_flow_entering, o_entering, m_entering, i_channel, D, N, V)
        drate = tl.zeros((triton.next_power_of_2(N), Q, C), tl.float32)
        dskip = tl.zeros((Q, C), tl.float32)
        dweight = tl.zeros((BLOCK_R, C), tl.float32)
        # The position, too, is computed again, for the same reason on AMD GPUs.
        i_tile = i_segment * n_tiles + tl.where(is_reverse, 0, n_tiles - 1)
        i_outer, i_inner = i_tile // n_tiles_inner, i_tile % n_tiles_inner
        o_pixel, m_token = tile_tokens(
            o_image, i_outer, i_inner, m_sequence, is_reverse, n_outer, n_inner, stride_outer, stride_inner, T
        )
        low_rank = load_low_rank(p_projected, o_pixel, i_direction, K, R, BLOCK_R)
        b_x = load_tile(p_x, o_pixel, m_all, i_channel, stride_pixel, D, V)
        b_dy = load_tile(p_dy, o_pixel, m_token, i_channel, stride_dy_pixel, D, V)
        for j in range(n_tiles - 1, -1, -1):
            raw = raw_steps(low_rank, m_token, weight, bias, WIDTH, PRECISION)
            low_now, o_now, m_now = low_rank, o_pixel, m_token
            u, dy = b_x.to(tl.float32), b_dy.to(tl.float32)
            p_token = p_B + o_now.to(tl.int64) * (4 * K)
            dx = load_tile(p_sum, o_now, m_all & (i > 0), i_channel, D, D, V)
            i_outer, i_inner = next_tile(i_outer, i_inner, n_tiles_inner, tl.where(j > 0, -step, 0))
            o_pixel, m_token = tile_tokens(
                o_image, i_outer, i_inner, m_sequence, is_reverse, n_outer, n_inner, stride_outer, stride_inner, T
            )
            low_rank = load_low_rank(p_projected, o_pixel, i_direction, K, R, BLOCK_R)
            b_x = load_tile(p_x, o_pixel, m_all, i_channel, stride_pixel, D, V)
            b_dy = load_tile(p_dy, o_pixel, m_token, i_channel, stride_dy_pixel, D, V)
            v = softplus_log2(raw, PRECISE)
            dskip += tl.sum(u * dy, axis=0)
            uv = u * v
            dinput = tl.zeros((T, Q, C), tl.float32)
            ddecay = tl.zeros((T, Q, C), tl.float32)
            for n in tl.static_range(N):
                if N > 1:
                    rate = load_rate(p_rate, m_sequence, i_channel, i_direction, n, D, N, V)
                arriving = load_rows(p_border, o_border + j * N + n, m_sequence, i_channel, D, D, V)
                b_B = tl.load(p_token + n)
                b_C = tl.load(p_token + N + n, mask=m_now, other=0.0)
                decay = tl.exp2(v * -rate[None, :, :])
                states, inflow = scan_states_and_inflow(decay, uv * (b_B * LN_2)[:, :, None], arriving)
                dC = tl.sum(states * dy, axis=2)
                grad, leaving = scan_adjoint(decay, dy * b_C[:, :, None], row(flow, n))
                flow = set_row(flow, leaving, n)
                dB = tl.sum(grad * uv, axis=2) * LN_2
                dinput += grad * b_B[:, :, None]
                inflow *= grad
                ddecay += inflow * rate[None, :, :]
                drate = set_row(drate, row(drate, n) + tl.sum(inflow * v, axis=0), n)
                p_dtoken = p_dB + o_now.to(tl.int64) * (4 * K) + n
                tl.store(p_dtoken, dB, mask=m_now)
                tl.store(p_dtoken + N, dC, mask=m_now)
            dx = dx + skip[None, None, :] * dy
            dx = dx + (v * LN_2) * dinput
            if i == 3:
                store_tile(p_dx, dx, o_now, m_now, i_channel, D, D, V)
            else:
                store_tile(p_sum, dx, o_now, m_now, i_channel, D, D, V)
            # The derivative of softplus is its input over its output, both as exponents: nothing cancels.
            draw = round_tf32((u * dinput - ddecay) * tl.exp2(raw - v), PRECISION)
            dlow_rank = dlow_rank_of(draw, weight_back, WIDTH_BACK, PRECISION)
            store_low_rank(p_dB - R, dlow_rank, o_now, m_now, 4 * K, R)
            # A column of ones beside the low-rank steps makes the gradient of the bias.
            low_now = tl.where((o_rank == R)[None, None, :], 1.0, low_now)
            low_now = round_tf32(tl.reshape(low_now, (T * Q, BLOCK_R)), PRECISION)
            dweight += tl.dot(tl.trans(low_now), tl.reshape(draw, (T * Q, C)), input_precision=PRECISION)
        p_dparameter = p_dparameters + i_direction * ((R + 2 + N) * D) + o_channel
        tl.store(p_dparameter[None, :] + o_rank[:, None] * D, dweight, mask=(o_rank <= R)[:, None] & m_channel[None, :])
        tl.store(p_dparameter + (R + 1) * D, tl.sum(dskip, axis=0), mask=m_channel)
        for n in tl.static_range(N):
            if N > 1:
                rate = load_rate(p_rate, m_sequence, i_channel, i_direction, n, D, N, V)
            sums = tl.sum(row(drate, n) * rate, axis=0) * -LN_2
            tl.store(p_dparameter + (R + 2 + n) * D, sums, mask=m_channel)


@triton.jit(do_not_specialize=["n_groups"])
def selective_scan_2d_sum_kernel(
    p_partial,
    p_dt_weight,
    p_dt_bias,
    p_A_log,
    p_skip,
    n_groups,
    D: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
):
    """Sums of partial gradients (programs, 4, R + 2 + N, D) of the parameters, to the tensors of the parameters."""
    ROWS: tl.constexpr = R + 2 + N
    i_direction = tl.program_id(0) // ROWS
    i_row = tl.program_id(0) % ROWS
    o_channel = tl.program_id(1) * C + tl.arange(0, C)
    m_channel = o_channel < D
    i_group = tl.arange(0, G)
    p_partial += tl.program_id(0) * D + o_channel[None, :]
    total = tl.zeros((G, C), tl.float32)
    for i_first in range(0, n_groups, G):
        i_now = (i_first + i_group).to(tl.int64)[:, None]
        mask = (i_now < n_groups) & m_channel[None, :]
        total += tl.load(p_partial + i_now * (4 * ROWS * D), mask=mask, other=0.0)
    sums = tl.sum(total, axis=0)
    o_parameter = i_direction * D + o_channel
    tl.store(p_dt_weight + o_parameter * R + i_row, sums, mask=m_channel & (i_row < R))
    tl.store(p_dt_bias + o_parameter, sums, mask=m_channel & (i_row == R))
    tl.store(p_skip + o_parameter, sums, mask=m_channel & (i_row == R + 1))
    tl.store(p_A_log + o_parameter * N + (i_row - R - 2), sums, mask=m_channel & (i_row >= R + 2))


def selective_scan_2d_backward(
    dy, entering, x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D
) -> tuple[Tensor, ...]:
    """Gradients of x (channel-last memory) and of the five parameters, in their dtypes.

    ``entering`` is what the forward pass returned beside its result.
    """
    launch = Launch(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, backward=True)
    dy = pixel_uniform(dy)
    batch, channels, rank, state = launch.batch, launch.channels, launch.rank, launch.state
    flows = launch.entering_states(dy, adjoint=True)

    def buffer(*shape, dtype=torch.float32):
        return x.new_empty(*shape, dtype=dtype)

    border = buffer(launch.sequences, launch.tiles, state, channels)
    dx = buffer(batch, launch.height, launch.width, channels, dtype=x.dtype)
    total = dx if x.dtype == torch.float32 else torch.empty_like(dx, dtype=torch.float32)
    dprojected = buffer(launch.blocks, *launch.projected.shape, dtype=x.dtype)
    dparameters = buffer(launch.groups, 4, rank + 2 + state, channels)
    tensors = (launch.x, dy, launch.projected, *launch.parameters, entering, flows)
    outputs = (border, total, dx, dprojected, dparameters)
    for first, count in launch.pairs:
        selective_scan_2d_bwd_kernel[launch.grid](
            *tensors,
            *outputs,
            *launch.sizes,
            first,
            count,
            pixel_stride(launch.x),
            pixel_stride(dy),
            **launch.constants,
        )
    dprojected = dprojected[0] if launch.blocks == 1 else dprojected.sum(0)
    dx.flatten(0, 2).addmm_(dprojected, x_proj_weight.flatten(0, 1).to(x.dtype))
    dx_weight = (dprojected.T @ launch.flat).view(x_proj_weight.shape)
    parameters = (dt_proj_weight, dt_proj_bias, A_log, D)
    gradients = tuple(torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters)
    grid = (4 * (rank + 2 + state), triton.cdiv(channels, 32))
    selective_scan_2d_sum_kernel[grid](
        dparameters, *gradients, launch.groups, channels, rank, state, G=128, C=32, num_warps=4
    )
    return dx.permute(0, 3, 1, 2), dx_weight.to(x_proj_weight.dtype), *gradients
