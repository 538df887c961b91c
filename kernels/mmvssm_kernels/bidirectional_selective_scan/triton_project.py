"""Vim's inner block, Triton forward pass: what needs no recurrence.

These are the convolutions with SiLU, the projections to low-rank step sizes and to the weights B and C of every token,
and the step sizes. What the scans read for every token and channel is left in the dtype of the inputs.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv
from ..triton_scan import softplus
from .op import TILE
from .triton_launch import register_limit
from .triton_tile import block_channels, load_vector, silu, split_dot

# Tokens and warps of a program, channels of a step of it, and registers of a thread. A warp has 16 tokens of its own:
# warps that share tokens load the same operands, and the way out of the first-level cache is narrow.
_TOKENS = 32
_WARPS = 2
_CHANNELS = 32
_REGISTERS = 128


@triton.jit
def _load_operand(p_rows, n_channels, channels: tl.constexpr, C: tl.constexpr, COUNT: tl.constexpr):
    """The next C channels of ``COUNT`` prepared rows (C, COUNT)."""
    o_channel = tl.arange(0, C)[:, None]
    pointers = p_rows + tl.arange(0, COUNT)[None, :] * channels + o_channel
    return tl.load(pointers, mask=(o_channel < n_channels) | (channels % C == 0), other=0.0)


@triton.jit
def _store_projections(
    p_weights, p_projected, o_row, m_row, low_rank, weights,
    N: tl.constexpr, RANK: tl.constexpr, S: tl.constexpr, NR: tl.constexpr,
):  # fmt: skip
    """B and C of every row as the scans read them and, for the backward pass, the rows [low rank | B | C]."""
    o_weight = tl.arange(0, weights.shape[1])
    # NR states of four tokens are neighbours: who loads those of the first token has the others in the cache.
    o_group = o_row.to(tl.int64)[:, None] // 4 * (8 * S) + o_row[:, None] % 4 * NR
    p_group = p_weights + o_group + (o_weight // NR * (4 * NR) + o_weight % NR)[None, :]
    tl.store(p_group, weights, mask=m_row[:, None] & (o_weight < 2 * S)[None, :])
    if p_projected is not None:
        o_rank = tl.arange(0, low_rank.shape[1])
        p_rows = p_projected + o_row.to(tl.int64)[:, None] * (RANK + 2 * N)
        tl.store(p_rows + o_rank[None, :], low_rank, mask=m_row[:, None] & (o_rank < RANK)[None, :])
        m_weight = (o_weight < 2 * S) & (o_weight % S < N)
        p_rows += (RANK + o_weight // S * N + o_weight % S)[None, :]
        tl.store(p_rows, weights, mask=m_row[:, None] & m_weight[None, :])


@triton.jit
def _step_sizes(low_rank, weight, bias, PRECISION: tl.constexpr):
    """Step sizes (T, C) in the dtype of ``weight``."""
    bias = tl.broadcast_to(bias[None, :], (low_rank.shape[0], weight.shape[1]))
    raw = split_dot(low_rank, weight, bias, PRECISION)
    return softplus(raw, SHORT=weight.dtype != tl.float32).to(weight.dtype)


@triton.jit
def bidirectional_selective_scan_fwd_kernel_prepare(
    p_taps,
    p_operands,
    p_weight,
    p_bias,
    p_x_weight,
    p_dt_weight,
    p_weight_b,
    p_bias_b,
    p_x_weight_b,
    p_dt_weight_b,
    channels,
    rank,
    N: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Weights with adjacent channels, which are vectors for the loads of the projections.

    Those of the convolutions and their biases (K, W + 1, E) in float32, and in the dtype of the inputs, padded with
    zeros, the rows (K, 2 R + P, E) that give low-rank values (R), B and C (P; S of either) and step sizes (R).
    """
    o_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_channel = o_channel < channels
    if tl.program_id(1) == 1:
        p_weight = p_weight_b
        p_bias = p_bias_b
        p_x_weight = p_x_weight_b
        p_dt_weight = p_dt_weight_b
        p_taps += (W + 1) * channels
        p_operands += (2 * BLOCK_R + BLOCK_P) * channels
    narrow = p_operands.dtype.element_ty
    if tl.program_id(2) == 0:
        for k in tl.static_range(W):
            tap = load_vector(p_weight + k, o_channel * W, m_channel)
            tl.store(p_taps + k * channels + o_channel, tap, mask=m_channel)
        tl.store(p_taps + W * channels + o_channel, load_vector(p_bias, o_channel, m_channel), mask=m_channel)
        o_rank = tl.arange(0, BLOCK_R)[:, None]
        m_rank = (o_rank < rank) & m_channel[None, :]
        p_rank = p_operands + o_rank * channels + o_channel[None, :]
        low_rank = tl.load(p_x_weight + o_rank * channels + o_channel[None, :], mask=m_rank, other=0.0)
        tl.store(p_rank, low_rank.to(narrow), mask=m_channel[None, :])
        step = tl.load(p_dt_weight + o_channel[None, :] * rank + o_rank, mask=m_rank, other=0.0)
        tl.store(p_rank + (BLOCK_R + BLOCK_P) * channels, step.to(narrow), mask=m_channel[None, :])
    else:
        o_weight = tl.arange(0, BLOCK_P)[:, None]
        m_weight = (o_weight < 2 * S) & (o_weight % S < N) & m_channel[None, :]
        o_given = rank + o_weight // S * N + o_weight % S
        weight = tl.load(p_x_weight + o_given * channels + o_channel[None, :], mask=m_weight, other=0.0)
        p_weights = p_operands + (BLOCK_R + o_weight) * channels + o_channel[None, :]
        tl.store(p_weights, weight.to(narrow), mask=m_channel[None, :])


