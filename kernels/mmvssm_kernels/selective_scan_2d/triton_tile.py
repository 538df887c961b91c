"""What the kernels of the four-direction scan share: where tokens lie, the inputs and products of a tile.

A warp takes a tile at a time: Q = 8 groups of 4 lanes have T consecutive tokens each, in the order of the scan, for
C = 4 V channels. A lane owns V channels, 4 neighbours of every 16, and keeps its T tokens in registers, so that a scan
over them is a chain of multiply-adds (``triton_chains.py``), and what is loaded per token (address, low-rank step
sizes) serves V channels.

This is also how matrix instructions hand out a result with one row per token: rows to 8 groups of lanes, pairs of
columns to the 4 lanes of a group. The columns of a product may have any order, so they are ordered such that a lane
gets the channels it owns (:func:`step_weights`), and loads are written such that Triton gives them the same lanes
(:func:`_tile_pointers`): the products with the weights of step sizes move nothing between lanes.

Tokens that are masked, at the end of a sequence, come first or last in a scan and add nothing to it; their decays do
not matter.
Numbers: step sizes are v = dt log2(e), so a decay is exp2(-v rate) with rate = exp(A_log); everything after the
projections is float32.
"""

import triton
import triton.language as tl

from .triton_chains import half_offsets

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus_log2(x, PRECISE: tl.constexpr):
    """log2(1 + 2^x) as max(x, 0) + log2(1 + 2^-|x|).

    log2(1 + e) / e on [0, 1] is a polynomial of degree 7 (relative error 3e-7) or, for 16-bit inputs, 4 (6e-5). It
    keeps small step sizes accurate and needs no logarithm from the special-function unit.
    """
    e = tl.exp2(tl.abs(x) * -1.0)  # a sign, where a difference from zero would be an instruction
    if PRECISE:
        series = 0.0625709101 - e * 0.0120270237
        series = -0.153903683 + e * series
        series = 0.255003465 + e * series
        series = -0.353034251 + e * series
        series = 0.480001761 + e * series
        series = -0.721306059 + e * series
        series = 1.44269472 + e * series
    else:
        series = -0.227119391 + e * 0.0596515184
        series = 0.441898794 + e * series
        series = -0.716987408 + e * series
        series = 1.44261321 + e * series
    return tl.maximum(x, 0.0) + e * series


@triton.jit
def divided(i, inverse, n):
    """i // n and the rest, from ``inverse = 0xFFFFFFFF // n``: rounded down, then mended."""
    quotient = tl.umulhi(tl.cast(i, tl.uint32), inverse).to(tl.int32)
    quotient += ((quotient + 1) * n <= i).to(tl.int32)
    return quotient, i - quotient * n


@triton.jit
def tile_tokens(i_image, i_tile, is_column, is_reverse, height, width, T: tl.constexpr, Q: tl.constexpr):
    """Pixels and mask (T, Q) of the tokens of a tile in the order of its scan: T consecutive ones in each of Q groups.

    Tiles are counted from the first pixel on in all directions. A masked token has some pixel of its image.
    """
    length = height * width
    # A map of one row has the same order along its columns.
    is_turned = is_column & (height > 1)
    # Divided by multiplication; for the tokens of the tile with the inverse rounded up, exact as the numbers are small.
    inverse = tl.full((), 0xFFFFFFFF, tl.uint32) // height.to(tl.uint32)
    i_start = i_tile * (T * Q)
    i_outer, _rest = divided(i_start, inverse, height)
    i_outer = tl.where(is_turned, i_outer, 0)
    inverse = tl.where(is_turned, inverse + 1, 0)
    o_group, o_token = tl.arange(0, Q), tl.arange(0, T)
    o_group = tl.where(is_reverse, Q - 1 - o_group, o_group)
    o_token = tl.where(is_reverse, T - 1 - o_token, o_token)
    o_inside = o_group[None, :] * T + o_token[:, None]
    m_token = i_start + o_inside < length
    i_inner = i_start - i_outer * height + o_inside
    wraps = tl.umulhi(i_inner.to(tl.uint32), tl.zeros((T, Q), tl.uint32) + inverse).to(tl.int32)
    o_pixel = (i_inner - wraps * height) * tl.where(is_turned, width, 1) + (i_outer + wraps)
    return i_image * length + tl.where(m_token, o_pixel, 0), m_token


