"""Four-direction selective scan, Triton forward pass.

1. Projections of all directions by one matrix product (``triton_launch.py``).
2. States that enter the segments (``triton_states.py``), unless a segment is a whole sequence.
3. The kernel below walks through each segment in all directions. Rows come first; columns add their results to them, so
   that nothing is added atomically. Sums so far are kept in the dtype of the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_chains import (
    as_chains,
    end_state,
    enter_groups,
    half_offsets,
    product,
    scan_states,
)
from .triton_launch import Launch, pixel_stride
from .triton_tile import (
    LN_2,
    divided,
    load_low_rank,
    load_rate,
    load_skip,
    load_state,
    load_tile,
    only_weights,
    raw_steps,
    softplus_log2,
    step_weights,
    store_tile,
    tile_tokens,
)


@triton.jit(do_not_specialize=["batch", "height", "width", "n_tiles", "n_walk", "n_images", "first", "count"])
def selective_scan_2d_fwd_kernel(
    p_x,
    p_projected,
    p_dt_weight,
    p_dt_bias,
    p_rate,
    p_skip,
    p_state,
    p_entering,
    p_y,
    batch,
    height,
    width,
    n_tiles,
    n_walk,
    n_images,
    first,
    count,
    stride_pixel: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    Q: tl.constexpr,
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    PRECISE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """``count`` directions from the ``first`` on, in the order 0, 2, 1, 3.

    p_y (batch, H, W, D) takes the sum so far; p_state (batch, 4, segments, N, D) has what enters the segments and may
    be overwritten; what enters the tiles goes to p_entering (batch, 4, tiles, N, D).
    """
    C: tl.constexpr = 4 * V
    N_BLOCKS: tl.constexpr = (D + C - 1) // C
    WIDTH: tl.constexpr = 2 if p_dt_weight.dtype.element_ty.primitive_bitwidth == 16 else 1
    i_channel = tl.program_id(0) % N_BLOCKS * C
    n_segments = (n_tiles + n_walk - 1) // n_walk
    i_first_image = tl.program_id(0) // N_BLOCKS // n_segments
    i_segment = tl.program_id(0) // N_BLOCKS - i_first_image * n_segments
    i_first_image *= n_images
    i_first = i_segment * n_walk
    n_now = tl.minimum(n_walk, n_tiles - i_first)
    n_steps = tl.minimum(n_images, batch - i_first_image) * n_now
    inverse = tl.full((), 0xFFFFFFFF, tl.uint32) // n_now.to(tl.uint32)
    o_half = half_offsets(i_channel, C)
    m_half = o_half < D
    skip = load_skip(p_skip, i_channel, D, Q, V)
    for i_slot in range(first, first + count):
        i_direction = i_slot // 2 + i_slot % 2 * 2
        is_column, is_reverse = i_slot >= 2, i_slot % 2 == 1
        weight, bias = step_weights(p_dt_weight, p_dt_bias, i_channel, i_direction, D, R, BLOCK_R, V, PRECISION)
        rate = load_rate(p_rate, i_channel, i_direction, 0, D, N, Q, V)
        p_state_first = p_state + i_segment * (N * D) + o_half
        i_sequence = (i_first_image * 4 + i_direction).to(tl.int64)
        start = tl.load(p_state_first + i_sequence * n_segments * (N * D), mask=m_half & (n_segments > 1), other=0.0)
        state = start
        tl.debug_barrier()  # the sum so far may be read by other threads of this program than wrote it
        for i in range(n_steps):
            i_image, i_step = divided(i, inverse, n_now)
            i_image += i_first_image
            i_sequence = (i_image * 4 + i_direction).to(tl.int64)
            p_state_now = p_state_first + i_sequence * n_segments * (N * D)
            i_tile = i_first + tl.where(is_reverse, n_now - 1 - i_step, i_step)
            o_pixel, m_token = tile_tokens(i_image, i_tile, is_column, is_reverse, height, width, T, Q)
            x = load_tile(p_x, o_pixel, m_token, i_channel, stride_pixel, D, V).to(tl.float32)
            low_rank = load_low_rank(p_projected, o_pixel, i_direction, K, R, BLOCK_R)
            if i_slot == 0:
                y = skip[None, :, :] * x
            else:
                y = load_tile(p_y, o_pixel, m_token, i_channel, D, D, V).to(tl.float32)
            v = softplus_log2(raw_steps(low_rank, weight, bias, WIDTH, PRECISION), PRECISE)
            if N == 1:
                state = tl.where(i_step == 0, start, state)
                b_B, b_C = only_weights(p_projected, low_rank, o_pixel, i_direction, K, R, V, WIDTH, PRECISION)
            p_entering_now = p_entering + (i_sequence * n_tiles + i_tile) * (N * D) + o_half
            if N > 1:  # one state after the other, what it needs loaded one ahead
                p_token = p_projected + (i_direction * K + R) + o_pixel.to(tl.int64) * (4 * K)
                is_known = (n_segments > 1) | (i_step > 0)
                state, rate, B_now, C_now = load_state(
                    p_state_now, p_rate, p_token, i_channel, i_direction, is_known, 0, D, N, Q, V
                )
            for n in tl.range(N, loop_unroll_factor=UNROLL if N > 1 else 1):
                if N > 1:
                    m = tl.minimum(n + 1, N - 1)
                    ahead, rate_ahead, B_ahead, C_ahead = load_state(
                        p_state_now, p_rate, p_token, i_channel, i_direction, is_known, m, D, N, Q, V
                    )
                    b_B, b_C = B_now.to(tl.float32)[:, :, None], C_now.to(tl.float32)[:, :, None]
                tl.store(p_entering_now + n * D, state, mask=m_half)
                decay = tl.exp2(v * -rate[None, :, :])
                value = x * v * (b_B * LN_2)
                entering, state = enter_groups(as_chains(product(decay)), end_state(decay, value), state, False)
                _before, states = scan_states(decay, value, entering)
                y += states * b_C
                if N > 1:
                    tl.store(p_state_now + n * D, state, mask=m_half)
                    state, rate, B_now, C_now = ahead, rate_ahead, B_ahead, C_ahead
            store_tile(p_y, y, o_pixel, m_token, i_channel, D, D, V)


def selective_scan_2d_forward(
    x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, out_dtype
) -> tuple[Tensor, Tensor]:
    """Result (B, D, H, W) in channel-last memory, and the states that enter the tiles, for the backward pass.

    Arguments as :func:`mmvssm_kernels.selective_scan_2d`.
    """
    launch = Launch(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, backward=False)
    state = launch.entering_states(launch.x, adjoint=False)
    y = x.new_empty(launch.batch, launch.height, launch.width, launch.channels, dtype=out_dtype)
    entering = x.new_empty(launch.batch, 4, launch.tiles * launch.state * launch.channels, dtype=torch.float32)
    tensors = (launch.x, launch.projected, *launch.parameters, state, entering, y)
    for first, count in launch.parts:
        selective_scan_2d_fwd_kernel[launch.grid](
            *tensors, *launch.walk, first, count, pixel_stride(launch.x), **launch.constants
        )
    return y.permute(0, 3, 1, 2), entering