@triton.jit(do_not_specialize=["length", "n_all", "n_rows"])
def bidirectional_selective_scan_fwd_kernel_project(
    p_x,
    p_projected,
    p_weights,
    p_u,
    p_u_b,
    p_dt,
    p_taps,
    p_operands,
    p_dt_bias,
    p_dt_bias_b,
    length,
    channels: tl.constexpr,
    n_all,
    n_rows,
    stride_batch,
    stride_token: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    RANK: tl.constexpr,
    S: tl.constexpr,
    NR: tl.constexpr,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Inputs (B, padded L, E) and step sizes (K, B, padded L, E) of the scans, and projections in scan order.

    A program owns ``BLOCK_T`` of all rows of all sequences, for one direction.
    """
    o_row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_row = o_row < n_rows
    i_batch = o_row // (n_all * T)
    o_token = o_row % (n_all * T)
    m_token = m_row & (o_token < length)
    p_dt += tl.program_id(1) * n_rows.to(tl.int64) * channels
    p_taps += tl.program_id(1) * (W + 1) * channels
    p_operands += tl.program_id(1) * (2 * BLOCK_R + BLOCK_P) * channels
    # The first token that meets a tap, its tap, and the way to the next tap.
    o_first = o_token - (W - 1)
    p_first = p_taps
    next_tap = channels
    o_scan = o_row
    if tl.program_id(1) == 1:
        p_u = p_u_b
        p_dt_bias = p_dt_bias_b
        o_first = o_token
        p_first = p_taps + (W - 1) * channels
        next_tap = -channels
        # Scan order: every sequence's rows from the last to the first.
        o_scan = n_rows + (i_batch + 1) * (n_all * T) - 1 - o_token
    p_rows = p_x + i_batch.to(tl.int64) * stride_batch + o_first.to(tl.int64) * stride_token
    narrow = p_u.dtype.element_ty
    low_rank = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    weights = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for i in range(tl.cdiv(channels, BLOCK_C)):
        o_channel, m_channel = block_channels(i, channels, BLOCK_C)
        o_tile = o_row.to(tl.int64)[:, None] * channels + o_channel[None, :]
        m_tile = m_row[:, None] & m_channel[None, :]
        # Stores come last: loads do not move across them.
        p_rank = p_operands + i * BLOCK_C
        n_channels = channels - i * BLOCK_C
        to_rank = _load_operand(p_rank, n_channels, channels, BLOCK_C, BLOCK_R)
        to_weights = _load_operand(p_rank + BLOCK_R * channels, n_channels, channels, BLOCK_C, BLOCK_P)
        bias = tl.load(p_taps + W * channels + o_channel, mask=m_channel, other=0.0)
        conv = tl.broadcast_to(bias[None, :], (BLOCK_T, BLOCK_C))
        for k in tl.static_range(W):
            m_tap = m_row & (o_first + k >= 0) & (o_first + k < length)
            p_tile = p_rows[:, None] + (k * stride_token + o_channel[None, :])
            x = tl.load(p_tile, mask=m_tap[:, None] & m_channel[None, :], other=0.0).to(tl.float32)
            conv += x * tl.load(p_first + k * next_tap + o_channel, mask=m_channel, other=0.0)[None, :]
        # Padding after the last token projects to zero.
        u = tl.where(m_token[:, None], silu(conv), 0.0)
        low_rank = split_dot(u, to_rank, low_rank, PRECISION)
        weights = split_dot(u, to_weights, weights, PRECISION)
        tl.store(p_u + o_tile, u.to(narrow), mask=m_tile)
    _store_projections(p_weights, p_projected, o_scan, m_row, low_rank, weights, N, RANK, S, NR)
    for i in range(tl.cdiv(channels, BLOCK_C)):
        o_channel, m_channel = block_channels(i, channels, BLOCK_C)
        o_tile = o_row.to(tl.int64)[:, None] * channels + o_channel[None, :]
        m_tile = m_row[:, None] & m_channel[None, :]
        p_step = p_operands + (BLOCK_R + BLOCK_P) * channels + i * BLOCK_C
        to_step = tl.trans(_load_operand(p_step, channels - i * BLOCK_C, channels, BLOCK_C, BLOCK_R))
        bias = load_vector(p_dt_bias, o_channel, m_channel)
        tl.store(p_dt + o_tile, _step_sizes(low_rank, to_step, bias, PRECISION), mask=m_tile)


def project(launch, projected: Tensor | None, taps: Tensor, neighbours: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Inputs (B, padded L, E) of the scan of each direction, step sizes (K, B, padded L, E), and B and C.

    The latter are float32 (K, B, padded L / 4, 2 S / NR, 4, NR), S being N padded to a power of two; the others have
    the dtype of the inputs. Fills ``projected`` (K, B, padded L, row) and ``taps`` (K, W + 1, E), weights and biases of
    the convolutions.
    """
    sizes = (launch.batch, launch.padded, launch.channels)
    u = [launch.empty(*sizes, dtype=launch.xz.dtype) for _ in launch.parameters]
    dt = launch.empty(launch.directions, *sizes, dtype=launch.xz.dtype)
    states = triton.next_power_of_2(launch.state)
    weights = launch.empty(launch.directions, launch.batch, launch.padded, 2 * states)
    block_r, block_p = max(16, triton.next_power_of_2(launch.rank)), max(16, 2 * states)
    operands = launch.empty(launch.directions, 2 * block_r + block_p, launch.channels, dtype=launch.xz.dtype)
    prepared = [[p[i] for i in (0, 1, 2, 3)] for p in launch.parameters]
    biases = [p[4] for p in launch.parameters]
    is_narrow = launch.xz.element_size() == 2
    rows = launch.batch * launch.padded
    sizes = dict(N=launch.state, W=launch.width, S=states, BLOCK_R=block_r, BLOCK_P=block_p)
    block = 32
    bidirectional_selective_scan_fwd_kernel_prepare[(cdiv(launch.channels, block), launch.directions, 2)](
        taps, operands, *prepared[0], *prepared[-1], launch.channels, launch.rank, BLOCK_C=block, num_warps=1, **sizes
    )
    bidirectional_selective_scan_fwd_kernel_project[(cdiv(rows, _TOKENS), launch.directions)](
        launch.xz,
        projected,
        weights,
        u[0],
        u[-1],
        dt,
        taps,
        operands,
        biases[0],
        biases[-1],
        launch.length,
        launch.channels,
        launch.tiles,
        rows,
        *launch.xz.stride()[:2],
        RANK=launch.row - 2 * launch.state,
        NR=neighbours,
        T=TILE,
        BLOCK_T=_TOKENS,
        BLOCK_C=_CHANNELS,
        PRECISION=launch.precision,
        num_warps=_WARPS,
        num_stages=1,
        # So that eight programs fit on a multiprocessor; exact float32 products and many states need the registers.
        **(register_limit(_REGISTERS) if is_narrow and launch.block_rows <= 64 else {}),
        **sizes,
    )
    return u, dt, weights
