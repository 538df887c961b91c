"""Four-direction selective scan, Triton forward pass.

1. Projections of all directions by one matrix product (``triton_launch.py``).
2. States that enter the segments (``triton_states.py``), unless a segment is a whole sequence.
3. The kernel below walks each segment in both directions of a pair (rows, then columns) and adds the results into its
   own pixels, so that nothing is added atomically; the last one rounds the sum to the dtype of the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import Launch, pixel_stride
from .triton_tile import (
    LN_2,
    direction_geometry,
    load_low_rank,
    load_rate,
    load_states,
    load_tile,
    next_tile,
    raw_steps,
    row,
    scan_states,
    set_row,
    softplus_log2,
    step_weights,
    store_tile,
    tile_tokens,
)


@triton.jit(do_not_specialize=["batch", "height", "width", "n_tiles", "n_segments", "first", "count"])
def selective_scan_2d_fwd_kernel(
    p_x,
    p_projected,
    p_dt_weight,
    p_dt_bias,
    p_rate,
    p_skip,
    p_entering,
    p_sum,
    p_y,
    batch,
    height,
    width,
    n_tiles,
    n_segments,
    first,
    count,
    stride_pixel: tl.constexpr,
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
    """``count`` directions in the order 0, 2, 1, 3 from the ``first`` on, added to p_sum (batch, H, W, D), float32.

    The last of the four goes to p_y.
    """
    K: tl.constexpr = R + 2 * N
    C: tl.constexpr = 4 * V
    N_BLOCKS: tl.constexpr = (D + C - 1) // C
    WIDTH: tl.constexpr = 2 if p_dt_weight.dtype.element_ty.primitive_bitwidth == 16 else 1
    i_channel = tl.program_id(0) % N_BLOCKS * C
    o_channel = i_channel + tl.arange(0, C)
    i_sequence = tl.program_id(0) // N_BLOCKS * Q + tl.arange(0, Q)
    m_sequence = i_sequence < batch * n_segments
    i_sequence = tl.minimum(i_sequence, batch * n_segments - 1)
    m_all = tl.full((T, Q), True, tl.int1)
    i_batch = i_sequence // n_segments
    i_segment = i_sequence % n_segments
    o_image = i_batch * height * width
    m_entering = m_sequence & (n_segments > 1)
    for i in range(first, first + count):
        i_direction = i // 2 + 2 * (i % 2)
        is_reverse = i % 2 == 1
        step = tl.where(is_reverse, -1, 1)
        n_outer, n_inner, n_tiles_inner, stride_outer, stride_inner = direction_geometry(i >= 2, height, width, T)
        weight, bias = step_weights(p_dt_weight, p_dt_bias, i_channel, i_direction, D, R, BLOCK_R, V, PRECISION)
        skip = tl.load(p_skip + i_direction * D + o_channel, mask=o_channel < D, other=0.0).to(tl.float32)
        p_B = p_projected + i_direction * K + R
        o_entering = ((i_batch * 4 + i_direction) * n_segments + i_segment) * N
        i_tile = i_segment * n_tiles + tl.where(is_reverse, n_tiles - 1, 0)
        i_outer, i_inner = i_tile // n_tiles_inner, i_tile % n_tiles_inner
        rate = load_rate(p_rate, m_sequence, i_channel, i_direction, 0, D, N, V)
        state = load_states(p_entering, o_entering, m_entering, i_channel, D, N, V)
        tl.debug_barrier()  # what the walk before stored may be read by other threads of this program
        o_pixel, m_token = tile_tokens(
            o_image, i_outer, i_inner, m_sequence, is_reverse, n_outer, n_inner, stride_outer, stride_inner, T
        )
        low_rank = load_low_rank(p_projected, o_pixel, i_direction, K, R, BLOCK_R)
        x = load_tile(p_x, o_pixel, m_all, i_channel, stride_pixel, D, V)
        for j in range(n_tiles):
            raw = raw_steps(low_rank, m_token, weight, bias, WIDTH, PRECISION)
            y = load_tile(p_sum, o_pixel, m_all & (i > 0), i_channel, D, D, V)
            p_token = p_B + o_pixel.to(tl.int64) * (4 * K)
            o_now, m_now, x_now = o_pixel, m_token, x.to(tl.float32)
            # The next tile's inputs are fetched before this one is computed.
            i_outer, i_inner = next_tile(i_outer, i_inner, n_tiles_inner, tl.where(j + 1 < n_tiles, step, 0))
            o_pixel, m_token = tile_tokens(
                o_image, i_outer, i_inner, m_sequence, is_reverse, n_outer, n_inner, stride_outer, stride_inner, T
            )
            low_rank = load_low_rank(p_projected, o_pixel, i_direction, K, R, BLOCK_R)
            x = load_tile(p_x, o_pixel, m_all, i_channel, stride_pixel, D, V)
            v = softplus_log2(raw, PRECISE)
            y = y + skip[None, None, :] * x_now
            x_now *= v
            for n in tl.static_range(N):
                if N > 1:
                    rate = load_rate(p_rate, m_sequence, i_channel, i_direction, n, D, N, V)
                b_B = tl.load(p_token + n)
                b_C = tl.load(p_token + N + n)
                decay = tl.exp2(v * -rate[None, :, :])
                states, last = scan_states(decay, x_now * (b_B * LN_2)[:, :, None], row(state, n))
                y = y + states * b_C[:, :, None]
                state = set_row(state, last, n)
            if i == 3:
                store_tile(p_y, y, o_now, m_now, i_channel, D, D, V)
            else:
                store_tile(p_sum, y, o_now, m_now, i_channel, D, D, V)


def selective_scan_2d_forward(
    x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, out_dtype
) -> tuple[Tensor, Tensor]:
    """Result (B, D, H, W) in channel-last memory, and the states that enter the segments, for the backward pass.

    Arguments as :func:`mmvssm_kernels.selective_scan_2d`.
    """
    launch = Launch(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, backward=False)
    entering = launch.entering_states(launch.x, adjoint=False)
    y = x.new_empty(launch.batch, launch.height, launch.width, launch.channels, dtype=out_dtype)
    total = y if out_dtype == torch.float32 else torch.empty_like(y, dtype=torch.float32)
    tensors = (launch.x, launch.projected, *launch.parameters, entering)
    arguments = (*tensors, total, y, *launch.sizes)
    for first, count in launch.pairs:
        selective_scan_2d_fwd_kernel[launch.grid](*arguments, first, count, pixel_stride(launch.x), **launch.constants)
    return y.permute(0, 3, 1, 2), entering
