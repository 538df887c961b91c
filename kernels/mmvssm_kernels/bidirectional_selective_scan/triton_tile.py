"""Tiles of the kernels: T tokens of C channels, one channel per lane with all its tokens in that lane's registers.

Then a recurrence over the tokens is a chain of multiply-adds without shuffles, and reversing the rows of a tile or
moving them by one costs no instruction at all: the compiler only renames registers. The functions here are right for
any layout. The compiler chooses this one for loads of adjacent channels of which it cannot tell that they are aligned:
kernels add a run-time zero to the channel index. It would keep the layout of a matrix product for all that follows it,
so products pass :func:`detach_layout`. A run-time loop walks the states one after the other: any number of them fits.

Row i of a tile is the i-th token in scan order. ``projected`` holds its tokens in scan order, too (the backward
direction's reversed, after padding to whole tiles), so that the weights of a tile's tokens are adjacent and aligned.
"""

import triton
import triton.language as tl

from ..triton_scan import LOG2_E, softplus


@triton.jit
def sigmoid(x):
    """Logistic function; a squared reciprocal root costs fewer instructions than a division."""
    root = tl.rsqrt(1.0 + tl.exp2(-x * LOG2_E))
    return root * root


@triton.jit
def silu(x):
    """``x sigmoid(x)``."""
    return x * sigmoid(x)


@triton.jit
def _chain(decay_1, state_1, decay_2, state_2):
    # The product with the state must be the one that is fused: it is the chain that every token waits for.
    return decay_1 * decay_2, tl.fma(decay_2, state_1, state_2)


@triton.jit
def scan_rows(decay, value):
    """``state[t] = decay[t] state[t - 1] + value[t]`` down the rows of (T, C), from zero."""
    _, state = tl.associative_scan((decay, value), 0, _chain)
    return state


@triton.jit
def _second(row_1, row_2):
    return row_2


@triton.jit
def detach_layout(tile):
    """The same tile (T, C); the layout of what produced it ends here, because scans have their own."""
    return tl.associative_scan(tile, 0, _second)


@triton.jit
def _exchange_rows(bits, BIT: tl.constexpr):
    """Every row of (T, C) changes places with the one whose index differs in ``BIT``."""
    rows: tl.constexpr = bits.shape[0]
    columns: tl.constexpr = bits.shape[1]
    pairs = tl.reshape(bits, (rows >> (BIT + 1), 2, 1 << BIT, columns))
    # (x + y) - x is y for integers, which the compiler knows when both are in registers.
    return tl.reshape(tl.sum(pairs, 1, keep_dims=True) - pairs, (rows, columns))


@triton.jit
def reverse_rows(tile):
    """Rows (T, C) in opposite order, T a power of two up to 32."""
    rows: tl.constexpr = tile.shape[0]
    bits = tile.to(tl.int32, bitcast=True)
    for k in tl.static_range(5):
        if (1 << k) < rows:
            bits = _exchange_rows(bits, k)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def previous_rows(tile, first, i_row):
    """Rows (T, C) moved down by one; at the top comes in ``first``, (1, C) or the first row of (T, C)."""
    rows: tl.constexpr = tile.shape[0]
    bits = tile.to(tl.int32, bitcast=True)
    # Going from i to i - 1 flips the lowest bit that is set and all below it.
    bits = _exchange_rows(bits, 0)
    moved = bits
    for k in tl.static_range(1, 5):
        if (1 << k) < rows:
            bits = _exchange_rows(bits, k)
            moved = tl.where((i_row % (1 << k) == 0)[:, None], bits, moved)
    return tl.where(i_row[:, None] == 0, first, moved.to(tl.float32, bitcast=True))


@triton.jit
def _token(i_scan, n_all, is_reverse, T: tl.constexpr):
    return tl.where(is_reverse, n_all * T - 1 - i_scan, i_scan)


@triton.jit
def tile_tokens(i_tile, n_all, is_reverse, T: tl.constexpr):
    """Positions in scan order (T) and tokens (T) of tile ``i_tile`` of ``n_all``, both counted in scan order."""
    o_scan = i_tile * T + tl.arange(0, T)
    return o_scan, _token(o_scan, n_all, is_reverse, T)


