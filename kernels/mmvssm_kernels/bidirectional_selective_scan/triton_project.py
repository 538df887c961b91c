"""Vim's inner block, Triton forward pass: what needs no recurrence.

These are the convolutions with SiLU, the projections to low-rank step sizes and to the weights B and C of every token,
and the step sizes. What the scans read for every token and channel is left in the dtype of the inputs.

A program is one warp, which owns R tokens for each of eight groups of four lanes, neighbours in scan order, and walks
through the channels, 32 at a time. A lane has R tokens of eight neighbouring channels; a token's tile (8, 4, 8) is
(group, lane, channel). The window of the convolution slides through a lane's registers, so a row is loaded once.
The same registers are what a matrix instruction takes as its right operand if its columns are ordered (token of a lane,
group) and its rows (half of a four, lane, four of the eight, channel of a half); the weights are laid out to match. The
step sizes' product leaves its results to lanes in that way too: only the low-rank values pass from lane to lane.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv
from ..triton_scan import softplus
from .triton_launch import NARROW_CHANNELS
from .triton_tile import load_vector, silu, split_dot

# Tokens of a lane; half as many where there are more projections than this.
_OWN_TOKENS = 4
_FEW_PROJECTIONS = 64


@triton.jit
def _load_of_lanes(pointers, o_channel, channels: tl.constexpr):
    """Tile (8, 4, 8) of channels (4, 8), a lane's neighbours."""
    pointers = tl.max_contiguous(tl.broadcast_to(pointers, (8, 4, 8)), [1, 4, 8])
    if channels % 32 == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=tl.broadcast_to(o_channel < channels, (8, 4, 8)), other=0.0)


