"""Tiles of the kernels: T tokens, N states, C channels.

A warp lane owns a channel (with 16 channels or fewer, a share of a channel's states) and keeps all tokens of its tile
in registers: a recurrence over tokens is a chain of multiply-adds without shuffles, and reversing the rows of a tile or
moving them by one costs no instruction, the compiler only renames registers. The functions here are right for any
layout. The compiler chooses this one by itself for tiles (T, N, C), which are never loaded or stored; rows of inputs
that lie otherwise in memory (tokens adjacent, or the weights) reach it through shared memory.

Row i of a tile is the i-th token in scan order, whatever the direction. Numbers: ``rate`` is ``A log2(e)``, so that a
decay is ``exp2(dt rate)``; everything is float32.
"""

import triton
import triton.language as tl

from ..triton_scan import LOG2_E, rounded, softplus


@triton.jit
def _chain(decay_1, state_1, decay_2, state_2):
    # The product with the state must be the one that is fused: it is the chain that every token waits for.
    return decay_1 * decay_2, tl.fma(decay_2, state_1, state_2)


@triton.jit
def _is_first(tile):
    return (tl.arange(0, tile.shape[0]) == 0)[:, None, None]


@triton.jit
def last_row(tile):
    """The last row (N, C) of a tile, as a sum of integers, of which the compiler drops the zeros."""
    is_last = (tl.arange(0, tile.shape[0]) == tile.shape[0] - 1)[:, None, None]
    return tl.sum(tl.where(is_last, tile.to(tl.int32, bitcast=True), 0), 0).to(tl.float32, bitcast=True)


@triton.jit
def scan_rows(decay, value, first):
    """``state[t] = decay[t] state[t - 1] + value[t]`` down the rows of (T, N, C), with ``first`` before the first."""
    value = tl.where(_is_first(value), value + decay * first[None, :, :], value)
    _, state = tl.associative_scan((decay, value), 0, _chain)
    return state


@triton.jit
def _exchange_rows(bits, BIT: tl.constexpr):
    """Every row changes places with the one whose index differs in ``BIT``."""
    T: tl.constexpr = bits.shape[0]
    N: tl.constexpr = bits.shape[1]
    C: tl.constexpr = bits.shape[2]
    pairs = tl.reshape(bits, (T >> (BIT + 1), 2, 1 << BIT, N, C))
    # (x + y) - x is y for integers, which the compiler knows when both are in registers.
    return tl.reshape(tl.sum(pairs, 1, keep_dims=True) - pairs, (T, N, C))


@triton.jit
def reverse_rows(tile):
    """Rows in opposite order, T a power of two up to 32."""
    bits = tile.to(tl.int32, bitcast=True)
    for k in tl.static_range(5):
        if (1 << k) < tile.shape[0]:
            bits = _exchange_rows(bits, k)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def previous_rows(tile, first):
    """Rows moved down by one; at the top comes in ``first`` (1, N, C)."""
    i_row = tl.arange(0, tile.shape[0])
    bits = tile.to(tl.int32, bitcast=True)
    # Going from i to i - 1 flips the lowest bit that is set and all below it.
    if tile.shape[0] > 1:
        bits = _exchange_rows(bits, 0)
    moved = bits
    for k in tl.static_range(1, 5):
        if (1 << k) < tile.shape[0]:
            bits = _exchange_rows(bits, k)
            moved = tl.where((i_row % (1 << k) == 0)[:, None, None], bits, moved)
    return tl.where(_is_first(tile), first, moved.to(tl.float32, bitcast=True))


@triton.jit
def _add(a_1, b_1, c_1, a_2, b_2, c_2):
    return a_1 + a_2, b_1 + b_2, c_1 + c_2


@triton.jit
def sums_over_states(a, b, c):
    """Sums (T, C) of three tiles; together, because warps that share a channel's states meet for them."""
    return tl.reduce((a, b, c), 1, _add)