@triton.jit
def load_step_sizes(p_projected, weight, bias, o_scan, o_rank, m_rank, stride_row, PRECISION: tl.constexpr):
    """Low-rank values (T, R) and step sizes (T, C) of a tile.

    Tokens of the padding have step sizes too, but input and output weights of zero: before the first token in scan
    order they leave the state zero, after the last one nobody reads it, and no gradient flows through either.
    """
    low_rank = tl.load(p_projected + o_rank[None, :] * stride_row + o_scan[:, None], mask=m_rank[None, :], other=0.0)
    raw = detach_layout(tl.dot(low_rank, weight, input_precision=PRECISION)) + bias[None, :]
    return low_rank, softplus(raw)


@triton.jit
def load_rows(p_rows, o_row, o_channel, m_channel, stride_row):
    """Tile (T, C) in float32. Rows are not masked, which would cost more than all else: they have to exist."""
    return tl.load(p_rows + o_row[:, None] * stride_row + o_channel[None, :], mask=m_channel[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def load_inputs(p_x, i_tile, n_all, length, o_channel, m_channel, stride_token, is_reverse, T: tl.constexpr):
    """Inputs x (T, C) of a tile, zero for padding."""
    _, o_token = tile_tokens(i_tile, n_all, is_reverse, T)
    x = load_rows(p_x, tl.minimum(o_token, length - 1), o_channel, m_channel, stride_token)
    return tl.where((o_token < length)[:, None], x, 0.0)


@triton.jit
def earlier_inputs(
    x, k, p_x, i_tile, n_all, length, o_channel, m_channel, stride_token, i_row, is_reverse, T: tl.constexpr
):
    """Inputs of ``k + 1`` tokens before, from those of ``k`` tokens before, ``x``."""
    i_before = i_tile * T - 1 - k
    i_token = _token(i_before, n_all, is_reverse, T)
    m_before = m_channel & (i_before >= 0) & (i_token < length)
    before = tl.load(p_x + i_token * stride_token + o_channel, mask=m_before, other=0.0).to(tl.float32)
    return previous_rows(x, before[None, :], i_row)


@triton.jit
def load_tap(p_weight, k, o_channel, m_channel, W: tl.constexpr):
    """Weight (1, C) of the token ``k`` before the current one."""
    return load_vector(p_weight + (W - 1 - k), o_channel * W, m_channel)[None, :]


@triton.jit
def convolve_tile(
    x,
    p_x,
    p_weight,
    p_bias,
    i_tile,
    n_all,
    length,
    o_channel,
    m_channel,
    stride_token,
    i_row,
    is_reverse,
    W: tl.constexpr,
    T: tl.constexpr,
):
    """Convolution (T, C) of a tile of inputs before its SiLU: in scan order it is causal for both directions."""
    total = x * load_tap(p_weight, 0, o_channel, m_channel, W) + load_vector(p_bias, o_channel, m_channel)[None, :]
    for k in tl.static_range(1, W):
        x = earlier_inputs(
            x, k - 1, p_x, i_tile, n_all, length, o_channel, m_channel, stride_token, i_row, is_reverse, T
        )
        total += x * load_tap(p_weight, k, o_channel, m_channel, W)
    return total


@triton.jit
def load_weight(p_weight, o_channel, m_channel, o_rank, m_rank, rank):
    """Weight of the step sizes (R, C) in float32."""
    return tl.load(
        p_weight + o_channel[None, :] * rank + o_rank[:, None], mask=m_rank[:, None] & m_channel[None, :], other=0.0
    ).to(tl.float32)


@triton.jit
def load_vector(p_vector, o_channel, m_channel):
    """Per-channel values (C) in float32."""
    return tl.load(p_vector + o_channel, mask=m_channel, other=0.0).to(tl.float32)


@triton.jit
def load_weights(p_projected, i_state, o_scan, rank, stride_row, N: tl.constexpr):
    """Input and output weights (T), (T) of one state, zero for padding."""
    p_B = p_projected + (rank + i_state) * stride_row + o_scan
    return tl.load(p_B), tl.load(p_B + N * stride_row)