@triton.jit
def _lane_pointers(p_map, o_row, o_lane, STRIDE: tl.constexpr):
    """Pointers (4, T, Q, accesses, W) to rows that are ``STRIDE`` elements apart.

    The hint makes the layout: Triton orders the axes by contiguity, so that a lane takes W elements, then come the 4
    lanes of a token, then sequences, never tokens. Neither of the two is contiguous; the numbers only make the order.
    """
    W: tl.constexpr = o_lane.shape[4]
    pointers = p_map + o_row.to(tl.int64)[None, :, :, None, None] * STRIDE + o_lane
    return tl.max_contiguous(pointers, [3 if W > 1 else 1, 1, 2 if W > 1 else 1, 1, W])


@triton.jit
def _tile_pointers(p_map, o_row, m_row, i_first, STRIDE: tl.constexpr, D: tl.constexpr, V: tl.constexpr):
    """Pointers and mask (4, T, Q, V / 4, 4) of a tile: the 4 lanes of a token take 16 neighbouring channels at once."""
    o_lane = tl.arange(0, 4)[:, None, None, None, None] * 4 + tl.arange(0, 4)[None, None, None, None, :]
    o_channel = i_first + o_lane + tl.arange(0, V // 4)[None, None, None, :, None] * 16
    mask = m_row[None, :, :, None, None]
    if D % (4 * V) != 0:
        mask = mask & (o_channel < D)
    return _lane_pointers(p_map, o_row, o_channel, STRIDE), mask


@triton.jit
def load_tile(p_map, o_row, m_row, i_first, STRIDE: tl.constexpr, D: tl.constexpr, V: tl.constexpr):
    """Channels ``i_first`` on of the rows ``o_row`` (T, Q), as (T, Q, C)."""
    pointers, mask = _tile_pointers(p_map, o_row, m_row, i_first, STRIDE, D, V)
    tile = tl.load(pointers, mask=mask, other=0.0)
    return tl.reshape(tl.permute(tile, (1, 2, 3, 0, 4)), (o_row.shape[0], o_row.shape[1], 4 * V))


@triton.jit
def store_tile(p_map, tile, o_row, m_row, i_first, STRIDE: tl.constexpr, D: tl.constexpr, V: tl.constexpr):
    """The counterpart of :func:`load_tile`."""
    pointers, mask = _tile_pointers(p_map, o_row, m_row, i_first, STRIDE, D, V)
    tile = tl.reshape(tile.to(p_map.dtype.element_ty), (o_row.shape[0], o_row.shape[1], V // 4, 4, 4))
    tl.store(pointers, tl.permute(tile, (3, 0, 1, 2, 4)), mask=mask)


@triton.jit
def _same_row(i_row, Q: tl.constexpr):
    return tl.zeros((1, Q), tl.int32) + i_row


@triton.jit
def load_rows(p_rows, i_row, i_first, D: tl.constexpr, Q: tl.constexpr, V: tl.constexpr):
    """Channels ``i_first`` on of one row of D, for every group, (Q, C)."""
    tile = load_tile(p_rows, _same_row(i_row, Q), tl.full((1, Q), True, tl.int1), i_first, D, D, V)
    return tl.reshape(tile, (Q, 4 * V))


@triton.jit
def load_skip(p_skip, i_first, D: tl.constexpr, Q: tl.constexpr, V: tl.constexpr):
    """Sum (Q, C) of the skip weights of all directions, for every group."""
    skip = load_rows(p_skip, 0, i_first, D, Q, V).to(tl.float32)
    for i_direction in tl.static_range(1, 4):
        skip += load_rows(p_skip, i_direction, i_first, D, Q, V).to(tl.float32)
    return skip


@triton.jit
def _rank_offsets(BLOCK_R: tl.constexpr, W: tl.constexpr):
    """Ranks (4, 1, 1, accesses, W) that the lanes of a token take, each a quarter of them."""
    o_lane = tl.arange(0, 4)[:, None, None, None, None] * (BLOCK_R // 4)
    o_access = tl.arange(0, BLOCK_R // (4 * W))[None, None, None, :, None] * W
    return o_lane + o_access + tl.arange(0, W)[None, None, None, None, :]


@triton.jit
def load_low_rank(p_projected, o_pixel, i_direction, K: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Low-rank step sizes of a tile, (T, Q, BLOCK_R), then the two numbers behind them, others that are finite or zero.

    What they are multiplied with is zero there (:func:`step_weights`), so whole vectors are loaded. Every direction's
    projections are padded to K.
    """
    W: tl.constexpr = 4 if BLOCK_R < 32 or p_projected.dtype.element_ty.primitive_bitwidth == 32 else 8
    o_lane = _rank_offsets(BLOCK_R, W)
    pointers = _lane_pointers(p_projected + i_direction * K, o_pixel, o_lane, 4 * K)
    mask = tl.broadcast_to(o_lane < (R + W + 1) // W * W, pointers.shape)
    low_rank = tl.load(pointers, mask=mask, other=0.0)
    return tl.reshape(tl.permute(low_rank, (1, 2, 0, 3, 4)), (o_pixel.shape[0], o_pixel.shape[1], BLOCK_R))


@triton.jit
def as_operand(tile, WIDTH: tl.constexpr):
    """Left operand (T Q, n) of a matrix product, of low-rank step sizes; nothing moves.

    Of every 4 ``WIDTH`` columns a matrix instruction takes ``WIDTH`` from each lane.
    """
    T: tl.constexpr = tile.shape[0]
    Q: tl.constexpr = tile.shape[1]
    n: tl.constexpr = tile.shape[2]
    tile = tl.reshape(tile, (T, Q, 4, n // (4 * WIDTH), WIDTH))
    return tl.reshape(tl.permute(tile, (0, 1, 3, 2, 4)), (T * Q, n))


@triton.jit
def as_factor(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """A factor of a matrix product in the dtype of its other one.

    To the nearest TF32 number, where a product would just cut off the other bits.
    """
    if DTYPE.primitive_bitwidth == 32 and PRECISION == "tf32":
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def step_weights(
    p_dt_weight,
    p_dt_bias,
    i_first,
    i_direction,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weight (BLOCK_R, C) and bias (C) of a direction's step sizes, times log2(e).

    Rows as in :func:`as_operand`, columns so that pairs of them go to the lanes that own the channels.
    """
    WIDTH: tl.constexpr = 2 if p_dt_weight.dtype.element_ty.primitive_bitwidth == 16 else 1
    C: tl.constexpr = 4 * V
    B: tl.constexpr = C // 8
    S: tl.constexpr = BLOCK_R // (4 * WIDTH)
    # Axes: in a lane's pair of rows, lanes, columns of an instruction, instructions along columns and along rows.
    o_rank = tl.arange(0, WIDTH)[:, None, None, None, None] + tl.arange(0, S)[None, None, None, None, :] * WIDTH
    o_rank += tl.arange(0, 4)[None, :, None, None, None] * (BLOCK_R // 4)
    i_column = tl.arange(0, 8)[None, None, :, None, None]
    i_block = tl.arange(0, B)[None, None, None, :, None]
    o_channel = i_first + i_block // 2 * 16 + i_column // 2 * 4 + i_block % 2 * 2 + i_column % 2
    pointers = p_dt_weight + (i_direction * D + o_channel) * R + o_rank
    weight = tl.load(
        tl.max_contiguous(pointers, [WIDTH, 1, 1, 1, 1]), mask=(o_rank < R) & (o_channel < D), other=0.0
    ).to(tl.float32)
    weight = tl.reshape(tl.permute(weight, (4, 1, 0, 3, 2)), (BLOCK_R, C))
    o_column = tl.arange(0, C)
    o_channel = i_first + o_column // 16 * 16 + o_column % 8 // 2 * 4 + o_column // 8 % 2 * 2 + o_column % 2
    bias = tl.load(p_dt_bias + i_direction * D + o_channel, mask=o_channel < D, other=0.0)
    return as_factor(weight * LOG2_E, p_dt_weight.dtype.element_ty, PRECISION), bias.to(tl.float32) * LOG2_E


@triton.jit
def step_weights_back(
    p_dt_weight,
    i_first,
    i_direction,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weight (C, BLOCK_R) that leads from the gradients of step sizes back to those of low-rank ones.

    Rows as in :func:`as_operand`, columns so that a lane gets neighbouring ones.
    """
    C: tl.constexpr = 4 * V
    S: tl.constexpr = V // WIDTH
    B: tl.constexpr = BLOCK_R // 8
    # Axes: lanes, columns of an instruction, instructions along rows and columns, in a lane's pair of rows.
    i_step = tl.arange(0, S)[None, None, :, None, None]
    o_channel = i_first + i_step // (4 // WIDTH) * 16 + i_step % (4 // WIDTH) * WIDTH
    o_channel += tl.arange(0, 4)[:, None, None, None, None] * 4 + tl.arange(0, WIDTH)[None, None, None, None, :]
    i_column = tl.arange(0, 8)[None, :, None, None, None]
    o_rank = i_column // 2 * (BLOCK_R // 4) + tl.arange(0, B)[None, None, None, :, None] * 2 + i_column % 2
    pointers = p_dt_weight + (i_direction * D + o_channel) * R + o_rank
    weight = tl.load(tl.max_contiguous(pointers, [1, 1, 1, 1, 1]), mask=(o_rank < R) & (o_channel < D), other=0.0)
    weight = tl.reshape(tl.permute(weight, (2, 0, 4, 3, 1)), (C, BLOCK_R))
    return as_factor(weight, p_dt_weight.dtype.element_ty, PRECISION)


@triton.jit
def _channels_as_operand(tile, WIDTH: tl.constexpr):
    """As :func:`as_operand`, but a lane owns 4 of every 16 columns."""
    T: tl.constexpr = tile.shape[0]
    Q: tl.constexpr = tile.shape[1]
    C: tl.constexpr = tile.shape[2]
    tile = tl.permute(tl.reshape(tile, (T, Q, C // 16, 4, 4 // WIDTH, WIDTH)), (0, 1, 2, 4, 3, 5))
    return tl.reshape(tile, (T * Q, C))


@triton.jit
def dlow_rank_of(draw, weight, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of low-rank step sizes (T, Q, BLOCK_R) from those of the step sizes before softplus (T, Q, C)."""
    T: tl.constexpr = draw.shape[0]
    Q: tl.constexpr = draw.shape[1]
    BLOCK_R: tl.constexpr = weight.shape[1]
    dlow = tl.dot(_channels_as_operand(draw, WIDTH), weight, input_precision=PRECISION)
    dlow = tl.permute(tl.reshape(dlow, (T, Q, BLOCK_R // 8, 4, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(dlow, (T, Q, BLOCK_R))


@triton.jit
def channel_sums(tile_1, tile_2, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Sums of two tiles (T, Q, C) over their channels, which all 4 lanes get: both (T, Q, 4).

    Products with ones instead of shuffles, so what is added is rounded to factors of the type ``DTYPE``.
    """
    T: tl.constexpr = tile_1.shape[0]
    Q: tl.constexpr = tile_1.shape[1]
    C: tl.constexpr = tile_1.shape[2]
    WIDTH: tl.constexpr = 2 if DTYPE.primitive_bitwidth == 16 else 1
    i_column = tl.zeros((C, 1), tl.int32) + (tl.arange(0, 8) % 2)[None, :]
    tile_1 = _channels_as_operand(as_factor(tile_1, DTYPE, PRECISION), WIDTH)
    tile_2 = _channels_as_operand(as_factor(tile_2, DTYPE, PRECISION), WIDTH)
    sums = tl.dot(tile_1, tl.where(i_column == 0, 1.0, 0.0).to(DTYPE), input_precision=PRECISION)
    sums = tl.dot(tile_2, tl.where(i_column == 1, 1.0, 0.0).to(DTYPE), sums, input_precision=PRECISION)
    return tl.split(tl.reshape(sums, (T, Q, 4, 2)))


@triton.jit
def store_low_rank(p_first, dlow, o_row, m_token, STRIDE: tl.constexpr, R: tl.constexpr):
    """Stores (T, Q, BLOCK_R), of which R are kept, to rows ``STRIDE`` apart."""
    BLOCK_R: tl.constexpr = dlow.shape[2]
    MOST: tl.constexpr = 8 if BLOCK_R >= 32 else 4
    EVEN: tl.constexpr = 4 if STRIDE % 4 == 0 and R % 4 == 0 else (2 if STRIDE % 2 == 0 and R % 2 == 0 else 1)
    W: tl.constexpr = MOST if STRIDE % 32 == 0 and R % 8 == 0 else EVEN
    o_lane = _rank_offsets(BLOCK_R, W)
    dlow = tl.reshape(dlow.to(p_first.dtype.element_ty), (dlow.shape[0], dlow.shape[1], 4, BLOCK_R // (4 * W), W))
    tl.store(
        _lane_pointers(p_first, o_row, o_lane, STRIDE),
        tl.permute(dlow, (2, 0, 1, 3, 4)),
        mask=m_token[None, :, :, None, None] & (o_lane < R),
    )


@triton.jit
def load_rate(p_rate, i_first, i_direction, n, D: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, V: tl.constexpr):
    """Rates (Q, C) of state n, the same for every group: a decay is exp2(-v rate).

    p_rate is (4, N, D) or, if there is one state, its logarithm, the parameter itself.
    """
    rate = load_rows(p_rate, i_direction * N + n, i_first, D, Q, V).to(tl.float32)
    if N == 1:
        rate = tl.exp2(rate * LOG2_E)
    return rate


@triton.jit
def load_state(
    p_state,
    p_rate,
    p_token,
    i_first,
    i_direction,
    is_known,
    n,
    D: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    V: tl.constexpr,
):
    """Of state n: its value at the tile's border (2, C), zero unless known, its rates (Q, C), B and C (T, Q)."""
    state = tl.load(p_state + n * D, mask=(half_offsets(i_first, 4 * V) < D) & is_known, other=0.0)
    rate = load_rate(p_rate, i_first, i_direction, n, D, N, Q, V)
    return state, rate, tl.load(p_token + n), tl.load(p_token + (N + n))


@triton.jit
def raw_steps(low_rank, weight, bias, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Step sizes before softplus, times log2(e), (T, Q, C)."""
    T: tl.constexpr = low_rank.shape[0]
    Q: tl.constexpr = low_rank.shape[1]
    C: tl.constexpr = weight.shape[1]
    low_rank = as_factor(as_operand(low_rank, WIDTH), weight.dtype, PRECISION)
    raw = tl.dot(low_rank, weight, tl.broadcast_to(bias[None, :], (T * Q, C)), input_precision=PRECISION)
    raw = tl.permute(tl.reshape(raw, (T, Q, C // 16, 2, 4, 2)), (0, 1, 2, 4, 3, 5))
    return tl.reshape(raw, (T, Q, C))


@triton.jit
def _for_channels(weight, V: tl.constexpr):
    """A number per token, that all 4 lanes have, (T, Q, 4), for all channels (T, Q, C)."""
    T: tl.constexpr = weight.shape[0]
    Q: tl.constexpr = weight.shape[1]
    weight = tl.broadcast_to(weight[:, :, None, :, None], (T, Q, V // 4, 4, 4))
    return tl.reshape(weight, (T, Q, 4 * V))


@triton.jit
def only_weights(
    p_projected,
    low_rank,
    o_pixel,
    i_direction,
    K: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """B and C (T, Q, C) of the only state, from the low-rank step sizes if they were loaded with these.

    A product with ones and zeros hands them to the lanes that need them, as float32.
    """
    T: tl.constexpr = low_rank.shape[0]
    Q: tl.constexpr = low_rank.shape[1]
    IS_LOADED: tl.constexpr = low_rank.shape[2] >= R + 2
    first: tl.constexpr = R if IS_LOADED else 0
    if not IS_LOADED:
        low_rank = load_low_rank(p_projected + R, o_pixel, i_direction, K, 2, 16)
    n: tl.constexpr = low_rank.shape[2]
    o_row = tl.arange(0, n)
    o_rank = o_row // WIDTH % 4 * (n // 4) + o_row // (4 * WIDTH) * WIDTH + o_row % WIDTH
    ones = o_rank[:, None] == first + (tl.arange(0, 8) % 2)[None, :]
    low_rank = as_factor(as_operand(low_rank, WIDTH), low_rank.dtype, PRECISION)
    weights = tl.dot(low_rank, tl.where(ones, 1.0, 0.0).to(low_rank.dtype), input_precision=PRECISION)
    b_B, b_C = tl.split(tl.reshape(weights, (T, Q, 4, 2)))
    return _for_channels(b_B, V), _for_channels(b_C, V)
