"""Vim's inner block, Triton forward pass: both convolutions with SiLU and both projections from one read of x."""

import triton
import triton.language as tl
from torch import Tensor

from ..triton_scan import LOG2_E
from .op import TILE
from .triton_launch import register_limit
from .triton_tile import silu


@triton.jit
def convolve(p_x, p_weight, p_bias, o_token, length, o_channel, m_channel, stride_token, REVERSE, W: tl.constexpr):
    """Convolution (T, C) in float32 before its SiLU."""
    weighted = tl.zeros((o_token.shape[0], o_channel.shape[0]), tl.float32)
    weighted += tl.load(p_bias + o_channel, mask=m_channel, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(W):
        o_tap = o_token + (W - 1 - k) if REVERSE else o_token - (W - 1 - k)
        m_tap = (o_tap >= 0) & (o_tap < length)
        tap = tl.load(p_weight + o_channel * W + k, mask=m_channel, other=0.0).to(tl.float32)
        x = tl.load(
            p_x + o_tap[:, None] * stride_token + o_channel[None, :],
            mask=m_tap[:, None] & m_channel[None, :],
            other=0.0,
        )
        weighted += x.to(tl.float32) * tap[None, :]
    return weighted


@triton.jit
def _project_direction(
    p_x,
    p_u,
    p_projected,
    p_rate,
    p_conv_weight,
    p_conv_bias,
    p_x_weight,
    p_A_log,
    writes_rates,
    length,
    channels,
    rows,
    n_all,
    stride_token,
    N: tl.constexpr,
    W: tl.constexpr,
    REVERSE: tl.constexpr,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_token = o_token < length
    o_row = tl.arange(0, BLOCK_P)
    m_row = o_row < rows
    projected = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for i in range(tl.cdiv(channels, BLOCK_C)):
        o_channel = i * BLOCK_C + tl.arange(0, BLOCK_C)
        m_channel = o_channel < channels
        conv = convolve(
            p_x,
            p_conv_weight,
            p_conv_bias,
            o_token,
            length,
            o_channel,
            m_channel,
            stride_token,
            REVERSE,
            W,
        )
        m_tile = m_token[:, None] & m_channel[None, :]
        m_padded = (o_token < n_all * T)[:, None] & m_channel[None, :]
        # Padding after the last token is zero and projects to zero.
        u = tl.where(m_tile, silu(conv), 0.0).to(p_u.dtype.element_ty)
        tl.store(p_u + o_token[:, None] * channels + o_channel[None, :], u, mask=m_padded)
        weight = tl.load(
            p_x_weight + o_row[None, :] * channels + o_channel[:, None],
            mask=m_row[None, :] & m_channel[:, None],
            other=0.0,
        )
        projected = tl.dot(u, weight.to(u.dtype), projected, input_precision=PRECISION)
        if writes_rates:
            o_state = tl.arange(0, BLOCK_N)
            m_rate = (o_state < N)[:, None] & m_channel[None, :]
            A_log = tl.load(p_A_log + o_channel[None, :] * N + o_state[:, None], mask=m_rate, other=0.0)
            rate = -tl.exp2(A_log.to(tl.float32) * LOG2_E) * LOG2_E
            tl.store(p_rate + o_state[:, None] * channels + o_channel[None, :], rate, mask=m_rate)
    o_scan = n_all * T - 1 - o_token if REVERSE else o_token
    tl.store(
        p_projected + o_row[None, :] * (n_all * T) + o_scan[:, None],
        projected,
        mask=m_row[None, :] & (o_token < n_all * T)[:, None],
    )


@triton.jit(do_not_specialize=["length", "n_all"])
def bidirectional_selective_scan_fwd_kernel_project(
    p_x,
    p_u,
    p_projected,
    p_rate,
    p_conv_weight,
    p_conv_bias,
    p_x_weight,
    p_A_log,
    p_conv_weight_b,
    p_conv_bias_b,
    p_x_weight_b,
    p_A_log_b,
    length,
    channels,
    rows,
    n_all,
    stride_batch,
    stride_token,
    N: tl.constexpr,
    W: tl.constexpr,
    TWO: tl.constexpr,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Convolved inputs u (K, B, padded L, E), projections (K, B, R + 2N, padded L) in scan order, rates A log2(e)."""
    i_batch = tl.program_id(1).to(tl.int64)
    i_other = tl.num_programs(1) + i_batch
    writes_rates = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    p_x += i_batch * stride_batch
    _project_direction(
        p_x,
        p_u + i_batch * n_all * T * channels,
        p_projected + i_batch * rows * n_all * T,
        p_rate,
        p_conv_weight,
        p_conv_bias,
        p_x_weight,
        p_A_log,
        writes_rates,
        length,
        channels,
        rows,
        n_all,
        stride_token,
        N,
        W,
        False,
        T,
        BLOCK_T,
        BLOCK_C,
        BLOCK_P,
        BLOCK_N,
        PRECISION,
    )
    if TWO:
        _project_direction(
            p_x,
            p_u + i_other * n_all * T * channels,
            p_projected + i_other * rows * n_all * T,
            p_rate + N * channels,
            p_conv_weight_b,
            p_conv_bias_b,
            p_x_weight_b,
            p_A_log_b,
            writes_rates,
            length,
            channels,
            rows,
            n_all,
            stride_token,
            N,
            W,
            True,
            T,
            BLOCK_T,
            BLOCK_C,
            BLOCK_P,
            BLOCK_N,
            PRECISION,
        )


def project(launch, projected: Tensor, rates: Tensor) -> Tensor:
    """Convolved inputs u (K, B, padded L, E) in the dtype of xz; fills ``projected`` and ``rates``."""
    u = launch.empty(launch.directions, launch.batch, launch.padded, launch.channels, dtype=launch.xz.dtype)
    members = [[p[i] for i in (0, 1, 2, 5)] for p in launch.parameters]
    block_tokens = 32
    grid = (triton.cdiv(launch.tiles * TILE, block_tokens), launch.batch)
    bidirectional_selective_scan_fwd_kernel_project[grid](
        launch.xz,
        u,
        projected,
        rates,
        *members[0],
        *members[-1],
        launch.length,
        launch.channels,
        launch.rows,
        launch.tiles,
        *launch.xz.stride()[:2],
        N=launch.state,
        W=launch.width,
        TWO=launch.directions == 2,
        T=TILE,
        BLOCK_T=block_tokens,
        BLOCK_C=64 if u.element_size() == 2 else 32,
        BLOCK_P=launch.block_rows,
        BLOCK_N=triton.next_power_of_2(launch.state),
        PRECISION=launch.precision,
        num_warps=4,
        num_stages=1,
        # So that four programs fit on a multiprocessor; exact float32 products and many states need the registers.
        **(register_limit(128) if u.element_size() == 2 and launch.block_rows <= 64 else {}),
    )
    return u