@triton.jit
def _store_of_lanes(p_rows, tile, m_group, o_channel, channels: tl.constexpr):
    """Store a tile (8, 4, 8) in the dtype of its place."""
    pointers = tl.max_contiguous(p_rows + o_channel, [1, 4, 8])
    mask = tl.broadcast_to(m_group if channels % 32 == 0 else m_group & (o_channel < channels), (8, 4, 8))
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _load_window(
    p_first, i_token, step, length, m_group, o_channel, channels: tl.constexpr, stride_token: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Inputs (8, 4, 8) of ``ROWS`` tokens, the first in scan order first; those outside the sequence are zero."""
    rows = ()
    for j in tl.static_range(ROWS):
        o_token = i_token + j * step
        pointers = tl.max_contiguous(p_first + step * (j * stride_token) + o_channel, [1, 4, 8])
        m_row = m_group & (o_token >= 0) & (o_token < length)
        if channels % 32 != 0:
            m_row = m_row & (o_channel < channels)
        rows += (tl.load(pointers, mask=tl.broadcast_to(m_row, (8, 4, 8)), other=0.0),)
    return rows


@triton.jit
def _load_operand(p_operand, COUNT: tl.constexpr):
    """Left operand (COUNT, 32) from where a lane's values lie together."""
    o_tile = tl.arange(0, COUNT // 8)[:, None, None, None] * 256 + tl.arange(0, 8)[None, :, None, None] * 32
    o_lane = (tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :])[None, None, :, :]
    pointers = tl.max_contiguous(tl.multiple_of(p_operand + o_tile + o_lane, [16, 16, 16, 16]), [1, 2, 4, 8])
    operand = tl.reshape(tl.load(pointers), (COUNT // 16, 2, 8, 4, 2, 2, 2))
    return tl.reshape(tl.permute(operand, (0, 5, 2, 4, 3, 1, 6)), (COUNT, 32))


@triton.jit
def _load_step_operand(p_rows, i_channel, channels: tl.constexpr, COUNT: tl.constexpr):
    """Right operand (COUNT, 32) from the rows (COUNT) of 32 channels."""
    o_tile = tl.arange(0, 4)[:, None]
    o_column = tl.arange(0, 8)[None, :]
    o_channel = i_channel + o_column // 2 * 8 + o_tile * 2 + o_column % 2
    o_rank = tl.arange(0, COUNT // 16)[:, None, None] * 16 + tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    pointers = p_rows + o_channel[:, :, None, None, None] * COUNT + o_rank[None, None, :, :, :]
    pointers = tl.max_contiguous(pointers, [1, 2, 1, 4, 8])
    if channels % 32 == 0:
        operand = tl.load(pointers)
    else:
        mask = tl.broadcast_to((o_channel < channels)[:, :, None, None, None], pointers.shape)
        operand = tl.load(pointers, mask=mask, other=0.0)
    operand = tl.permute(tl.reshape(operand, (4, 8, COUNT // 16, 4, 2, 2)), (2, 4, 3, 5, 0, 1))
    return tl.reshape(operand, (COUNT, 32))


@triton.jit
def _load_step_operands(p_rows, p_bias, i_channel, o_lane, channels: tl.constexpr, COUNT: tl.constexpr):
    """The same with the bias (8, 4, 8) of the step sizes."""
    bias = _load_of_lanes(p_bias + i_channel + o_lane, i_channel + o_lane, channels)
    return _load_step_operand(p_rows, i_channel, channels, COUNT), bias.to(tl.float32)


@triton.jit
def _bias_rows(bias, R: tl.constexpr):
    """Rows (8 R, 32) of a product's result, all the same, from the bias (8, 4, 8)."""
    bias = tl.permute(tl.reshape(bias, (1, 8, 4, 4, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(tl.broadcast_to(bias, (R, 8, 4, 4, 2)), (8 * R, 32))


@triton.jit
def _convolve(x, p_taps, o_channel, channels: tl.constexpr, R: tl.constexpr, W: tl.constexpr, dtype: tl.constexpr):
    """Inputs of the scans (8, 4, 8), convolutions with SiLU, of a lane's R tokens."""
    bias = _load_of_lanes(p_taps + W * channels + o_channel, o_channel, channels)
    taps = ()
    for k in tl.static_range(W):
        taps += (_load_of_lanes(p_taps + k * channels + o_channel, o_channel, channels),)
    tiles = ()
    for r in tl.static_range(R):
        tile = bias
        for k in tl.static_range(W):
            tile += x[r + k].to(tl.float32) * taps[k]
        tiles += (silu(tile).to(dtype),)
    return tiles


@triton.jit
def _halves(values, dtype: tl.constexpr):
    """Operands of a product whose sum is ``values``; float32 ones need no second."""
    head = values.to(dtype)
    return head, (values - head.to(tl.float32)).to(dtype)


@triton.jit
def _columns_of_lanes(tiles, R: tl.constexpr):
    """Right operand (32, 8 R) of a lane's tokens (8, 4, 8)."""
    if R == 4:
        columns = tl.join(tl.join(tiles[0], tiles[2]), tl.join(tiles[1], tiles[3]))
    else:
        columns = tl.join(tiles[0], tiles[1])[:, :, :, None, :]
    columns = tl.permute(tl.reshape(columns, (8, 4, 2, 2, 2, R)), (3, 1, 2, 4, 5, 0))
    return tl.reshape(columns, (32, 8 * R))


@triton.jit
def _store_projections(
    p_weights, p_projected, o_row, m_row, m_token, low_rank, weights,
    N: tl.constexpr, RANK: tl.constexpr, S: tl.constexpr, NR: tl.constexpr,
):  # fmt: skip
    """B and C of rows as the scans read them and, for the backward pass, the rows [low rank | B | C]."""
    o_row = o_row.to(tl.int64)[:, None]
    m_row = m_row[:, None]
    o_weight = tl.arange(0, weights.shape[1])[None, :]
    # NR states of four tokens are neighbours, as the scans split them.
    p_group = p_weights + (o_row // 4 * (8 * S) + o_row % 4 * NR) + (o_weight // NR * (4 * NR) + o_weight % NR)
    weights = tl.where(m_token[:, None], weights, 0.0)
    tl.store(p_group, weights, mask=m_row & (o_weight < 2 * S))
    if p_projected is not None:
        low_rank = tl.where(m_token[:, None], low_rank, 0.0)
        o_rank = tl.arange(0, low_rank.shape[1])[None, :]
        p_rows = p_projected + o_row * (RANK + 2 * N)
        tl.store(p_rows + o_rank, low_rank, mask=m_row & (o_rank < RANK))
        p_rows += RANK + o_weight // S * N + o_weight % S
        tl.store(p_rows, weights, mask=m_row & (o_weight < 2 * S) & (o_weight % S < N))


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
    """Weights as the projections load them, in vectors.

    Those of the convolutions and their biases (K, W + 1, E) in float32. In the dtype of the inputs and padded with
    zeros, for either direction, the rows that give low-rank values (R) and B and C (P; S of either), by blocks of 32
    channels and in the order of a matrix instruction's registers; then those that give step sizes (E, R).
    """
    i_block = tl.program_id(0)
    o_channel = i_block * BLOCK_C + tl.arange(0, BLOCK_C)
    m_channel = o_channel < channels
    ROWS: tl.constexpr = BLOCK_R + BLOCK_P
    if tl.program_id(1) == 1:
        p_weight = p_weight_b
        p_bias = p_bias_b
        p_x_weight = p_x_weight_b
        p_dt_weight = p_dt_weight_b
        p_taps += (W + 1) * channels
        p_operands += (ROWS + BLOCK_R) * BLOCK_C * tl.num_programs(0)
    narrow = p_operands.dtype.element_ty
    i_tile = tl.program_id(2)
    if i_tile == 0:
        for k in tl.static_range(W):
            tap = load_vector(p_weight + k, o_channel * W, m_channel)
            tl.store(p_taps + k * channels + o_channel, tap, mask=m_channel)
        tl.store(p_taps + W * channels + o_channel, load_vector(p_bias, o_channel, m_channel), mask=m_channel)
        o_rank = tl.arange(0, BLOCK_R)[None, :]
        step = tl.load(
            p_dt_weight + o_channel[:, None] * rank + o_rank, mask=m_channel[:, None] & (o_rank < rank), other=0.0
        )
        # A lane has four adjacent ones of sixteen, of which two and two are adjacent before.
        o_rank = o_rank // 16 * 16 + o_rank % 8 // 2 * 4 + o_rank % 16 // 8 * 2 + o_rank % 2
        p_steps = p_operands + ROWS * BLOCK_C * tl.num_programs(0) + o_channel[:, None] * BLOCK_R + o_rank
        tl.store(p_steps, step.to(narrow))
    else:
        # Sixteen rows of the operand.
        i_row = (i_tile - 1) * 16
        o_row = i_row + tl.arange(0, 16)[:, None]
        o_weight = o_row - BLOCK_R
        o_given = tl.where(o_weight < 0, o_row, rank + o_weight // S * N + o_weight % S)
        m_given = tl.where(o_weight < 0, o_row < rank, (o_weight < 2 * S) & (o_weight % S < N))
        mask = m_given & m_channel[None, :]
        given = tl.load(p_x_weight + o_given * channels + o_channel[None, :], mask=mask, other=0.0)
        # A lane has two rows, eight apart, of eight channels: two instructions take a vector of eight values each.
        o_own = tl.arange(0, 16)[:, None] // 8 * 2 + tl.arange(0, 16)[:, None] % 8 * 32
        o_local = tl.arange(0, BLOCK_C)[None, :]
        o_place = o_local // 8 * 8 + o_local % 8 // 4 * 256 + o_local % 4 // 2 * 4 + o_local % 2
        tl.store(p_operands + i_block * (ROWS * BLOCK_C) + i_row * BLOCK_C + o_own + o_place, given.to(narrow))


@triton.jit(do_not_specialize=["length", "n_padded", "n_rows"])
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
    n_padded,
    n_rows,
    stride_batch,
    stride_token: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    RANK: tl.constexpr,
    S: tl.constexpr,
    NR: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Inputs (B, padded L, E) and step sizes (K, B, padded L, E) of the scans, and projections in scan order.

    A program owns 8 R of all rows of all sequences, for one direction. Projections are those of the inputs before they
    are rounded if ``EXACT``.
    """
    # Groups of lanes, neighbours in scan order, and their first tokens.
    i_row = (tl.program_id(0) * 8 + tl.arange(0, 8)[:, None, None]) * R
    m_group = i_row < n_rows
    i_batch = i_row // n_padded
    i_token = i_row % n_padded
    step = 1
    p_dt += tl.program_id(1) * n_rows.to(tl.int64) * channels
    p_taps += tl.program_id(1) * (W + 1) * channels
    n_steps: tl.constexpr = (channels + 31) // 32
    p_operands += tl.program_id(1) * (2 * BLOCK_R + BLOCK_P) * (n_steps * 32)
    if tl.program_id(1) == 1:
        p_u = p_u_b
        p_dt_bias = p_dt_bias_b
        # Scan order: every sequence's rows from the last to the first.
        step = -1
        i_token = n_padded - 1 - i_token
    i_first = i_token - (W - 1) * step
    p_first = p_x + i_batch.to(tl.int64) * stride_batch + i_first.to(tl.int64) * stride_token
    o_tile = (i_batch * n_padded + i_token).to(tl.int64) * channels
    narrow = p_u.dtype.element_ty
    low_rank = tl.zeros((BLOCK_R, 8 * R), tl.float32)
    weights = tl.zeros((BLOCK_P, 8 * R), tl.float32)
    o_lane = (tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :])[None, :, :]
    next_x = _load_window(p_first, i_first, step, length, m_group, o_lane, channels, stride_token, R + W - 1)
    # Unrolled, so that what is loaded ahead need not be moved.
    for i in tl.range(n_steps, loop_unroll_factor=2):
        o_channel = i * 32 + o_lane
        x = next_x
        # The next step's inputs, or the last ones again, are loaded ahead.
        o_next = tl.minimum(i + 1, n_steps - 1) * 32 + o_lane
        next_x = _load_window(p_first, i_first, step, length, m_group, o_next, channels, stride_token, R + W - 1)
        tl.debug_barrier()  # otherwise the compiler moves these loads to where their results are used
        to_rank = _load_operand(p_operands + i * (BLOCK_R + BLOCK_P) * 32, BLOCK_R)
        to_weights = _load_operand(p_operands + (i * (BLOCK_R + BLOCK_P) + BLOCK_R) * 32, BLOCK_P)
        tiles = _convolve(x, p_taps, o_channel, channels, R, W, tl.float32 if EXACT else narrow)
        u = _columns_of_lanes(tiles, R)
        if EXACT and narrow != tl.float32:
            u, rest = _halves(u, narrow)
            low_rank = split_dot(to_rank, rest, low_rank, PRECISION)
            weights = split_dot(to_weights, rest, weights, PRECISION)
        low_rank = split_dot(to_rank, u, low_rank, PRECISION)
        weights = split_dot(to_weights, u, weights, PRECISION)
        for r in tl.static_range(R):
            _store_of_lanes(p_u + (o_tile + step * (r * channels)), tiles[r], m_group, o_channel, channels)
    # Columns of the products are ordered (token of a lane, group of lanes).
    o_column = (tl.program_id(0) * 8 + tl.arange(0, 8)[None, :]) * R + tl.arange(0, R)[:, None]
    o_column = tl.reshape(o_column, (8 * R,))
    o_position = o_column % n_padded
    m_token = tl.where(tl.program_id(1) == 1, n_padded - 1 - o_position, o_position) < length
    low_rank = tl.trans(low_rank)
    _store_projections(
        p_weights, p_projected, tl.program_id(1) * n_rows + o_column, o_column < n_rows, m_token, low_rank,
        tl.trans(weights), N, RANK, S, NR,
    )  # fmt: skip
    o_own = tl.reshape(tl.arange(0, R), (R, 1, 1, 1))
    p_steps = p_operands + (BLOCK_R + BLOCK_P) * (n_steps * 32)
    head, tail = _halves(low_rank, narrow)
    to_step, bias = _load_step_operands(p_steps, p_dt_bias, 0, o_lane, channels, BLOCK_R)
    for i in tl.range(n_steps, loop_unroll_factor=2):
        o_channel = i * 32 + o_lane
        raw = split_dot(head, to_step, _bias_rows(bias, R), PRECISION)
        if narrow != tl.float32:
            raw = split_dot(tail, to_step, raw, PRECISION)
        i_next = tl.minimum(i + 1, n_steps - 1) * 32
        to_step, bias = _load_step_operands(p_steps, p_dt_bias, i_next, o_lane, channels, BLOCK_R)
        tl.debug_barrier()  # as above
        dt = softplus(raw, SHORT=narrow != tl.float32).to(narrow)
        dt = tl.reshape(tl.permute(tl.reshape(dt, (R, 8, 4, 4, 2)), (0, 1, 3, 2, 4)), (R, 8, 4, 8))
        p_tile = p_dt + (o_tile[None, :, :, :] + o_own * (step * channels) + o_channel[None, :, :, :])
        m_tile = m_group if channels % 32 == 0 else m_group & (o_channel < channels)
        mask = tl.broadcast_to(m_tile[None, :, :, :], (R, 8, 4, 8))
        tl.store(tl.max_contiguous(p_tile, [1, 2, 4, 8]), dt, mask=mask)


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
    operands = launch.empty(
        launch.directions, 2 * block_r + block_p, cdiv(launch.channels, 32) * 32, dtype=launch.xz.dtype
    )
    prepared = [[p[i] for i in (0, 1, 2, 3)] for p in launch.parameters]
    biases = [p[4] for p in launch.parameters]
    own = _OWN_TOKENS if launch.block_rows <= _FEW_PROJECTIONS else 2
    rows = launch.batch * launch.padded
    sizes = dict(N=launch.state, W=launch.width, S=states, BLOCK_R=block_r, BLOCK_P=block_p)
    block = 32
    bidirectional_selective_scan_fwd_kernel_prepare[
        (cdiv(launch.channels, block), launch.directions, 1 + (block_r + block_p) // 16)
    ](taps, operands, *prepared[0], *prepared[-1], launch.channels, launch.rank, BLOCK_C=block, num_warps=1, **sizes)
    bidirectional_selective_scan_fwd_kernel_project[(cdiv(rows, 8 * own), launch.directions)](
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
        launch.padded,
        rows,
        *launch.xz.stride()[:2],
        RANK=launch.row - 2 * launch.state,
        NR=neighbours,
        R=own,
        EXACT=launch.channels < NARROW_CHANNELS,
        PRECISION=launch.precision,
        num_warps=1,
        num_stages=1,
        **sizes,
    )
    return u, dt, weights
