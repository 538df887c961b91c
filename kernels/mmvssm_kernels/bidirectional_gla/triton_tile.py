"""Building blocks of the kernels: tiles of a block of tokens, units, and pairs of tokens with strong gates.

A block has T tokens (rows). Log-decays are in units of log 2. The operands that blocks exchange are *decayed*: for the
forward direction

    query[i] = q[i] 2^(sum of the gates up to i + half)        key[j] = k[j] 2^(sum of the gates behind j + half)

with ``half`` (K) minus half the block's total log-decay, at most MILD; the backward direction mirrors them. Inside a
block, query[i] key[j] then is what a pair of tokens needs, because everything but the gates between them cancels.
"""

import triton
import triton.language as tl

from ..triton_scan import LOG2_E, softplus

# Stronger decays are zero in float32 anyway.
STRONGEST: tl.constexpr = tl.constexpr(-160.0)


@triton.jit
def load_rows(p_block, o_row, m_row, stride, o_column, m_column):
    """Tile (T, columns) of one head and block, zero where masked."""
    return tl.load(
        p_block + o_row[:, None] * stride + o_column[None, :], mask=m_row[:, None] & m_column[None, :], other=0.0
    )


@triton.jit
def load_vector(p_vector, o_column, m_column):
    """Optional values (columns) in float32, zero if there are none."""
    if p_vector is None:
        return tl.zeros(o_column.shape, tl.float32)
    else:
        return tl.load(p_vector + o_column, mask=m_column, other=0.0).to(tl.float32)


@triton.jit
def load_log_decays(p_block, o_row, m_row, stride, o_key, m_key, gate_factor, LOGITS: tl.constexpr):
    """Log-decays (T, K) in units of log 2, zero where masked; from raw logits if LOGITS."""
    m_gate = m_row[:, None] & m_key[None, :]
    p_gate = p_block + o_row[:, None] * stride + o_key[None, :]
    if LOGITS:
        # A logit of 1e4 is a decay of 1.
        gate = -softplus(-tl.load(p_gate, mask=m_gate, other=10000.0).to(tl.float32))
    else:
        gate = tl.load(p_gate, mask=m_gate, other=0.0).to(tl.float32)
    return tl.maximum(gate * (gate_factor * LOG2_E), STRONGEST)


@triton.jit
def load_upstream(
    p_dout, p_normed, p_rstd, weight, o_row, m_row, stride_dout, stride_normed, stride_rstd, o_value, m_value,
    V: tl.constexpr,
):  # fmt: skip
    """Gradient (T, V) of the sum of both directions before the norm, if any, and each token's gradient of its weight.

    Pointers are those of the block; in float32.
    """
    dout = load_rows(p_dout, o_row, m_row, stride_dout, o_value, m_value).to(tl.float32)
    if p_normed is None:
        return dout, dout
    else:
        normed = load_rows(p_normed, o_row, m_row, stride_normed, o_value, m_value).to(tl.float32)
        rstd = tl.load(p_rstd + o_row * stride_rstd, mask=m_row, other=0.0)
        dnormed = dout * weight[None, :]
        mean = tl.sum(dnormed * normed, axis=1) / V
        return rstd[:, None] * (dnormed - normed * mean[:, None]), dout * normed


@triton.jit
def unit_of(x, DTYPE: tl.constexpr):
    """For float16 the exponent of the largest magnitude in ``x``, by which a tile is scaled into range; else 0."""
    if DTYPE == tl.float16:  # noqa: SIM300 (a constexpr, but no constant)
        top = tl.max(tl.abs(x.to(tl.float32)))
        exponent = ((top.to(tl.int32, bitcast=True) >> 23) & 255) - 127
        return tl.maximum(exponent, -60).to(tl.float32)
    else:
        return tl.full((), 0.0, tl.float32)


@triton.jit
def half_of(total, MILD: tl.constexpr):
    """By how many powers of two (K) the operands of a block with this total log-decay (K) are moved."""
    return tl.minimum(-0.5 * total, MILD)


