"""Vim's inner block, Triton backward pass: through the projections and convolutions, and the sums of partial sums.

A program of the first kernel owns a block of channels and a segment of one sequence. It walks each direction's tiles
from the last to the first: gradient of u from the scan plus that from the projection, back through the SiLU and through
the convolution, whose adjoint needs a few rows of the tile behind. At the end of a segment that tile is computed, too,
so that programs do not wait for each other.
"""

import triton
import triton.language as tl
from torch import Tensor

from .triton_tile import (
    convolve_tile,
    detach_layout,
    earlier_inputs,
    load_inputs,
    load_rows,
    load_tap,
    previous_rows,
    reverse_rows,
    sigmoid,
    tile_tokens,
)


@triton.jit
def _convolve_adjoint(dconv, later, p_weight, o_channel, m_channel, i_row, W: tl.constexpr):
    """Gradient of x (T, C) of a tile from those of the convolution's results, ``later`` of the tile behind it."""
    dx = dconv * load_tap(p_weight, 0, o_channel, m_channel, W)
    # In reversed order the rows behind are previous ones; those of ``later`` come in at the top one by one.
    rows = reverse_rows(dconv)
    for k in tl.static_range(1, W):
        rows = previous_rows(rows, later, i_row)
        later = reverse_rows(previous_rows(reverse_rows(later), later, i_row))
        dx += reverse_rows(rows) * load_tap(p_weight, k, o_channel, m_channel, W)
    return dx