@triton.jit
def sum_over_channels(tile, MATRIX_UNIT: tl.constexpr, PRECISION: tl.constexpr):
    """Sums (T, N) of a tile, as a matrix product with ones where shuffles would cost more."""
    T: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    C: tl.constexpr = tile.shape[2]
    if MATRIX_UNIT:
        ones = tl.full((C, 16), 1.0, tl.float32)
        sums = tl.dot(tl.reshape(detach_layout(tile), (T * N, C)), ones, input_precision=PRECISION)
        return tl.reshape(tl.max(sums, 1), (T, N))  # all columns are the same
    else:
        return tl.sum(rounded(tile), 2)


@triton.jit
def tile_tokens(i_tile, length, T: tl.constexpr, REVERSE: tl.constexpr):
    """Tokens (T) of a tile and whether they exist; the last tile in scan order may be short."""
    o_scan = i_tile * T + tl.arange(0, T)
    if REVERSE:
        return length - 1 - o_scan, o_scan < length
    else:
        return o_scan, o_scan < length


@triton.jit
def load_tile(p_tile, o_token, m_token, stride_token, o_column, m_column, stride_column):
    """Tile (T, columns) of inputs as they are, zero where masked."""
    return tl.load(
        p_tile + o_token[:, None] * stride_token + o_column[None, :] * stride_column,
        mask=m_token[:, None] & m_column[None, :],
        other=0.0,
    )


@triton.jit
def _second(row_1, row_2):
    return row_2


@triton.jit
def detach_layout(tile):
    """The same tile. What is computed before keeps its own layout, whatever the operation behind would like."""
    return tl.associative_scan(tile, 0, _second)


@triton.jit
def load_weights(p_weight, o_token, m_token, stride_token, i_state, m_state, stride_state):
    """Tile (T, N) of B or C in float32.

    Detached, so that it is converted before every lane gets all of it: that saves a conversion in each lane.
    """
    weight = load_tile(p_weight, o_token, m_token, stride_token, i_state, m_state, stride_state)
    return detach_layout(weight.to(tl.float32))


@triton.jit
def load_vector(p_vector, o_channel, m_channel):
    """Optional per-channel values (C) in float32, zero if there are none."""
    if p_vector is None:
        return tl.zeros(o_channel.shape, tl.float32)
    else:
        return tl.load(p_vector + o_channel, mask=m_channel, other=0.0).to(tl.float32)


@triton.jit
def load_rate(p_A, o_channel, m_state_channel, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Decay rates (1, N, C)."""
    o_state = tl.arange(0, BLOCK_N)
    A = tl.load(p_A + o_channel[None, :] * N + o_state[:, None], mask=m_state_channel, other=0.0)
    return detach_layout((A.to(tl.float32) * LOG2_E)[None, :, :])


@triton.jit
def step_sizes(delta, bias, m_token, SOFTPLUS: tl.constexpr):
    """Step sizes (T, C), zero for tokens that do not exist: those change no state."""
    dt = delta.to(tl.float32) + bias[None, :]
    if SOFTPLUS:
        dt = softplus(dt)
    return tl.where(m_token[:, None], dt, 0.0)


@triton.jit
def channels_of(i_program, channels, n_groups, zero, BLOCK_C: tl.constexpr):
    """Group, block in the group, channels (C) and mask of a program; blocks do not cross groups.

    ``zero`` is 0, but the compiler does not know that: channels of unknown alignment are not loaded in vectors, whose
    layout would have to be left again.
    """
    group_channels = channels // n_groups
    n_blocks = tl.cdiv(group_channels, BLOCK_C)
    i_group = i_program // n_blocks
    i_block = i_program % n_blocks
    o_in_group = i_block * BLOCK_C + tl.arange(0, BLOCK_C)
    return i_group, i_block, i_group * group_channels + o_in_group + zero, o_in_group < group_channels
