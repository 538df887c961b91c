"""Building blocks of the scan kernels of Vim's inner block.

A program is one warp that owns a block of channels of one sequence and walks its tokens one by one, with all states of
the channels in registers. Tiles of states have three axes for states and two for channels, see :func:`state_axes`, and
per-channel values are loaded into every lane that needs them, so that no layout ever has to be converted. What needs no
recurrence (convolution, step sizes) is made for whole tiles of T tokens (T, C), in kernels of its own.

``projected`` holds a row [step-size rank | B | C] for every token in scan order, the backward direction's reversed
after padding to whole tiles; rows of the padding are zero. Tokens of the padding have step sizes too, but input and
output weights of zero: before the first token in scan order they leave the state zero, after the last one nobody reads
it, and no gradient flows through either.
"""

import triton
import triton.language as tl

from ..selective_scan.triton_tile import detach_layout
from ..triton_scan import LOG2_E, rounded, sigmoid


@triton.jit
def silu(x):
    """``x sigmoid(x)``."""
    return x * sigmoid(x)


@triton.jit
def load_vector(p_vector, o_channel, m_channel):
    """Per-channel values (C) in float32."""
    return tl.load(p_vector + o_channel, mask=m_channel, other=0.0).to(tl.float32)


@triton.jit
def load_rows(p_rows, o_row, m_row, o_channel, m_channel, stride_row):
    """Tile (T, C) in float32, zero where masked."""
    return tl.load(
        p_rows + o_row[:, None] * stride_row + o_channel[None, :], mask=m_row[:, None] & m_channel[None, :], other=0.0
    ).to(tl.float32)


@triton.jit
def block_channels(i_block, channels: tl.constexpr, C: tl.constexpr):
    """Channels (C) of a block and their mask, for tiles of tokens.

    A lane takes four adjacent ones of 16-bit and of float32 tensors alike, so that no tile has to change its layout.
    """
    o_channel = i_block * C + tl.max_contiguous(tl.arange(0, C), 4)
    return o_channel, (o_channel < channels) | (channels % C == 0)


