"""Vim's inner block, Triton forward pass: both convolutions with SiLU and both projections from one read of x."""

import triton
import triton.language as tl
from torch import Tensor

from .op import TILE
from .triton_launch import register_limit
from .triton_tile import load_rows, load_vector, silu, split_dot


@triton.jit
def _convolve(p_x, p_weight, p_bias, o_token, length, o_channel, m_channel, stride_token, REVERSE, W: tl.constexpr):
    """Convolution (T, C) in float32 before its SiLU."""
    weighted = tl.zeros((o_token.shape[0], o_channel.shape[0]), tl.float32)
    weighted += load_vector(p_bias, o_channel, m_channel)[None, :]
    for k in tl.static_range(W):
        o_tap = o_token + (W - 1 - k) if REVERSE else o_token - (W - 1 - k)
        x = load_rows(p_x, o_tap, (o_tap >= 0) & (o_tap < length), o_channel, m_channel, stride_token)
        weighted += x * load_vector(p_weight + k, o_channel * W, m_channel)[None, :]
    return weighted


@triton.jit
def _project_direction(
    p_x,
    p_projected,
    p_taps,
    p_conv_weight,
    p_conv_bias,
    p_x_weight,
    length,
    channels,
    rank,
    n_all,
    stride_token,
    N: tl.constexpr,
    W: tl.constexpr,
    RANK: tl.constexpr,
    REVERSE: tl.constexpr,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ROW: tl.constexpr = RANK + 2 * N
    o_token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_token = o_token < length
    o_row = tl.arange(0, BLOCK_P)
    # Column of a row of projections; those between rank and RANK stay zero.
    o_weight = tl.where(o_row < RANK, o_row, o_row - RANK + rank)
    m_row = (o_row < rank) | ((o_row >= RANK) & (o_row < ROW))
    projected = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    writes_taps = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    for i in range(tl.cdiv(channels, BLOCK_C)):
        o_channel = i * BLOCK_C + tl.arange(0, BLOCK_C)
        m_channel = o_channel < channels
        conv = _convolve(
            p_x, p_conv_weight, p_conv_bias, o_token, length, o_channel, m_channel, stride_token, REVERSE, W
        )
        # Padding after the last token projects to zero.
        u = tl.where(m_token[:, None], silu(conv), 0.0)
        weight = tl.load(
            p_x_weight + o_weight[None, :] * channels + o_channel[:, None],
            mask=m_row[None, :] & m_channel[:, None],
            other=0.0,
        )
        if writes_taps:
            for k in tl.static_range(W):
                tap = load_vector(p_conv_weight + k, o_channel * W, m_channel)
                tl.store(p_taps + k * channels + o_channel, tap, mask=m_channel)
            bias = load_vector(p_conv_bias, o_channel, m_channel)
            tl.store(p_taps + W * channels + o_channel, bias, mask=m_channel)
        projected = split_dot(u, weight.to(p_x.dtype.element_ty), projected, PRECISION)
    o_scan = n_all * T - 1 - o_token if REVERSE else o_token
    tl.store(
        p_projected + o_scan[:, None] * ROW + o_row[None, :],
        projected,
        mask=(o_row < ROW)[None, :] & (o_token < n_all * T)[:, None],
    )


@triton.jit(do_not_specialize=["length", "n_all"])
def bidirectional_selective_scan_fwd_kernel_project(
    p_x,
    p_projected,
    p_taps,
    p_conv_weight,
    p_conv_bias,
    p_x_weight,
    p_conv_weight_b,
    p_conv_bias_b,
    p_x_weight_b,
    length,
    channels,
    rank,
    n_all,
    stride_batch,
    stride_token,
    N: tl.constexpr,
    W: tl.constexpr,
    RANK: tl.constexpr,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Projections (K, B, padded L, row) in scan order, and weights and bias of the convolutions (K, W + 1, E)."""
    i_batch = tl.program_id(1).to(tl.int64)
    n_batch = tl.num_programs(1)
    p_x += i_batch * stride_batch
    stride_sequence = n_all * T * (RANK + 2 * N)
    if tl.program_id(2) == 0:
        _project_direction(
            p_x,
            p_projected + i_batch * stride_sequence,
            p_taps,
            p_conv_weight,
            p_conv_bias,
            p_x_weight,
            length,
            channels,
            rank,
            n_all,
            stride_token,
            N,
            W,
            RANK,
            False,
            T,
            BLOCK_T,
            BLOCK_C,
            BLOCK_P,
            PRECISION,
        )
    else:
        _project_direction(
            p_x,
            p_projected + (n_batch + i_batch) * stride_sequence,
            p_taps + (W + 1) * channels,
            p_conv_weight_b,
            p_conv_bias_b,
            p_x_weight_b,
            length,
            channels,
            rank,
            n_all,
            stride_token,
            N,
            W,
            RANK,
            True,
            T,
            BLOCK_T,
            BLOCK_C,
            BLOCK_P,
            PRECISION,
        )


def project(launch, projected: Tensor, taps: Tensor) -> None:
    """Fill ``projected`` (K, B, padded L, row), and ``taps`` (K, W + 1, E): weights and biases of the convolutions."""
    members = [p[:3] for p in launch.parameters]
    is_narrow = launch.xz.element_size() == 2
    block_tokens = 32
    grid = (triton.cdiv(launch.tiles * TILE, block_tokens), launch.batch, launch.directions)
    bidirectional_selective_scan_fwd_kernel_project[grid](
        launch.xz,
        projected,
        taps,
        *members[0],
        *members[-1],
        launch.length,
        launch.channels,
        launch.rank,
        launch.tiles,
        *launch.xz.stride()[:2],
        N=launch.state,
        W=launch.width,
        RANK=launch.row - 2 * launch.state,
        T=TILE,
        BLOCK_T=block_tokens,
        BLOCK_C=64 if is_narrow else 32,
        BLOCK_P=max(16, triton.next_power_of_2(launch.row)),
        PRECISION=launch.precision,
        num_warps=4,
        num_stages=1,
        # So that four programs fit on a multiprocessor; exact float32 products and many states need the registers.
        **(register_limit(128) if is_narrow and launch.block_rows <= 64 else {}),
    )