@triton.jit
def store_weights(
    p_weights, p_left, p_right, stride, left_half, right_half, unit, here, n_blocks, o_key,
    EXPONENT: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Store the decays (MOST, K) between the block that is ``here`` in a chunk and the others.

    Those to the left are met in one direction, those to the right in the other: pointers are to the chunk's total
    log-decays in these directions, EXPONENT strides before the exponents of the operands.

    Returns:
        The log-decays (K) from the block to both ends of the chunk.
    """
    o_block = tl.arange(0, MOST)[:, None]
    o_vector = o_block * o_key.shape[0] + o_key[None, :]
    m_left = o_block < here
    m_right = (o_block > here) & (o_block < n_blocks)
    # Blocks between, without the one that is met: nothing is subtracted from a sum of strong gates.
    left = tl.load(p_left + o_key.shape[0] + o_vector, mask=o_block + 1 < here, other=0.0)
    right = tl.load(p_right - o_key.shape[0] + o_vector, mask=m_right & (o_block - 1 > here), other=0.0)
    exponent = tl.load(p_left + EXPONENT * stride + o_vector, mask=m_left, other=0.0)
    exponent += tl.load(p_right + EXPONENT * stride + o_vector, mask=m_right, other=0.0)
    left = tl.cumsum(left, axis=0, reverse=True) - left_half[None, :]
    right = tl.cumsum(right, axis=0) - right_half[None, :]
    tl.store(p_weights + o_vector, tl.exp2(tl.where(m_left, left, right) + (exponent - unit)))
    to_left = tl.sum(tl.load(p_left + o_vector, mask=m_left, other=0.0), axis=0) - left_half
    to_right = tl.sum(tl.load(p_right + o_vector, mask=m_right, other=0.0), axis=0) - right_half
    return to_left, to_right


@triton.jit
def other_launch(f_half, b_half, MILD: tl.constexpr, STRONG: tl.constexpr):
    """Whether a block belongs to the other of two launches, that for mild and that for strong gates."""
    top = tl.max(tl.maximum(f_half, b_half), axis=0)
    return top < MILD if STRONG else top >= MILD


@triton.jit
def operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Computed float32 values as an operand of a product; tensor cores would cut TF32 off instead of rounding it."""
    if DTYPE == tl.float32 and PRECISION == "tf32":  # noqa: SIM300 (a constexpr, but no constant)
        return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def state_operand(state, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """A float32 state as an operand, and the exponent of its unit."""
    unit = unit_of(state, DTYPE)
    return operand(state * tl.exp2(-unit), DTYPE, PRECISION), unit


@triton.jit
def not_before(o_row, REVERSED: tl.constexpr):
    """Pairs (T, T) whose first token does not come before the second: what a query attends to."""
    return o_row[:, None] <= o_row[None, :] if REVERSED else o_row[:, None] >= o_row[None, :]


@triton.jit
def row_of(x, this):
    """The row (columns) of ``x`` (T, columns) that ``this`` (T) marks."""
    return tl.sum(tl.where(this[:, None], x, 0.0), axis=0)


@triton.jit
def lengthen(decay_sum, gate, o_row, j, REVERSED: tl.constexpr):
    """Sums (T, K) of the gates behind token ``j``, from those behind the token that follows it."""
    if REVERSED:
        return tl.where((o_row < j)[:, None], decay_sum + row_of(gate, o_row == j - 1)[None, :], 0.0)
    else:
        return tl.where((o_row > j)[:, None], decay_sum + row_of(gate, o_row == j + 1)[None, :], 0.0)


@triton.jit
def strong_matrix(q, k, gate, T: tl.constexpr, REVERSED: tl.constexpr):
    """Weights (T, T) of the pairs in a block for gates of any strength: every pair has its own exponent."""
    o_row = tl.arange(0, T)
    matrix = tl.zeros((T, T), tl.float32)
    decay_sum = tl.zeros(q.shape, tl.float32)
    for i in range(T):
        j = i if REVERSED else T - 1 - i
        decay_sum = lengthen(decay_sum, gate, o_row, j, REVERSED)
        this = o_row == j
        weights = tl.sum(q * row_of(k, this)[None, :] * tl.exp2(decay_sum), axis=1)
        matrix = tl.where(this[None, :], weights[:, None], matrix)
    return tl.where(not_before(o_row, REVERSED), matrix, 0.0)


@triton.jit
def strong_gradients(q, k, scores, gate, T: tl.constexpr, REVERSED: tl.constexpr):
    """Gradients of q and k (T, K) by way of :func:`strong_matrix`, without a token's share in itself, and that matrix.

    ``scores`` (T, T) is the gradient of the matrix.
    """
    o_row = tl.arange(0, T)
    keep = not_before(o_row, REVERSED)
    others = tl.where(keep & (o_row[:, None] != o_row[None, :]), scores, 0.0)
    matrix = tl.zeros((T, T), tl.float32)
    decay_sum = tl.zeros(q.shape, tl.float32)
    dq = tl.zeros(q.shape, tl.float32)
    dk = tl.zeros(q.shape, tl.float32)
    for i in range(T):
        j = i if REVERSED else T - 1 - i
        decay_sum = lengthen(decay_sum, gate, o_row, j, REVERSED)
        this = o_row == j
        key = row_of(k, this)[None, :]
        decay = tl.exp2(decay_sum)
        matrix = tl.where(this[None, :], tl.sum(q * key * decay, axis=1)[:, None], matrix)
        decay *= tl.sum(tl.where(this[None, :], others, 0.0), axis=1)[:, None]
        dq += decay * key
        dk += tl.where(this[:, None], tl.sum(decay * q, axis=0)[None, :], 0.0)
    return dq, dk, tl.where(keep, matrix, 0.0)
