"""Four-direction selective scan, Triton backward pass.

1. Projections as in the forward pass, which left the states that enter the tiles.
2. What enters the segments in the adjoint scans, which run against the directions (``triton_states.py``), unless a
   segment is a whole sequence.
3. The first kernel below walks through each segment against each direction; every tile is scanned along the direction
   and back, all of it in registers, and leaves all gradients. Those of x and of the projections go to the program's own
   pixels, those of x on top of those of the directions before; those of the parameters are partial sums per program.
   Nothing is added atomically.
4. The second kernel adds what channel blocks and programs left apart.
5. Matrix products carry the gradients of the projections to x and to the projection weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv
from ..triton_scan import rounded
from .triton_chains import (
    as_chains,
    end_flow,
    end_state,
    enter_groups,
    half_offsets,
    product,
    scan_adjoint,
    scan_states,
)
from .triton_launch import Launch, in_pairs, pixel_stride, pixel_uniform
from .triton_tile import (
    LN_2,
    as_factor,
    channel_sums,
    divided,
    dlow_rank_of,
    load_low_rank,
    load_rate,
    load_skip,
    load_state,
    load_tile,
    only_weights,
    raw_steps,
    softplus_log2,
    step_weights,
    step_weights_back,
    store_low_rank,
    store_tile,
    tile_tokens,
)


@triton.jit(do_not_specialize=["batch", "height", "width", "n_tiles", "n_walk", "n_images", "first", "count"])
def selective_scan_2d_bwd_kernel(
    p_x,
    p_dy,
    p_projected,
    p_dt_weight,
    p_dt_bias,
    p_rate,
    p_skip,
    p_entering,
    p_flow,
    p_dx,
    p_dprojected,
    p_dparameters,
    batch,
    height,
    width,
    n_tiles,
    n_walk,
    n_images,
    first,
    count,
    stride_pixel: tl.constexpr,
    stride_dy_pixel: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    Q: tl.constexpr,
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    PRECISE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Gradients from ``count`` directions from the ``first`` on, in the order 0, 2, 1, 3.

    p_flow (batch, 4, segments, N, D) has what enters the segments in the adjoint scan and may be overwritten. p_dx
    (batch, H, W, D) takes the gradient of x so far. p_dprojected (channel blocks, batch, H, W, 4, M), with directions
    in that order unless one launch does all, takes R + 2N gradients, and zeros behind them if they fit in one tile.
    p_dparameters (programs, 4, R + 2 + N, D) has rows of the weights and the bias of step sizes, of D (in that of
    direction 0, for all) and of A_log.
    """
    C: tl.constexpr = 4 * V
    N_BLOCKS: tl.constexpr = (D + C - 1) // C
    OPERAND: tl.constexpr = p_dt_weight.dtype.element_ty
    WIDTH: tl.constexpr = 2 if OPERAND.primitive_bitwidth == 16 else 1
    # The gradients of B and C are stored with those of low-rank step sizes if there is place for them in a tile.
    IN_ROWS: tl.constexpr = N == 1 and R + 2 <= BLOCK_R
    i_block = tl.program_id(0) % N_BLOCKS
    i_group = tl.program_id(0) // N_BLOCKS
    i_channel = i_block * C
    o_channel = i_channel + tl.arange(0, C)
    m_channel = o_channel < D
    n_segments = (n_tiles + n_walk - 1) // n_walk
    i_first_image = i_group // n_segments
    i_segment = i_group - i_first_image * n_segments
    i_first_image *= n_images
    i_first = i_segment * n_walk
    n_now = tl.minimum(n_walk, n_tiles - i_first)
    n_steps = tl.minimum(n_images, batch - i_first_image) * n_now
    inverse = tl.full((), 0xFFFFFFFF, tl.uint32) // n_now.to(tl.uint32)
    o_half = half_offsets(i_channel, C)
    m_half = o_half < D
    o_rank = tl.arange(0, BLOCK_R)
    m_rank = (o_rank < R)[:, None] & m_channel[None, :]
    p_dprojected += tl.cast(i_block, tl.int64) * batch * height * width * (4 * M)
    p_dparameters += tl.cast(i_group, tl.int64) * (4 * (R + 2 + N) * D)
    dskip = tl.zeros((Q, C), tl.float32)
    skip = load_skip(p_skip, i_channel, D, Q, V)
    for i_slot in range(first, first + count):
        i_direction = i_slot // 2 + i_slot % 2 * 2
        is_column, is_reverse = i_slot >= 2, i_slot % 2 == 1
        i_place = tl.where(count == 4, i_direction, i_slot)  # what a launch writes lies side by side
        weight, bias = step_weights(p_dt_weight, p_dt_bias, i_channel, i_direction, D, R, BLOCK_R, V, PRECISION)
        weight_back = step_weights_back(p_dt_weight, i_channel, i_direction, D, R, BLOCK_R, V, WIDTH, PRECISION)
        rate = load_rate(p_rate, i_channel, i_direction, 0, D, N, Q, V)
        p_flow_first = p_flow + i_segment * (N * D) + o_half
        i_sequence = (i_first_image * 4 + i_direction).to(tl.int64)
        start = tl.load(p_flow_first + i_sequence * n_segments * (N * D), mask=m_half & (n_segments > 1), other=0.0)
        flow = start
        dweight = tl.zeros((BLOCK_R, C), tl.float32)
        dbias = tl.zeros((Q, C), tl.float32)
        drate = tl.zeros((Q, C), tl.float32)
        p_parameter = p_dparameters + i_direction * ((R + 2 + N) * D) + o_channel
        tl.debug_barrier()  # the sum so far may be read by other threads of this program than wrote it
        for i in range(n_steps):
            i_image, i_step = divided(i, inverse, n_now)
            i_image += i_first_image
            i_sequence = (i_image * 4 + i_direction).to(tl.int64)
            p_flow_now = p_flow_first + i_sequence * n_segments * (N * D)
            i_tile = i_first + tl.where(is_reverse, i_step, n_now - 1 - i_step)
            o_pixel, m_token = tile_tokens(i_image, i_tile, is_column, is_reverse, height, width, T, Q)
            low_rank = load_low_rank(p_projected, o_pixel, i_direction, K, R, BLOCK_R)
            u = load_tile(p_x, o_pixel, m_token, i_channel, stride_pixel, D, V).to(tl.float32)
            dy = load_tile(p_dy, o_pixel, m_token, i_channel, stride_dy_pixel, D, V).to(tl.float32)
            raw = raw_steps(low_rank, weight, bias, WIDTH, PRECISION)
            v = softplus_log2(raw, PRECISE)
            p_dtoken = p_dprojected + i_place * M + R + o_pixel.to(tl.int64)[:, :, None] * (4 * M)
            p_dtoken = tl.broadcast_to(p_dtoken, (T, Q, 4))
            if N == 1:
                flow = tl.where(i_step == 0, start, flow)
                b_B, b_C = only_weights(p_projected, low_rank, o_pixel, i_direction, K, R, V, WIDTH, PRECISION)
            p_entering_now = p_entering + (i_sequence * n_tiles + i_tile) * (N * D) + o_half
            dinput = tl.zeros((T, Q, C), tl.float32)
            ddecay = tl.zeros((T, Q, C), tl.float32)
            dB, dC = tl.zeros((T, Q, 4), tl.float32), tl.zeros((T, Q, 4), tl.float32)
            m_lane = m_token[:, :, None] & (tl.arange(0, 4) == 0)[None, None, :]
            entering = tl.load(p_entering_now, mask=m_half, other=0.0)
            if N > 1:  # one state after the other, what it needs loaded one ahead
                p_token = p_projected + (i_direction * K + R) + o_pixel.to(tl.int64) * (4 * K)
                is_known = (n_segments > 1) | (i_step > 0)
                flow, rate, B_now, C_now = load_state(
                    p_flow_now, p_rate, p_token, i_channel, i_direction, is_known, 0, D, N, Q, V
                )
            for n in tl.range(N, loop_unroll_factor=UNROLL if N > 1 else 1):
                if N > 1:
                    m = tl.minimum(n + 1, N - 1)
                    ahead, rate_ahead, B_ahead, C_ahead = load_state(
                        p_flow_now, p_rate, p_token, i_channel, i_direction, is_known, m, D, N, Q, V
                    )
                    entering_ahead = tl.load(p_entering_now + m * D, mask=m_half, other=0.0)
                    b_B, b_C = B_now.to(tl.float32)[:, :, None], C_now.to(tl.float32)[:, :, None]
                decay = tl.exp2(v * -rate[None, :, :])
                total = as_chains(product(decay))
                value = u * v * (b_B * LN_2)
                groups, _leaving = enter_groups(total, end_state(decay, value), entering, False)
                before, states = scan_states(decay, value, groups)
                terms_C = states * dy
                value = dy * b_C
                groups, flow = enter_groups(total, end_flow(decay, value), flow, True)
                grad, flows = scan_adjoint(decay, value, groups)
                dB, dC = channel_sums(grad * (u * v), terms_C, OPERAND, PRECISION)
                dinput += grad * b_B
                flows *= before
                ddecay += flows * rate[None, :, :]
                drate_now = tl.sum(flows * v, axis=0)
                if N == 1:
                    drate += drate_now
                else:
                    tl.store(p_flow_now + n * D, flow, mask=m_half)
                    p_drate = p_parameter + (R + 2 + n) * D
                    sums = tl.sum(rounded(drate_now * rate), axis=0) * -LN_2
                    sums += tl.load(p_drate, mask=m_channel & (i > 0), other=0.0)
                    tl.store(p_drate, sums, mask=m_channel)
                if not IN_ROWS:
                    tl.store(p_dtoken + n, dB * LN_2, mask=m_lane)
                    tl.store(p_dtoken + N + n, dC, mask=m_lane)
                if N > 1:
                    entering, flow, rate, B_now, C_now = entering_ahead, ahead, rate_ahead, B_ahead, C_ahead
            # Loaded again, from the cache, as keeping them would take registers.
            low_rank = load_low_rank(p_projected, o_pixel, i_direction, K, R, BLOCK_R)
            if i_slot == 0:
                dx = skip[None, :, :] * dy
                dskip += tl.sum(u * dy, axis=0)
            else:
                dx = load_tile(p_dx, o_pixel, m_token, i_channel, D, D, V).to(tl.float32)
            # The derivative of softplus is its input over its output, both as exponents: nothing cancels.
            draw = (u * dinput - ddecay) * tl.exp2(raw - v)
            dbias += tl.sum(draw, axis=0)
            draw = as_factor(draw, OPERAND, PRECISION)
            dlow_rank = dlow_rank_of(draw, weight_back, WIDTH, PRECISION)
            if IN_ROWS:
                o_column = tl.reshape(tl.arange(0, BLOCK_R), (1, 1, 4, BLOCK_R // 4))
                dlow_rank = tl.reshape(dlow_rank, (T, Q, 4, BLOCK_R // 4))
                dlow_rank = tl.where(o_column == R, (dB * LN_2)[:, :, :, None], dlow_rank)
                dlow_rank = tl.where(o_column == R + 1, dC[:, :, :, None], dlow_rank)
                dlow_rank = tl.reshape(dlow_rank, (T, Q, BLOCK_R))
            low_rank = tl.trans(as_factor(tl.reshape(low_rank, (T * Q, BLOCK_R)), OPERAND, PRECISION))
            dweight = tl.dot(low_rank, tl.reshape(draw, (T * Q, C)), dweight, input_precision=PRECISION)
            dx += (v * LN_2) * dinput
            store_low_rank(p_dprojected + i_place * M, dlow_rank, o_pixel, m_token, 4 * M, M if IN_ROWS else R)
            store_tile(p_dx, dx, o_pixel, m_token, i_channel, D, D, V)
        tl.store(p_parameter[None, :] + o_rank[:, None] * D, dweight, mask=m_rank)
        tl.store(p_parameter + R * D, tl.sum(dbias, axis=0), mask=m_channel)
        if N == 1:
            tl.store(p_parameter + (R + 2) * D, tl.sum(rounded(drate * rate), axis=0) * -LN_2, mask=m_channel)
        if i_slot == 0:
            tl.store(p_parameter + (R + 1) * D, tl.sum(dskip, axis=0), mask=m_channel)


@triton.jit(do_not_specialize=["n_elements", "n_groups"])
def selective_scan_2d_sum_kernel(
    p_dparameters,
    p_dprojected_blocks,
    p_dt_weight,
    p_dt_bias,
    p_A_log,
    p_skip,
    p_dprojected,
    n_groups,
    n_elements,
    D: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What programs left apart: gradients of parameters in the first programs, of projections in the others.

    The partial gradients (groups, 4, R + 2 + N, D) of the parameters go to the tensors of the parameters, those
    of the projections (channel blocks, ``n_elements``) are added over the channel blocks.
    """
    ROWS: tl.constexpr = R + 2 + N
    N_BLOCKS: tl.constexpr = (D + C - 1) // C
    i_program = tl.program_id(0)
    if i_program < 4 * ROWS * N_BLOCKS:
        i_direction = i_program // N_BLOCKS // ROWS
        i_row = i_program // N_BLOCKS % ROWS
        # Every direction sees the same tokens, so the gradient of its skip is the same, too.
        i_source = tl.where(i_row == R + 1, 0, i_direction) * ROWS + i_row
        o_channel = i_program % N_BLOCKS * C + tl.arange(0, C)
        m_channel = o_channel < D
        i_group = tl.arange(0, G)
        p_rows = p_dparameters + i_source * D + o_channel[None, :]
        partial = tl.zeros((G, C), tl.float32)
        for i_first in range(0, n_groups, G):
            i_now = (i_first + i_group).to(tl.int64)[:, None]
            mask = (i_now < n_groups) & m_channel[None, :]
            partial += tl.load(p_rows + i_now * (4 * ROWS * D), mask=mask, other=0.0)
        sums = tl.sum(partial, axis=0)
        o_parameter = i_direction * D + o_channel
        tl.store(p_dt_weight + o_parameter * R + i_row, sums, mask=m_channel & (i_row < R))
        tl.store(p_dt_bias + o_parameter, sums, mask=m_channel & (i_row == R))
        tl.store(p_skip + o_parameter, sums, mask=m_channel & (i_row == R + 1))
        tl.store(p_A_log + o_parameter * N + (i_row - R - 2), sums, mask=m_channel & (i_row >= R + 2))
    else:
        o_element = (i_program - 4 * ROWS * N_BLOCKS).to(tl.int64) * E + tl.arange(0, E)
        m_element = o_element < n_elements
        total = tl.zeros((E,), tl.float32)
        for i in range((D + BLOCK - 1) // BLOCK):
            total += tl.load(p_dprojected_blocks + i * n_elements.to(tl.int64) + o_element, mask=m_element, other=0.0)
        tl.store(p_dprojected + o_element, total, mask=m_element)


def selective_scan_2d_backward(
    dy, entering, x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D
) -> tuple[Tensor, ...]:
    """Gradients of x (channel-last memory) and of the five parameters, in their dtypes.

    ``entering`` is what the forward pass returned beside its result.
    """
    launch = Launch(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, backward=True)
    groups = launch.groups
    dy = pixel_uniform(dy)
    batch, channels, rank, state = launch.batch, launch.channels, launch.rank, launch.state
    flows = launch.entering_states(dy, adjoint=True)

    def buffer(*shape, dtype=torch.float32):
        return x.new_empty(*shape, dtype=dtype)

    dx = buffer(batch, launch.height, launch.width, channels, dtype=x.dtype)
    # Rows are as wide as those of the projections if the kernel fills them, and can then be stored in vectors.
    width = launch.padded if launch.one_tile else rank + 2 * state
    dprojected = buffer(launch.blocks, len(launch.flat), 4 * width, dtype=x.dtype)
    dparameters = buffer(groups, 4, rank + 2 + state, channels)
    tensors = (launch.x, dy, launch.projected, *launch.parameters, entering, flows)
    outputs = (dx, dprojected, dparameters)
    for first, count in launch.parts:
        selective_scan_2d_bwd_kernel[launch.grid](
            *tensors,
            *outputs,
            *launch.walk,
            first,
            count,
            pixel_stride(launch.x),
            pixel_stride(dy),
            M=width,
            **launch.constants,
        )
    partial, dprojected = dprojected, torch.empty_like(dprojected[0])
    parameters = (dt_proj_weight, dt_proj_bias, A_log, D)
    gradients = tuple(torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters)
    columns, elements = 32, 2048
    programs = 4 * (rank + 2 + state) * cdiv(channels, columns) + cdiv(dprojected.numel(), elements)
    selective_scan_2d_sum_kernel[(programs,)](
        dparameters,
        partial,
        *gradients,
        dprojected,
        groups,
        dprojected.numel(),
        channels,
        rank,
        state,
        G=128,
        C=columns,
        E=elements,
        BLOCK=launch.block,
        num_warps=8,
    )
    x_proj = launch.x_proj[:, :width]
    dx.flatten(0, 2).addmm_(dprojected, (x_proj if launch.segments == 1 else in_pairs(x_proj)).flatten(0, 1))
    dx_weight = (dprojected.T @ launch.flat).view(4, width, channels)[:, : rank + 2 * state]
    dx_weight = dx_weight if launch.segments == 1 else in_pairs(dx_weight)
    return dx.permute(0, 3, 1, 2), dx_weight.to(x_proj_weight.dtype).contiguous(), *gradients
