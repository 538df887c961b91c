"""Vim's inner block, Triton forward pass: what needs no recurrence, of both directions from one read of x.

These are the convolutions with SiLU, the projections to low-rank step sizes and to the weights B and C of every token,
and the step sizes. What the scans read for every token and channel is left in the dtype of the inputs.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..triton_scan import softplus
from .op import TILE
from .triton_launch import register_limit
from .triton_tile import block_channels, load_step_weight, load_vector, silu, split_dot

# Tokens and warps of a program, channels of a step of it (fewer for float32), and registers of a thread.
_TOKENS = 16
_WARPS = 4
_CHANNELS = 64
_REGISTERS = 128


@triton.jit
def _load_projection(
    p_weight, rank, o_channel, m_channel, channels, N: tl.constexpr, R: tl.constexpr, P: tl.constexpr, dtype
):
    """What a block of channels gives to the low-rank values (C, R) and to B and C (C, P), operands of products."""
    o_rank = tl.arange(0, R)
    o_weight = tl.arange(0, P)
    m_rank = (o_rank < rank)[None, :] & m_channel[:, None]
    m_weight = (o_weight < 2 * N)[None, :] & m_channel[:, None]
    p_rank = p_weight + o_rank[None, :] * channels + o_channel[:, None]
    p_weights = p_weight + (rank + o_weight)[None, :] * channels + o_channel[:, None]
    to_rank = tl.load(p_rank, mask=m_rank, other=0.0)
    return to_rank.to(dtype), tl.load(p_weights, mask=m_weight, other=0.0).to(dtype)


@triton.jit
def _store_projections(p_projected, o_row, m_row, low_rank, weights, RANK: tl.constexpr, P: tl.constexpr):
    """Rows [low rank | B | C]."""
    o_rank = tl.arange(0, low_rank.shape[1])
    o_weight = tl.arange(0, weights.shape[1])
    p_rows = p_projected + o_row.to(tl.int64)[:, None] * (RANK + P)
    tl.store(p_rows + o_rank[None, :], low_rank, mask=m_row[:, None] & (o_rank < RANK)[None, :])
    tl.store(p_rows + RANK + o_weight[None, :], weights, mask=m_row[:, None] & (o_weight < P)[None, :])


@triton.jit
def _load_steps(p_weight, p_bias, rank, o_channel, m_channel, R: tl.constexpr, dtype):
    """Weight (R, C) and bias (C) of the step sizes of a block of channels."""
    return load_step_weight(p_weight, o_channel, m_channel, rank, R, dtype), load_vector(p_bias, o_channel, m_channel)


@triton.jit
def _step_sizes(low_rank, weight, bias, PRECISION: tl.constexpr):
    """Step sizes (T, C) in the dtype of ``weight``."""
    bias = tl.broadcast_to(bias[None, :], (low_rank.shape[0], weight.shape[1]))
    raw = split_dot(low_rank, weight, bias, PRECISION)
    return softplus(raw, SHORT=weight.dtype != tl.float32).to(weight.dtype)


@triton.jit
def bidirectional_selective_scan_fwd_kernel_taps(
    p_taps, p_weight, p_bias, p_weight_b, p_bias_b, channels, W: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Weights of the convolutions with adjacent channels, and their biases (K, W + 1, E): vectors for later loads."""
    o_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_channel = o_channel < channels
    if tl.program_id(1) == 1:
        p_weight = p_weight_b
        p_bias = p_bias_b
        p_taps += (W + 1) * channels
    for k in tl.static_range(W):
        tap = load_vector(p_weight + k, o_channel * W, m_channel)
        tl.store(p_taps + k * channels + o_channel, tap, mask=m_channel)
    tl.store(p_taps + W * channels + o_channel, load_vector(p_bias, o_channel, m_channel), mask=m_channel)


