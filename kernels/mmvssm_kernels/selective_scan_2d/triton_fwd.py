"""Four-direction selective scan, Triton forward pass.

1. Projections of all directions by one matrix product (``triton_launch.py``).
2. States that enter the segments (``triton_states.py``), unless a segment is a whole sequence.
3. The kernel below scans each segment in both directions of a path. Rows come first; columns add their results to them,
   so that nothing is added atomically, and round the sum to the dtype of the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import Launch, pixel_stride
from .triton_tile import (
    LN_2,
    end_state,
    enter_groups,
    load_low_rank,
    load_rate,
    load_rows,
    load_tile,
    raw_steps,
    scan_states,
    segment_tokens,
    softplus_log2,
    step_weights,
    store_tile,
)


@triton.jit(do_not_specialize=["batch", "height", "width", "n_segments", "n_loops", "first", "count"])
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
    n_segments,
    n_loops,
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
):
    """Both directions of ``count`` paths, rows and columns, from the ``first`` on.

    p_sum (batch, H, W, D), float32, takes the sum along rows, p_y that of all.
    """
    C: tl.constexpr = 4 * V
    N_BLOCKS: tl.constexpr = (D + C - 1) // C
    WIDTH: tl.constexpr = 2 if p_dt_weight.dtype.element_ty.primitive_bitwidth == 16 else 1
    i_channel = tl.program_id(0) % N_BLOCKS * C
    i_first = tl.program_id(0) // N_BLOCKS * n_loops
    for path in range(first, first + count):
        weight_0, bias_0 = step_weights(p_dt_weight, p_dt_bias, i_channel, path, D, R, BLOCK_R, V, PRECISION)
        weight_1, bias_1 = step_weights(p_dt_weight, p_dt_bias, i_channel, path + 2, D, R, BLOCK_R, V, PRECISION)
        skip = load_rows(p_skip, path, i_channel, D, 1, V) + load_rows(p_skip, path + 2, i_channel, D, 1, V)
        tl.debug_barrier()  # the sum along rows may be read by other threads of this program than wrote it
        for i_sequence in range(i_first, tl.minimum(i_first + n_loops, batch * n_segments)):
            o_pixel, m_token = segment_tokens(i_sequence, n_segments, path == 1, height, width, T, Q)
            x = load_tile(p_x, o_pixel, m_token, i_channel, stride_pixel, D, V).to(tl.float32)
            y = load_tile(p_sum, o_pixel, m_token & (path == 1), i_channel, D, D, V)
            y += skip.to(tl.float32)[None, :, :] * x
            for d in tl.static_range(2):
                i_direction, i_slot = path + 2 * d, 2 * path + d
                low_rank = load_low_rank(p_projected, o_pixel, i_slot, K, R, BLOCK_R)
                if d == 0:
                    raw = raw_steps(low_rank, weight_0, bias_0, WIDTH, PRECISION)
                else:
                    raw = raw_steps(low_rank, weight_1, bias_1, WIDTH, PRECISION)
                v = softplus_log2(raw, PRECISE)
                steps = tl.sum(v, axis=0)
                p_token = p_projected + i_slot * K + R + o_pixel.to(tl.int64) * (4 * K)
                i_summary = (i_sequence // n_segments * 4 + i_direction) * n_segments + i_sequence % n_segments
                for n in range(N):
                    rate = load_rate(p_rate, i_channel, i_direction, n, D, N, Q, V)
                    entering = tl.zeros((Q, C), tl.float32)
                    if n_segments > 1:
                        entering = load_rows(p_entering, i_summary * N + n, i_channel, D, Q, V)
                    b_B = tl.load(p_token + n).to(tl.float32)
                    b_C = tl.load(p_token + N + n).to(tl.float32)
                    decay = tl.exp2(v * -rate[None, :, :])
                    value = x * v * (b_B * LN_2)[:, :, None]
                    entering = enter_groups(tl.exp2(steps * -rate), end_state(decay, value, d == 1), entering, d == 1)
                    states, _ = scan_states(decay, value, entering, d == 1)
                    y += states * b_C[:, :, None]
            if path == 1:
                store_tile(p_y, y, o_pixel, m_token, i_channel, D, D, V)
            else:
                store_tile(p_sum, y, o_pixel, m_token, i_channel, D, D, V)


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
    for first, count in launch.paths:
        selective_scan_2d_fwd_kernel[launch.grid](*arguments, first, count, pixel_stride(launch.x), **launch.constants)
    return y.permute(0, 3, 1, 2), entering.flatten(2)