@triton.jit
def of_blocks(o_token, o_channel, n_padded, C: tl.constexpr, KINDS: tl.constexpr):
    """Places (T, C') of tokens and channels in a tensor (channel blocks, padded L, KINDS, C), of the first kind.

    What a scan reads lies together, or it would fill the cache with lines of which it needs a quarter.
    """
    places = o_token[:, None] * (KINDS * C) + (o_channel // C * (n_padded * KINDS * C) + o_channel % C)[None, :]
    return tl.max_contiguous(tl.multiple_of(places, [1, 4]), [1, 4])


@triton.jit
def load_step_weight(p_weight, o_channel, m_channel, rank, BLOCK_R: tl.constexpr, dtype: tl.constexpr):
    """Weight of the step sizes (R, C), an operand of a product."""
    o_rank = tl.arange(0, BLOCK_R)
    pointers = p_weight + o_channel[None, :] * rank + o_rank[:, None]
    return tl.load(pointers, mask=(o_rank < rank)[:, None] & m_channel[None, :], other=0.0).to(dtype)


@triton.jit
def split_dot(left, right, total, PRECISION: tl.constexpr):
    """``total + left right``, as exact as ``right``, which has 16 bits or is float32.

    16-bit operands are the fast ones, so a float32 ``left`` becomes the sum of two of them.
    """
    if right.dtype == tl.float32:
        return tl.dot(left, right, total, input_precision=PRECISION)
    elif left.dtype == right.dtype:
        return tl.dot(left, right, total)
    else:
        head = left.to(right.dtype)
        tail = (left - head.to(tl.float32)).to(right.dtype)
        return tl.dot(tail, right, tl.dot(head, right, total))


@triton.jit
def split_both_dot(left, right, total, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """``total + left right`` for float32 ``left``, from products of ``dtype`` if that has 16 bits."""
    if right.dtype == dtype:
        return split_dot(left, right, total, PRECISION)
    elif dtype == tl.float32:
        return tl.dot(left, right, total, input_precision=PRECISION)
    else:
        head = right.to(dtype)
        tail = (right - head.to(tl.float32)).to(dtype)
        return tl.dot(left.to(dtype), tail, split_dot(left, head, total, PRECISION))


@triton.jit
def convolve(p_x, p_taps, o_token, length, o_channel, m_channel, channels, stride_token, REVERSE, W: tl.constexpr):
    """Convolution (T, C) in float32 before its SiLU; ``p_taps`` holds its weights (W, E) and bias (E)."""
    weighted = tl.zeros((o_token.shape[0], o_channel.shape[0]), tl.float32)
    weighted += load_vector(p_taps + W * channels, o_channel, m_channel)[None, :]
    for k in tl.static_range(W):
        o_tap = o_token + (W - 1 - k) if REVERSE else o_token - (W - 1 - k)
        x = load_rows(p_x, o_tap, (o_tap >= 0) & (o_tap < length), o_channel, m_channel, stride_token)
        weighted += x * load_vector(p_taps + k * channels, o_channel, m_channel)[None, :]
    return weighted


@triton.jit
def state_axes(NR: tl.constexpr, NG: tl.constexpr, CR: tl.constexpr, NL: tl.constexpr, CL: tl.constexpr):
    """States (NR, NG, NL) and channels (CR, CL) of a block, from zero.

    Tiles of states are (NR, NG, CR, NL, CL), where NL CL = 32 lanes: a lane has CR adjacent channels, and of each NG
    groups of NR adjacent states.
    """
    o_group = tl.arange(0, NG)[:, None] * NL + tl.arange(0, NL)[None, :]
    o_state = o_group[None, :, :] * NR + tl.arange(0, NR)[:, None, None]
    o_local = tl.arange(0, CL)[None, :] * CR + tl.arange(0, CR)[:, None]
    return o_state, o_local


@triton.jit
def of_states(values):
    """Per-state values (NR, NG, NL) for a tile of states."""
    return values[:, :, None, :, None]


@triton.jit
def of_channels(values):
    """Per-channel values (CR, CL) for a tile of states."""
    return values[None, None, :, None, :]


@triton.jit
def of_lanes(values):
    """Per-channel values (CR, NL, CL), one copy in every lane, for a tile of states."""
    return values[None, None, :, :, :]


@triton.jit
def products_in_lanes(products, N: tl.constexpr):
    """Products that are summed over the states of a lane."""
    # Rows of an odd number of states are not aligned, so the compiler spreads the NR states over lanes.
    return rounded(products) if N % 2 == 1 else products


@triton.jit
def in_lanes(products, N: tl.constexpr):
    """Sum of products over the states of a lane, (CR, NL, CL)."""
    return tl.sum(tl.sum(products_in_lanes(products, N), axis=0), axis=0)


@triton.jit
def state_pointers(p_states, o_state, o_channel, N: tl.constexpr, STATES_FIRST: tl.constexpr = False):
    """Pointers to a tile of (E, N).

    The hint gives a lane adjacent states and puts lanes along the last two axes, of which the one with the larger
    number comes first: neighbouring lanes have other channels or, ``STATES_FIRST``, other states. It is about the order
    of the axes; a lane's accesses are as wide as the alignment allows, whatever it says.
    """
    pointers = p_states + of_channels(o_channel) * N + of_states(o_state)
    if STATES_FIRST:
        return tl.max_contiguous(pointers, [16, 1, 1, 8, 4])
    else:
        return tl.max_contiguous(pointers, [16, 1, 1, 4, 8])


@triton.jit
def state_rates(p_A_log, o_state, o_channel, m_states, N: tl.constexpr, STATES_FIRST: tl.constexpr = False):
    """``A log2(e)`` of a tile of states."""
    pointers = state_pointers(p_A_log, o_state, o_channel, N, STATES_FIRST)
    return -tl.exp2(tl.load(pointers, mask=m_states, other=0.0).to(tl.float32) * LOG2_E) * LOG2_E


@triton.jit
def load_weights(p_row, o_state, N: tl.constexpr):
    """Input or output weights (NR, NG, NL) of a token."""
    if o_state.numel == N:
        return tl.load(p_row + o_state)
    else:
        return tl.load(p_row + o_state, mask=o_state < N, other=0.0)


@triton.jit
def lane_pointers(p_row, o_channel, NL: tl.constexpr, STATES_FIRST: tl.constexpr = False):
    """Pointers (CR, NL, CL) to per-channel values, one for every lane that holds them.

    So they have the layout of tiles of states, and nothing is exchanged between lanes.
    """
    shape: tl.constexpr = (o_channel.shape[0], NL, o_channel.shape[1])
    pointers = tl.broadcast_to(p_row + o_channel[:, None, :], shape)
    if STATES_FIRST:
        return tl.max_contiguous(pointers, [16, 8, 4])
    else:
        return tl.max_contiguous(pointers, [16, 4, 8])


@triton.jit
def load_of_channels(p_row, o_channel, m_channel, NL: tl.constexpr, STATES_FIRST: tl.constexpr = False):
    """Per-channel values (CR, NL, CL), a copy in every lane, zero where masked."""
    pointers = lane_pointers(p_row, o_channel, NL, STATES_FIRST)
    return tl.load(pointers, mask=tl.broadcast_to(m_channel[:, None, :], pointers.shape), other=0.0)


@triton.jit
def store_of_channels(p_row, values, o_channel, m_channel, NL: tl.constexpr, STATES_FIRST: tl.constexpr = False):
    """Store per-channel values (CR, 1 or NL, CL), from all lanes that hold them.

    A predicate for one lane of a channel only would cost a branch.
    """
    pointers = lane_pointers(p_row, o_channel, NL, STATES_FIRST)
    mask = tl.broadcast_to(m_channel[:, None, :], pointers.shape)
    tl.store(pointers, tl.broadcast_to(values, pointers.shape), mask=mask)


@triton.jit
def store_weight_sums(p_dB, shares0, shares1, shares2, shares3, STEP: tl.constexpr, N: tl.constexpr):
    """Sums over channels of four tokens' shares (NR, NG, NL, CL, 2), stored as rows [dB | dC] ``STEP`` apart.

    Shares are exchanged through shared memory, so that lanes add what they store: shuffles would take five times as
    many instructions.
    """
    S: tl.constexpr = shares0.shape[0] * shares0.shape[1] * shares0.shape[2]
    CL: tl.constexpr = shares0.shape[3]
    shares = tl.join(tl.join(shares0, shares2), tl.join(shares1, shares3))
    shares = tl.reshape(tl.permute(shares, (3, 5, 6, 4, 1, 2, 0)), (CL, 8 * S))
    sums = tl.sum(detach_layout(shares), axis=0)
    o_sum = tl.arange(0, 8 * S)
    o_state = o_sum % S
    pointers = p_dB + o_sum // (2 * S) * STEP + o_sum // S % 2 * N + o_state
    # Lanes have the values as they were added, one by one: as vectors they would be exchanged again.
    pointers = tl.max_contiguous(pointers, [1])
    tl.store(pointers, sums.to(p_dB.dtype.element_ty), mask=(o_state < N) | (S == N))


@triton.jit
def input_sums(shares0, shares1, shares2, shares3, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """Sums over states of four tokens' shares (CR, NL, CL), as a tile (CR, CL, 4).

    The shares of four neighbouring lanes lie as a matrix instruction takes its left operand: the product with ones that
    pick a token adds them without an exchange, and leaves one token to every lane. Which columns of the operand a lane
    holds depends on the loads behind it: adjacent pairs if they are ``NARROW``.
    """
    CR: tl.constexpr = shares0.shape[0]
    NL: tl.constexpr = shares0.shape[1]
    CL: tl.constexpr = shares0.shape[2]
    if NL == 4:
        # The last token first, whose shares are there first.
        shares = tl.join(tl.join(shares3, shares1), tl.join(shares2, shares0))
        o_share = tl.arange(0, 16)
        if NARROW:
            shares = tl.permute(shares, (0, 2, 3, 1, 4))
            o_token = 3 - o_share // 8 * 2 - o_share % 2
        else:
            shares = tl.permute(shares, (0, 2, 3, 4, 1))
            o_token = 3 - o_share // 4
        shares = tl.reshape(shares, (CR * CL, 16))
        ones = tl.where(o_token[:, None] == (tl.arange(0, 8) // 2)[None, :], 1.0, 0.0)
        if PRECISION == "tf32x3":
            bits = shares.to(tl.int32, bitcast=True)
            if NARROW:
                # Rounded, because the matrix unit cuts off.
                sums = tl.dot((bits + 4096).to(tl.float32, bitcast=True), ones, input_precision="tf32")
            else:
                # What it would cut off goes through it on its own.
                head = (bits & -8192).to(tl.float32, bitcast=True)
                sums = tl.dot(shares - head, ones, tl.dot(head, ones, input_precision="tf32"), input_precision="tf32")
        else:
            sums = tl.dot(shares, ones, input_precision=PRECISION)
        sums, _ = tl.split(tl.reshape(sums, (CR, CL, 4, 2)))
        return sums
    else:
        shares = tl.sum(tl.join(tl.join(shares0, shares2), tl.join(shares1, shares3)), axis=1)
        return tl.reshape(shares, (CR, CL, 4))


@triton.jit
def quarter_pointers(p_rows, o_channel, step):
    """Pointers (CR, CL, 4) to four rows ``step`` apart, in the layout of :func:`input_sums`."""
    pointers = p_rows + o_channel[:, :, None] + (tl.arange(0, 4) * step)[None, None, :]
    return tl.max_contiguous(pointers, [16, 4, 8])


@triton.jit
def scan_segment(i_segment, n_segments, n_tiles, n_all, REVERSE: tl.constexpr):
    """First tile and number of tiles of a segment, and its place among the segments, in scan order."""
    n_own = tl.minimum(n_tiles, n_all - i_segment * n_tiles)
    if REVERSE:
        return n_all - i_segment * n_tiles - n_own, n_own, n_segments - 1 - i_segment
    else:
        return i_segment * n_tiles, n_own, i_segment