@triton.jit(do_not_specialize=["length", "n_all", "n_rows"])
def bidirectional_selective_scan_fwd_kernel_project(
    p_x,
    p_projected,
    p_u,
    p_dt,
    p_taps,
    p_x_weight,
    p_dt_weight,
    p_dt_bias,
    p_x_weight_b,
    p_dt_weight_b,
    p_dt_bias_b,
    length,
    channels: tl.constexpr,
    rank,
    n_all,
    n_rows,
    stride_batch,
    stride_token: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    RANK: tl.constexpr,
    TWO: tl.constexpr,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Inputs and step sizes of the scans (K, B, padded L, E), and projections (K, B, padded L, row) in scan order.

    A program owns ``BLOCK_T`` of all rows of all sequences.
    """
    o_row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_row = o_row < n_rows
    i_batch = o_row // (n_all * T)
    o_token = o_row % (n_all * T)
    m_token = m_row & (o_token < length)
    p_rows = p_x + i_batch.to(tl.int64) * stride_batch + o_token.to(tl.int64) * stride_token
    n_values = n_rows.to(tl.int64) * channels
    narrow = p_u.dtype.element_ty
    low_rank = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    weights = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    low_rank_b = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    weights_b = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for i in range(tl.cdiv(channels, BLOCK_C)):
        o_channel, m_channel = block_channels(i, channels, BLOCK_C)
        o_tile = o_row.to(tl.int64)[:, None] * channels + o_channel[None, :]
        m_tile = m_row[:, None] & m_channel[None, :]
        # Stores come last: loads do not move across them.
        to_rank, to_weights = _load_projection(
            p_x_weight, rank, o_channel, m_channel, channels, N, BLOCK_R, BLOCK_P, narrow
        )
        if TWO:
            to_rank_b, to_weights_b = _load_projection(
                p_x_weight_b, rank, o_channel, m_channel, channels, N, BLOCK_R, BLOCK_P, narrow
            )
        p_own = p_taps + o_channel
        p_other = p_own + (W + 1) * channels
        conv = tl.broadcast_to(tl.load(p_own + W * channels, mask=m_channel, other=0.0)[None, :], (BLOCK_T, BLOCK_C))
        conv_b = conv
        if TWO:
            bias_b = tl.load(p_other + W * channels, mask=m_channel, other=0.0)
            conv_b = tl.broadcast_to(bias_b[None, :], (BLOCK_T, BLOCK_C))
        for k in tl.static_range(2 * W - 1 if TWO else W):
            # The token k - (W - 1) after this one meets tap k of the forward convolution and W - 1 taps later, counted
            # from the last, one of the backward convolution; both meet the token itself with their last tap.
            o_tap = o_token + (k - (W - 1))
            m_tap = m_row & (o_tap >= 0) & (o_tap < length)
            p_tile = p_rows[:, None] + ((k - (W - 1)) * stride_token + o_channel[None, :])
            x = tl.load(p_tile, mask=m_tap[:, None] & m_channel[None, :], other=0.0).to(tl.float32)
            if k < W:
                conv += x * tl.load(p_own + k * channels, mask=m_channel, other=0.0)[None, :]
            if TWO and k >= W - 1:
                conv_b += x * tl.load(p_other + (2 * W - 2 - k) * channels, mask=m_channel, other=0.0)[None, :]
        # Padding after the last token projects to zero.
        u = tl.where(m_token[:, None], silu(conv), 0.0)
        low_rank = split_dot(u, to_rank, low_rank, PRECISION)
        weights = split_dot(u, to_weights, weights, PRECISION)
        if TWO:
            u_b = tl.where(m_token[:, None], silu(conv_b), 0.0)
            low_rank_b = split_dot(u_b, to_rank_b, low_rank_b, PRECISION)
            weights_b = split_dot(u_b, to_weights_b, weights_b, PRECISION)
            tl.store(p_u + n_values + o_tile, u_b.to(narrow), mask=m_tile)
        tl.store(p_u + o_tile, u.to(narrow), mask=m_tile)
    _store_projections(p_projected, o_row, m_row, low_rank, weights, RANK, 2 * N)
    if TWO:
        # Scan order: every sequence's rows from the last to the first.
        o_scan = n_rows + (i_batch + 1) * (n_all * T) - 1 - o_token
        _store_projections(p_projected, o_scan, m_row, low_rank_b, weights_b, RANK, 2 * N)
    for i in range(tl.cdiv(channels, BLOCK_C)):
        o_channel, m_channel = block_channels(i, channels, BLOCK_C)
        o_tile = o_row.to(tl.int64)[:, None] * channels + o_channel[None, :]
        m_tile = m_row[:, None] & m_channel[None, :]
        weight, bias = _load_steps(p_dt_weight, p_dt_bias, rank, o_channel, m_channel, BLOCK_R, narrow)
        if TWO:
            weight_b, bias_b = _load_steps(p_dt_weight_b, p_dt_bias_b, rank, o_channel, m_channel, BLOCK_R, narrow)
            tl.store(p_dt + n_values + o_tile, _step_sizes(low_rank_b, weight_b, bias_b, PRECISION), mask=m_tile)
        tl.store(p_dt + o_tile, _step_sizes(low_rank, weight, bias, PRECISION), mask=m_tile)


def project(launch, projected: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and step sizes of the scans (K, B, padded L, E), in the dtype of the inputs.

    Fills ``projected`` (K, B, padded L, row) and ``taps`` (K, W + 1, E), weights and biases of the convolutions.
    """
    sizes = (launch.directions, launch.batch, launch.padded, launch.channels)
    u, dt = (launch.empty(*sizes, dtype=launch.xz.dtype) for _ in range(2))
    convolutions = [p[:2] for p in launch.parameters]
    members = [p[2:5] for p in launch.parameters]
    is_narrow = launch.xz.element_size() == 2
    rows = launch.batch * launch.padded
    block = 128
    bidirectional_selective_scan_fwd_kernel_taps[(triton.cdiv(launch.channels, block), launch.directions)](
        taps, *convolutions[0], *convolutions[-1], launch.channels, W=launch.width, BLOCK_C=block, num_warps=1
    )
    bidirectional_selective_scan_fwd_kernel_project[(triton.cdiv(rows, _TOKENS),)](
        launch.xz,
        projected,
        u,
        dt,
        taps,
        *members[0],
        *members[-1],
        launch.length,
        launch.channels,
        launch.rank,
        launch.tiles,
        rows,
        *launch.xz.stride()[:2],
        N=launch.state,
        W=launch.width,
        RANK=launch.row - 2 * launch.state,
        TWO=launch.directions == 2,
        T=TILE,
        BLOCK_T=_TOKENS,
        BLOCK_C=_CHANNELS if is_narrow else 32,
        BLOCK_R=max(16, triton.next_power_of_2(launch.rank)),
        BLOCK_P=max(16, triton.next_power_of_2(2 * launch.state)),
        PRECISION=launch.precision,
        num_warps=_WARPS,
        num_stages=1,
        # So that four programs fit on a multiprocessor; exact float32 products and many states need the registers.
        **(register_limit(_REGISTERS) if is_narrow and launch.block_rows <= 64 else {}),
    )
    return u, dt