@triton.jit
def _unproject_direction(
    p_x,
    p_dprojected,
    p_du,
    p_dx,
    p_dxz,
    p_conv_weight,
    p_conv_bias,
    p_x_weight,
    p_partial,
    i_segment,
    o_channel,
    m_channel,
    length,
    channels: tl.constexpr,
    rows,
    n_all,
    n_tiles,
    stride_x_token,
    W: tl.constexpr,
    REVERSE: tl.constexpr,
    ADD: tl.constexpr,
    T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One direction; of its partial sums conv_weight (W, E), conv_bias (E) and x_proj_weight (R + 2N, E)."""
    i_row = tl.arange(0, T)
    o_projected = tl.arange(0, BLOCK_P)
    m_projected = o_projected < rows
    m_x_weight = m_projected[:, None] & m_channel[None, :]
    o_x_weight = o_projected[:, None] * channels + o_channel[None, :]
    # Operands of the products have the dtype of xz.
    narrow = p_dxz.dtype.element_ty
    x_weight = tl.load(p_x_weight + o_x_weight, mask=m_x_weight, other=0.0).to(narrow)
    dx_weight = tl.zeros(x_weight.shape, tl.float32)
    dbias = tl.zeros(o_channel.shape, tl.float32)
    # One row for each tap.
    i_tap = tl.arange(0, BLOCK_W)
    dtaps = tl.zeros((BLOCK_W, o_channel.shape[0]), tl.float32)
    n_own = tl.minimum(n_tiles, n_all - i_segment * n_tiles)
    i_first = n_all - i_segment * n_tiles - n_own if REVERSE else i_segment * n_tiles
    i_end = i_first + n_own
    later = tl.zeros((T, o_channel.shape[0]), tl.float32)
    for i in range(tl.where(i_end < n_all, 0, 1), n_own + 1):
        i_tile = i_end - i
        owned = i > 0
        _, o_token = tile_tokens(i_tile, n_all, REVERSE, T)
        m_token = o_token < length
        x = load_inputs(p_x, i_tile, n_all, length, o_channel, m_channel, stride_x_token, REVERSE, T)
        conv = convolve_tile(
            x,
            p_x,
            p_conv_weight,
            p_conv_bias,
            i_tile,
            n_all,
            length,
            o_channel,
            m_channel,
            stride_x_token,
            i_row,
            REVERSE,
            W,
            T,
        )
        slope = sigmoid(conv)
        dprojected = tl.load(
            p_dprojected + o_token[:, None] * rows + o_projected[None, :],
            mask=m_token[:, None] & m_projected[None, :],
            other=0.0,
        ).to(narrow)
        du = load_rows(p_du, o_token, o_channel, m_channel, channels)
        du += detach_layout(tl.dot(dprojected, x_weight, input_precision=PRECISION))
        dconv = tl.where(m_token[:, None], du * slope * (1.0 + conv * (1.0 - slope)), 0.0)
        dx = _convolve_adjoint(dconv, later, p_conv_weight, o_channel, m_channel, i_row, W)
        later = dconv
        if owned:
            o_tile = o_token[:, None] * channels + o_channel[None, :]
            if ADD:
                dx += load_rows(p_dx, o_token, o_channel, m_channel, channels)
            if REVERSE:
                tl.store(p_dx + o_tile, dx, mask=m_channel[None, :])
            else:
                p_tile = p_dxz + o_token[:, None] * (2 * channels) + o_channel[None, :]
                tl.store(p_tile, dx.to(p_dxz.dtype.element_ty), mask=m_token[:, None] & m_channel[None, :])
            dbias += tl.sum(dconv, axis=0)
            for k in tl.static_range(W):
                dtap = tl.sum(dconv * x, axis=0)[None, :]
                dtaps += tl.where((i_tap == W - 1 - k)[:, None], dtap, 0.0)
                if k < W - 1:
                    x = earlier_inputs(
                        x, k, p_x, i_tile, n_all, length, o_channel, m_channel, stride_x_token, i_row, REVERSE, T
                    )
            u = (conv * slope).to(narrow)
            dx_weight = tl.dot(tl.trans(dprojected), u, dx_weight, input_precision=PRECISION)
    p_taps = p_partial + i_tap[:, None] * channels + o_channel[None, :]
    tl.store(p_taps, dtaps, mask=(i_tap < W)[:, None] & m_channel[None, :])
    p_partial += W * channels
    tl.store(p_partial + o_channel, dbias, mask=m_channel)
    tl.store(p_partial + channels + o_x_weight, dx_weight, mask=m_x_weight)


@triton.jit(do_not_specialize=["length", "n_all", "n_tiles", "n_segments", "zero"])
def bidirectional_selective_scan_bwd_kernel_project(
    p_x,
    p_dprojected,
    p_du,
    p_dx,
    p_dxz,
    p_partial,
    p_conv_weight,
    p_conv_bias,
    p_x_weight,
    p_conv_weight_b,
    p_conv_bias_b,
    p_x_weight_b,
    length,
    channels: tl.constexpr,
    rows,
    n_all,
    n_tiles,
    n_segments,
    n_partial,
    o_partial,
    stride_x_batch,
    stride_x_token,
    zero,
    W: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The inputs' half of dxz (B, L, 2E), and the rows from ``o_partial`` on of every program's partial sums."""
    i_segment = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    i_other = tl.num_programs(2) + i_batch
    o_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C) + zero
    m_channel = o_channel < channels
    p_x += i_batch * stride_x_batch
    p_dx += i_batch * n_all * T * channels
    p_dxz += i_batch * length * 2 * channels
    p_partial += ((i_batch * n_segments + i_segment) * K * n_partial + o_partial) * channels
    if K == 2:
        _unproject_direction(
            p_x,
            p_dprojected + i_other * n_all * T * rows,
            p_du + i_other * n_all * T * channels,
            p_dx,
            p_dxz,
            p_conv_weight_b,
            p_conv_bias_b,
            p_x_weight_b,
            p_partial + n_partial * channels,
            i_segment,
            o_channel,
            m_channel,
            length,
            channels,
            rows,
            n_all,
            n_tiles,
            stride_x_token,
            W,
            True,
            False,
            T,
            BLOCK_P,
            BLOCK_W,
            PRECISION,
        )
        tl.debug_barrier()  # dx stored above is read below, perhaps by other threads
    _unproject_direction(
        p_x,
        p_dprojected + i_batch * n_all * T * rows,
        p_du + i_batch * n_all * T * channels,
        p_dx,
        p_dxz,
        p_conv_weight,
        p_conv_bias,
        p_x_weight,
        p_partial,
        i_segment,
        o_channel,
        m_channel,
        length,
        channels,
        rows,
        n_all,
        n_tiles,
        stride_x_token,
        W,
        False,
        K == 2,
        T,
        BLOCK_P,
        BLOCK_W,
        PRECISION,
    )


