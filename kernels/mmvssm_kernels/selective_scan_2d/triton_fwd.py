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
    load_step_weights,
    next_tile,
    raw_steps,
    scan_states,
    softplus_log2,
    tile_pointers,
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
    p_state,
    p_sum,
    p_y,
    batch,
    height,
    width,
    n_tiles,
    n_segments,
    first,
    count,
    stride_batch,
    stride_pixel: tl.constexpr,
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
    """``count`` directions in the order 0, 2, 1, 3 from the ``first`` on, added to p_sum (batch, H, W, D), float32.

    The last of the four goes to p_y. ``p_state`` (sequences, N, D) holds the states between the tiles of a walk; the
    threads that write a state are those that read it.
    """
    K: tl.constexpr = R + 2 * N
    N_BLOCKS: tl.constexpr = (D + C - 1) // C
    o_channel = tl.program_id(0) % N_BLOCKS * C + tl.arange(0, C)
    m_channel = o_channel < D
    i_sequence = tl.program_id(0) // N_BLOCKS * Q + tl.arange(0, Q)
    m_sequence = i_sequence < batch * n_segments
    m_state = m_sequence[:, None] & m_channel[None, :]
    i_batch = (i_sequence // n_segments).to(tl.int64)
    i_segment = i_sequence % n_segments
    p_x += i_batch * stride_batch
    p_sum += i_batch * height * width * D
    p_y += i_batch * height * width * D
    p_state += i_sequence[:, None].to(tl.int64) * (N * D) + o_channel[None, :]
    for i in range(first, first + count):
        i_direction = i // 2 + 2 * (i % 2)
        is_reverse = i % 2 == 1
        n_outer, n_inner, n_tiles_inner, stride_outer, stride_inner = direction_geometry(i >= 2, height, width, T)
        weight, bias = load_step_weights(p_dt_weight, p_dt_bias, o_channel, m_channel, i_direction, D, R, BLOCK_R)
        skip = tl.load(p_skip + i_direction * D + o_channel, mask=m_channel, other=0.0).to(tl.float32)
        p_direction = p_projected + i_batch * height * width * (4 * K) + i_direction * K
        o_entering = ((i_batch * 4 + i_direction) * n_segments + i_segment)[:, None] * (N * D) + o_channel[None, :]
        i_tile = i_segment * n_tiles + tl.where(is_reverse, n_tiles - 1, 0)
        i_outer, i_inner = i_tile // n_tiles_inner, i_tile % n_tiles_inner
        # One state stays in registers; several are kept in memory between tiles.
        rate = tl.load(p_rate + i_direction * (N * D) + o_channel, mask=m_channel, other=0.0)
        state = tl.load(p_entering + o_entering, mask=m_state & (n_segments > 1), other=0.0)
        tl.debug_barrier()  # what the walk before stored may be read by other threads of this program
        step = tl.where(is_reverse, -1, 1)
        o_pixel, m_token = tile_tokens(
            i_outer, i_inner, m_sequence, is_reverse, n_outer, n_inner, stride_outer, stride_inner, T, FULL
        )
        low_rank = load_low_rank(p_direction, o_pixel, m_token, 4 * K, R, BLOCK_R)
        m_tile = m_token[:, :, None] & m_channel[None, None, :]
        x = tl.load(tile_pointers(p_x, o_pixel, o_channel, stride_pixel, V), mask=m_tile, other=0.0)
        for j in range(n_tiles):
            raw = raw_steps(low_rank, weight, bias, T, PRECISION)
            p_out = tile_pointers(p_sum, o_pixel, o_channel, D, V)
            y = tl.load(p_out, mask=m_tile & (i > 0), other=0.0)
            p_last = tile_pointers(p_y, o_pixel, o_channel, D, V)
            p_B = p_direction[None, :] + o_pixel * (4 * K) + R
            b_B = tl.load(p_B, mask=m_token, other=0.0)
            b_C = tl.load(p_B + N, mask=m_token, other=0.0)
            # The next tile's inputs are fetched before this one is computed. They come after the matrix product, since
            # Triton gives a conflict of layouts to the later of the two, and scans want the layout of the loads.
            i_outer, i_inner = next_tile(i_outer, i_inner, n_tiles_inner, tl.where(j + 1 < n_tiles, step, 0))
            o_pixel, m_next = tile_tokens(
                i_outer, i_inner, m_sequence, is_reverse, n_outer, n_inner, stride_outer, stride_inner, T, FULL
            )
            low_rank = load_low_rank(p_direction, o_pixel, m_next, 4 * K, R, BLOCK_R)
            m_tile_next = m_next[:, :, None] & m_channel[None, None, :]
            x_next = tl.load(tile_pointers(p_x, o_pixel, o_channel, stride_pixel, V), mask=m_tile_next, other=0.0)
            v = softplus_log2(raw)
            if not FULL:
                v = tl.where(m_token[:, :, None], v, 0.0)
            x = x.to(tl.float32)
            y = y + skip[None, None, :] * x
            x *= v
            for n in range(N):
                if N > 1:
                    rate = tl.load(p_rate + (i_direction * N + n) * D + o_channel, mask=m_channel, other=0.0)
                    state = tl.load(p_state + n * D, mask=m_state & (j > 0), other=0.0)
                    m_entering = m_state & (j == 0) & (n_segments > 1)
                    state += tl.load(p_entering + o_entering + n * D, mask=m_entering, other=0.0)
                    b_B = tl.load(p_B + n, mask=m_token, other=0.0)
                    b_C = tl.load(p_B + N + n, mask=m_token, other=0.0)
                decay = tl.exp2(v * -rate[None, None, :])
                states, state = scan_states(decay, x * (b_B * LN_2)[:, :, None], state)
                y = y + states * b_C[:, :, None]
                if N > 1:
                    tl.store(p_state + n * D, state, mask=m_state)
            if i == 3:
                tl.store(p_last, y, mask=m_tile)
            else:
                tl.store(p_out, y, mask=m_tile)
            m_token, m_tile, x = m_next, m_tile_next, x_next


def selective_scan_2d_forward(
    x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, out_dtype
) -> tuple[Tensor, Tensor]:
    """Result (B, D, H, W) in channel-last memory, and the states that enter the segments, for the backward pass.

    Arguments as :func:`mmvssm_kernels.selective_scan_2d`.
    """
    launch = Launch(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    entering = launch.entering_states(launch.x, adjoint=False)
    y = x.new_empty(launch.batch, launch.height, launch.width, launch.channels, dtype=out_dtype)
    total = y if out_dtype == torch.float32 else torch.empty_like(y, dtype=torch.float32)
    tensors = (launch.x, launch.projected, *launch.step_weights, launch.rates, launch.skip, entering)
    arguments = (*tensors, launch.walk_states(), total, y, *launch.sizes)
    # With one state the kernel fits into 168 registers, which leaves room for twelve warps instead of nine.
    limits = {"maxnreg": 168} if launch.state == 1 and x.is_cuda and torch.version.hip is None else {}
    for first, count in launch.pairs:
        selective_scan_2d_fwd_kernel[launch.grid](
            *arguments, first, count, launch.x.stride(0), pixel_stride(launch.x), **launch.constants, **limits
        )
    return y.permute(0, 3, 1, 2), entering