@triton.jit(do_not_specialize=["n_programs"])
def bidirectional_selective_scan_bwd_kernel_finish(
    p_partial,
    p_gradient,
    n_programs,
    channels,
    rank,
    rows,
    n_partial,
    N: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum of the partial sums (P, K, n_partial, E), each row at its place in the parameters' flat gradients."""
    i_row = tl.program_id(1)
    i_direction = tl.program_id(2)
    o_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_channel = o_channel < channels
    p_partial += (i_direction * n_partial + i_row) * channels + o_channel
    stride = tl.num_programs(2).to(tl.int64) * n_partial * channels
    total = tl.zeros((BLOCK_C,), tl.float32)
    for i in range(n_programs):
        total += tl.load(p_partial + i * stride, mask=m_channel, other=0.0)
    # Rows of partial sums: A_log (N), dt_proj_weight (R), dt_proj_bias, D, conv_weight (W), conv_bias,
    # x_proj_weight (R + 2N). Gradients, as in ScanParameters: conv_weight (E, W), conv_bias (E), x_proj_weight
    # (R + 2N, E), dt_proj_weight (E, R), dt_proj_bias (E), A_log (E, N), D (E).
    i_taps = N + rank + 2
    o_dt_weight = (W + 1 + rows) * channels
    o_A = o_dt_weight + (rank + 1) * channels
    if i_row < N:
        o_gradient = o_A + o_channel * N + i_row
    elif i_row < N + rank:
        o_gradient = o_dt_weight + o_channel * rank + i_row - N
    elif i_row == N + rank:
        o_gradient = o_dt_weight + rank * channels + o_channel
    elif i_row == N + rank + 1:
        o_gradient = o_A + N * channels + o_channel
    elif i_row < i_taps + W:
        o_gradient = o_channel * W + i_row - i_taps
    else:
        o_gradient = (i_row - i_taps) * channels + o_channel
    tl.store(p_gradient + i_direction * n_partial * channels + o_gradient, total, mask=m_channel)


def project_backward(launch, dprojected: Tensor, du: Tensor, dxz: Tensor, partial: Tensor) -> None:
    """Fill the inputs' half of ``dxz`` and the remaining rows of ``partial``."""
    members = [[p[i] for i in (0, 1, 2)] for p in launch.parameters]
    bidirectional_selective_scan_bwd_kernel_project[launch.grid](
        launch.xz,
        dprojected,
        du,
        launch.empty(launch.batch, launch.padded if launch.directions == 2 else 0, launch.channels),
        dxz,
        partial,
        *members[0],
        *members[-1],
        launch.length,
        launch.channels,
        launch.rows,
        launch.tiles,
        launch.tiles_per_segment,
        launch.segments,
        launch.partial_rows,
        launch.state + launch.rank + 2,
        *launch.xz.stride()[:2],
        0,
        W=launch.width,
        K=launch.directions,
        T=launch.constants["T"],
        BLOCK_C=launch.constants["BLOCK_C"],
        BLOCK_P=launch.block_rows,
        BLOCK_W=triton.next_power_of_2(launch.width),
        PRECISION=launch.precision,
        # A warp holds 64 rows of the projection's weight and of its gradient in registers.
        num_warps=max(1, launch.block_rows // 64),
        num_stages=1,
    )


def finish(launch, partial: Tensor) -> Tensor:
    """Gradients of all parameters, one after the other in their own layouts."""
    gradient = launch.empty(launch.directions * launch.partial_rows * launch.channels)
    block_channels = 128
    grid = (triton.cdiv(launch.channels, block_channels), launch.partial_rows, launch.directions)
    bidirectional_selective_scan_bwd_kernel_finish[grid](
        partial,
        gradient,
        partial.shape[0],
        launch.channels,
        launch.rank,
        launch.rows,
        launch.partial_rows,
        N=launch.state,
        W=launch.width,
        BLOCK_C=block_channels,
        num_warps=4,
    )
    return gradient
